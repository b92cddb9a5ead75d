"""Finishes a cache whose shards are all there: after a merge of shards that several machines have written."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cache_format.cache_errors import CacheError
from cache_format.manifest.answers_file import ANSWERS
from cache_format.manifest.documents_file import DOCUMENTS
from cache_format.manifest.manifest import (
    MANIFEST,
    TOKENIZER_DIR,
    Manifest,
    answers_file,
    documents_file,
    partial_contents,
)
from cache_format.manifest.metadata import CacheMetadata
from cache_format.manifest.stored_head import HEAD
from cache_format.storage.claims import STALE_AFTER_S, WHOLE, Claims, refused, wait_for
from cache_format.storage.directory import open_directory
from cache_format.wording import quantity
from cache_format.write.occupancy import recorded_manifest
from cache_format.write.unfinished import ENDING, OnProgress, UnfinishedCache, file_is_there


def finish_cache(
    path: str | os.PathLike[str],
    *,
    stale_after_s: float = STALE_AFTER_S,
    on_progress: OnProgress = lambda done, total: None,
) -> Manifest:
    """Writes the manifest of a cache whose shards are all complete; a finished cache is left as it is.

    The last of several writers does this by itself. Call it when there was no last one, e.g. for shards that were
    written on several machines and then copied together.

    Args:
        stale_after_s: seconds without a sign of life after which a writer on another machine counts as dead.
        on_progress: called with the number of shards that have been looked at, and of all.

    Raises: CacheError if shards or files beside them are missing, or if a process has claimed the whole cache.
    """
    directory = open_directory(path)
    where = directory.path()
    recorded = recorded_manifest(directory)
    if recorded is None:
        raise CacheError(f"{where}: no cache there, finished or not. Give the directory that cache-teacher wrote into.")
    raw = partial_contents(directory.read_bytes(recorded), directory.path(recorded))
    metadata = CacheMetadata.from_json(raw)
    cache = UnfinishedCache(directory, metadata, raw["tokenizer_files"], allow_rounding=False)
    claims = Claims(directory, stale_after_s)
    try:
        if (holder := claims.take(WHOLE)) is not None:
            raise refused(directory, holder, claims.stale_after_s)
        claims.release(WHOLE)  # it only had to be free; others may still write shards
        wait_for(claims, ENDING)
        cache.read(on_progress)
        if not cache.is_complete:
            missing = [index for index in range(metadata.num_shards) if index not in cache.complete]
            raise CacheError(
                f"{where}: {_missing(missing, claims)} Run {metadata.command} again: it writes what is missing."
            )
        for name, digest in raw["tokenizer_files"].items():
            if not file_is_there(directory, f"{TOKENIZER_DIR}/{name}", digest):
                raise CacheError(
                    f"{directory.path(f'{TOKENIZER_DIR}/{name}')}: missing or not the recorded file. Copy it here."
                )
        beside = {HEAD: metadata.head, ANSWERS: answers_file(metadata), DOCUMENTS: documents_file(metadata)}
        for name, file in beside.items():
            if file is not None and not file_is_there(directory, name, file.sha256):
                raise CacheError(f"{directory.path(name)}: missing or not the recorded file. Copy it here.")
        cache.finish(claims)
    finally:
        claims.close()
    return Manifest.from_bytes(directory.read_bytes(MANIFEST), directory.path(MANIFEST))


def _missing(missing: Sequence[int], claims: Claims) -> str:
    named = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
    busy = len([holder for holder in claims.others() if holder.name.startswith("shard-")])
    return f"{quantity(len(missing), 'missing shard')} ({named}), {busy} being written."
