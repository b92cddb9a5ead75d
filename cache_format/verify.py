"""A full pass over a cache: every byte against its checksum, every row against the rules."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from cache_format.errors import CorruptShardError
from cache_format.invariants import find_repeated_token
from cache_format.reader import open_cache


@dataclass(frozen=True, kw_only=True)
class VerifySummary:
    rows: int
    tokens: int
    counted_tokens: int
    entries: int
    bytes: int  # of all shards, and of the lexicon
    shards: int


def verify_cache(path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> VerifySummary:
    """Read and check everything that the manifest names.

    Args:
        progress: called with (rows checked, rows in all) after each record batch.

    Raises: CacheError for the first thing that is wrong.
    """
    cache = open_cache(path)
    cache.tokenizer_files()
    rows = 0
    for batch in cache.iter_record_batches():
        here = range(rows, rows + len(batch))
        if problem := find_repeated_token(batch, here, cache.metadata):
            raise CorruptShardError(f"{cache.path}: {problem}: it was written like this. Make the cache again.")
        rows += len(batch)
        if progress is not None:
            progress(rows, cache.num_rows)
    manifest = cache.manifest
    return VerifySummary(
        rows=manifest.num_rows,
        tokens=manifest.num_tokens,
        counted_tokens=manifest.num_counted_tokens,
        entries=manifest.num_entries,
        bytes=manifest.stored_bytes,
        shards=len(manifest.shards),
    )
