"""Checks that a run passes before any weight is loaded or any file is touched."""
