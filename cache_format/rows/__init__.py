"""Rows and batches of rows as numpy arrays, and the rules that their values obey."""
