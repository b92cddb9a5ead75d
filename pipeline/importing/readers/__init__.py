"""One reader for each format, on top of files, nested lists and token names; `source_formats` chooses it."""
