"""Reading a cache: rows by number, shards checked as they are first used, and verification."""
