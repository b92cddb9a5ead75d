"""Files beside the shards: read whole, and compared with the checksum that the manifest records."""

from __future__ import annotations

import hashlib

from cache_format.cache_errors import FormatError
from cache_format.storage.directory import Directory


def read_checked(directory: Directory, name: str, sha256: str) -> bytes:
    """The contents of a file.

    Raises: FormatError if it is missing, or not as it was written; OSError if the disk or the store fails.
    """
    where = directory.path(name)
    try:
        data = directory.read_bytes(name)
    except FileNotFoundError as error:
        raise damaged(where, "no such file") from error
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise damaged(where, f"checksum {found[:8]}…, expected {sha256[:8]}…")
    return data


def damaged(where: str, problem: str) -> FormatError:
    """The error for a file that is not as it was written."""
    return FormatError(
        f"{where}: {problem}: it was changed or damaged after writing. Restore it from a copy, or make the cache again."
    )
