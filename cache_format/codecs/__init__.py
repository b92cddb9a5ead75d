"""Row batches to bytes and back: Arrow columns, codebooks, and the packed encoding."""
