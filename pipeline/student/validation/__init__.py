"""Checks of a run before any weights are loaded and any file is written."""
