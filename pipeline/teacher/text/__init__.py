"""Text from any source to rows of token ids with a loss mask."""
