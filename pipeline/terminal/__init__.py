"""What a person sees: progress, tables and error lines. Only commands use it."""
