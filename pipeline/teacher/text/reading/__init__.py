"""What the user names as data ─▶ rows: files, directories, hub datasets, and rows given in Python."""
