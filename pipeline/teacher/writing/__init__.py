"""The cache that a run writes: metadata, shard sizes, and which process writes which shard."""
