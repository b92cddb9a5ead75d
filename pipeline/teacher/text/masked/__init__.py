"""Text for masked language models: windows, and which of their tokens are masked."""
