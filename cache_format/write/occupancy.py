"""State of an output directory: empty, an unfinished cache, a finished cache, or something else.

Commands check it before they load anything, and the writer checks it again. Only a cache that nobody is writing can be
deleted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from cache_format.cache_errors import CacheError, MismatchError
from cache_format.manifest.answers_file import ANSWERS
from cache_format.manifest.differences import Difference, listed
from cache_format.manifest.documents_file import DOCUMENTS
from cache_format.manifest.manifest import LEXICON, MANIFEST, PARTIAL_MANIFEST, TOKENIZER_DIR, Manifest, metadata_of
from cache_format.manifest.metadata import CacheMetadata
from cache_format.manifest.stored_head import HEAD
from cache_format.storage.claims import CLAIMS, STALE_AFTER_S, WHOLE, Claims, refused
from cache_format.storage.directory import Directory, is_temporary, open_directory
from cache_format.storage.remote import check_can_be_written
from cache_format.wording import quantity

FOLDERS = ("shards", TOKENIZER_DIR)
BESIDE = (LEXICON, HEAD, ANSWERS, DOCUMENTS, "README.md", "distill_config.json")
OWN_NAMES = {MANIFEST, PARTIAL_MANIFEST, *BESIDE, *FOLDERS, CLAIMS}


def recorded_manifest(directory: Directory) -> str | None:
    """Name of the manifest in the directory, finished or partial; None for an empty directory.

    Raises: CacheError if the directory holds files that are not part of a cache, or cannot be written.
    """
    where = directory.path()
    check_can_be_written(where)
    found = {name for name in directory.names() if not is_temporary(name)}
    if foreign := sorted(found - OWN_NAMES):
        raise CacheError(
            f"{where}: found {foreign[0]!r}, expected an empty directory or a cache: nothing was "
            "changed. Choose another directory."
        )
    recorded = next((name for name in (MANIFEST, PARTIAL_MANIFEST) if name in found), None)
    found -= {folder for folder in FOLDERS if not directory.names(folder)}
    found -= {CLAIMS}  # a writer creates it before it records anything
    if found and not recorded:
        raise CacheError(
            f"{where}: found {sorted(found)[0]!r} but no manifest: nothing was changed. Choose another directory."
        )
    return recorded


def check_writable(
    path: str | os.PathLike[str],
    *,
    replace: bool = False,
    shared: bool = False,
    stale_after_s: float = STALE_AFTER_S,
) -> None:
    """Raises CacheError unless a cache can be begun, continued or repaired at `path`.

    Args:
        replace: an existing cache will be removed later by the caller.
        shared: for one of several writers; other shared writers and a finished cache are then accepted.
        stale_after_s: seconds of silence after which a writer on another machine counts as gone.
    """
    directory = open_directory(path)
    recorded_manifest(directory)
    claims = Claims(directory, stale_after_s)
    for holder in claims.others():
        if holder.name == WHOLE or not shared:
            raise refused(directory, holder, claims.stale_after_s)
    if not replace and not shared and (manifest := finished_manifest(path)) is not None:
        raise finished_already(path, manifest)


def finished_manifest(path: str | os.PathLike[str]) -> Manifest | None:
    """The manifest of the finished cache at `path`; None if there is none, or shards are missing."""
    directory = open_directory(path)
    if recorded_manifest(directory) != MANIFEST:
        return None
    manifest = Manifest.from_bytes(directory.read_bytes(MANIFEST), directory.path(MANIFEST))
    shards = {f"shards/{name}" for name in directory.names("shards")}
    return manifest if all(shard.name in shards for shard in manifest.shards) else None


def recorded_metadata(path: str | os.PathLike[str]) -> CacheMetadata | None:
    """The metadata of the cache at `path`, finished or not; None if there is none.

    Raises: CacheError if the directory holds something else; FormatError.
    """
    directory = open_directory(path)
    if recorded_manifest(directory) is None:
        return None
    for name in (PARTIAL_MANIFEST, MANIFEST):  # in this order: finishing a cache replaces the first with the second
        try:
            data = directory.read_bytes(name)
        except FileNotFoundError:
            continue
        return metadata_of(data, directory.path(name))
    return None


def finished_already(path: str | os.PathLike[str], manifest: Manifest, found: Sequence[Difference] = ()) -> CacheError:
    """The error of a writer that finds a finished cache where it should write.

    Args:
        found: how the settings that it was made with differ; a MismatchError then.
    """
    because = f" made with other settings ({listed(found)})" if found else ""
    return (MismatchError if found else CacheError)(
        f"{open_directory(path).path()}: found a finished cache ({quantity(manifest.num_rows, 'row')}){because}, "
        "nothing was changed. Choose another directory, or replace it with `overwrite=True`."
    )


def remove_cache(path: str | os.PathLike[str], *, stale_after_s: float = STALE_AFTER_S) -> None:
    """Delete the cache at `path`, finished or not. Does nothing if there is none.

    Args:
        stale_after_s: as in `check_writable`.

    Raises: CacheError if the directory holds something else, or somebody is writing it.
    """
    directory = open_directory(path)
    if recorded_manifest(directory) is None:
        return
    claims = Claims(directory, stale_after_s)
    try:
        claim_alone(directory, claims)
        if (recorded := recorded_manifest(directory)) is None:
            return
        # If killed midway, this leaves an unfinished cache, which can be removed again.
        if recorded == MANIFEST:
            directory.create_new(PARTIAL_MANIFEST, directory.read_bytes(MANIFEST))
            directory.remove(MANIFEST)
        for folder in FOLDERS:
            directory.remove_tree(folder)
        claims.sweep()
        for name in directory.names():
            if name not in (PARTIAL_MANIFEST, CLAIMS):
                directory.remove(name)
        directory.remove(PARTIAL_MANIFEST)
    finally:
        claims.close()


def claim_alone(directory: Directory, claims: Claims) -> None:
    """Claim the whole cache. Raises: CacheError if anybody else has a claim on it or on one of its shards."""
    if (holder := claims.take(WHOLE)) is not None:
        raise refused(directory, holder, claims.stale_after_s)
    if others := claims.others():
        claims.release(WHOLE)
        raise refused(directory, others[0], claims.stale_after_s)
