"""What already lies where a cache is to be written: nothing, an unfinished cache, a finished one, or something else.

Asked before a run loads anything, and again by the writer. Deleting is possible only for what is certainly a cache.
"""

from __future__ import annotations

import os

from cache_format.errors import CacheError
from cache_format.lexicon import LEXICON
from cache_format.manifest import MANIFEST, PARTIAL_MANIFEST, TOKENIZER_DIR, Manifest
from cache_format.storage import Directory, is_temporary, open_directory

FOLDERS = ("shards", TOKENIZER_DIR)
OWN_NAMES = {MANIFEST, PARTIAL_MANIFEST, LEXICON, "README.md", *FOLDERS}


def recorded_manifest(directory: Directory) -> str | None:
    """Name of the manifest that lies there: finished, partial, or None for an empty directory.

    Raises: CacheError if the directory holds anything that is not a cache's.
    """
    where = directory.path()
    found = {name for name in directory.names() if not is_temporary(name)}
    if foreign := sorted(found - OWN_NAMES):
        raise CacheError(
            f"{where}: found {foreign[0]!r}, expected an empty directory or a cache: nothing was "
            "changed. Choose another directory."
        )
    recorded = next((name for name in (MANIFEST, PARTIAL_MANIFEST) if name in found), None)
    found -= {folder for folder in FOLDERS if not directory.names(folder)}
    if found and not recorded:
        raise CacheError(
            f"{where}: found {sorted(found)[0]!r} but no manifest: nothing was changed. Choose another directory."
        )
    return recorded


def check_writable(path: str | os.PathLike[str], *, replace: bool = False) -> None:
    """Raises CacheError unless a cache can be begun, continued or repaired at `path`.

    Args:
        replace: a cache that is there will be removed before; it is left alone until then.
    """
    directory = open_directory(path)
    if recorded_manifest(directory) != MANIFEST or replace:
        return
    manifest = Manifest.from_bytes(directory.read_bytes(MANIFEST), directory.path(MANIFEST))
    shards = {f"shards/{name}" for name in directory.names("shards")}
    if all(shard.name in shards for shard in manifest.shards):
        raise CacheError(
            f"{directory.path()}: found a finished cache ({manifest.num_rows:,} rows), nothing was "
            "changed. Choose another directory, or replace it with --overwrite."
        )


def remove_cache(path: str | os.PathLike[str]) -> None:
    """Delete the cache at `path`, finished or not; nothing happens if there is none.

    Raises: CacheError if there is something else.
    """
    directory = open_directory(path)
    recorded = recorded_manifest(directory)
    if recorded is None:
        return
    # The manifest first: whatever happens next, nobody takes the rest for a whole cache.
    directory.remove(recorded)
    for folder in FOLDERS:
        directory.remove_tree(folder)
    for name in directory.names():
        directory.remove(name)
