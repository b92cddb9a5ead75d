"""How many threads are worth starting. Standard library only."""

from __future__ import annotations

import os

ENCODING_THREADS = 4
"""At most, for a cache that is written: each has a record batch in memory."""


def available_cores() -> int:
    """Cores that this process may use; all of them where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encoding_threads() -> int:
    """For a `CacheWriter` that is to write as fast as rows come."""
    return min(available_cores(), ENCODING_THREADS)
