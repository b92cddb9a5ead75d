"""A pass over a cache: every byte against its checksum, or every value against the rules as well."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cache_format.cache_errors import CorruptShardError
from cache_format.read.reader import Cache, open_cache
from cache_format.rows.invariants import find_repeated_token
from cache_format.rows.plausibility import find_implausible
from cache_format.rows.rebuilt import find_other_entropy


@dataclass(frozen=True, kw_only=True)
class VerifySummary:
    rows: int
    tokens: int
    counted_tokens: int
    entries: int
    bytes: int  # of all shards, of what they are decoded with, and of the answers
    shards: int


def verify_cache(
    path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None, *, deep: bool = False
) -> VerifySummary:
    """Read everything that the manifest names, and check it.

    Args:
        progress: called with (rows checked, rows in all) after each record batch.
        deep: decode as well, and ask of every position what the reader asks, that no token is both exact and sampled,
            and that its probabilities and its entropy can be those of one distribution; of hidden targets, at some
            positions, that state and head have the entropy that is stored. Without, bytes are what is
            compared: they are those that the writer checked, a hundred times as fast.

    Raises: CacheError for the first thing that is wrong.
    """
    cache = open_cache(path)
    cache.tokenizer_files()
    cache.answers_bytes()
    cache.head()
    for done in _values(cache) if deep else cache.check_bytes():
        if progress is not None:
            progress(done, cache.num_rows)
    manifest = cache.manifest
    return VerifySummary(
        rows=manifest.num_rows,
        tokens=manifest.num_tokens,
        counted_tokens=manifest.num_counted_tokens,
        entries=manifest.num_entries,
        bytes=manifest.stored_bytes,
        shards=len(manifest.shards),
    )


def _values(cache: Cache) -> Iterator[int]:
    rows, head = 0, cache.head()
    for batch in cache.iter_record_batches():
        here = range(rows, rows + len(batch))
        problems = [find(batch, here, cache.metadata) for find in (find_repeated_token, find_implausible)]
        if head is not None:
            problems.append(find_other_entropy(batch, here, cache.metadata, head))
        for problem in problems:
            if problem is not None:
                raise CorruptShardError(f"{cache.path}: {problem}: it was written like this. Make the cache again.")
        rows += len(batch)
        yield rows
