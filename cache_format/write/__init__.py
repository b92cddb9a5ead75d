"""Writing a cache: shards, resume, several writers, conversion."""
