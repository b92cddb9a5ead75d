"""The teacher answers prompts; its answers and their targets become a cache."""
