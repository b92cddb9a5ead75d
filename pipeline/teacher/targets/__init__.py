"""Logits and hidden states of the teacher to the sparse targets of a cache."""
