"""What a document's states may depend on: its own tokens, and none that come later."""
