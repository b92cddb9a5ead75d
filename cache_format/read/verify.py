"""Check a whole cache: every byte against its checksum, or every value against the rules of the format as well."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cache_format.cache_errors import CorruptShardError
from cache_format.read.reader import Cache, open_cache
from cache_format.rows.invariants import find_repeated_token
from cache_format.rows.plausibility import find_implausible
from cache_format.rows.rebuilt import find_entropy_mismatch


@dataclass(frozen=True, kw_only=True)
class VerifySummary:
    """What `verify_cache` has read and found right."""

    rows: int
    tokens: int
    counted_tokens: int
    entries: int
    bytes: int  # of the shards and the files beside them
    shards: int


def verify_cache(
    path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None, *, deep: bool = False
) -> VerifySummary:
    """Read and check everything that the manifest names.

    Args:
        progress: called with (rows checked, total rows) after each record batch.
        deep: also decode every position and check that it obeys the rules of the format, that no token is both exact
            and sampled, and that probabilities and entropy can belong to one distribution. For hidden targets, compare
            the stored entropy with that of state and head at a few positions. The default compares checksums only,
            about a hundred times faster: the writer has checked the values.

    Raises: CacheError for the first problem.
    """
    cache = open_cache(path)
    cache.tokenizer_files()
    cache.answers_bytes()
    cache.documents_bytes()
    cache.head()
    for done in _check_values(cache) if deep else cache.check_bytes():
        if progress is not None:
            progress(done, cache.num_rows)
    manifest = cache.manifest
    return VerifySummary(
        rows=manifest.num_rows,
        tokens=manifest.num_tokens,
        counted_tokens=manifest.num_loss_tokens,
        entries=manifest.num_entries,
        bytes=manifest.stored_bytes,
        shards=len(manifest.shards),
    )


def _check_values(cache: Cache) -> Iterator[int]:
    rows, head = 0, cache.head()
    for batch in cache.iter_record_batches():
        here = range(rows, rows + len(batch))
        problems = [find(batch, here, cache.metadata) for find in (find_repeated_token, find_implausible)]
        if head is not None:
            problems.append(find_entropy_mismatch(batch, here, cache.metadata, head))
        for problem in problems:
            if problem is not None:
                raise CorruptShardError(f"{cache.path}: {problem}: it was written like this. Make the cache again.")
        rows += len(batch)
        yield rows
