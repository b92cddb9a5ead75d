"""Rows of one or several caches as training batches, also in another tokenizer's tokens."""
