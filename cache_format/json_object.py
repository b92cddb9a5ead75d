"""Objects in JSON files that a full disk, a crash or a user may have damaged."""

from __future__ import annotations

import json
from typing import Any

from cache_format.cache_errors import DistillError


def json_object(data: bytes, where: str, *, expected: str, next_step: str, error: type[DistillError]) -> dict[str, Any]:
    """The object in the bytes of a file.

    Args:
        where: the file, for the message.
        expected: what it should hold, such as "the record of a training run".
        next_step: a sentence of what the user can do.

    Raises: `error` if the file is empty, cut off, or holds anything but an object.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as problem:  # JSON or UTF-8
        what = f"not JSON ({problem})" if data.strip() else "the file is empty"
        raise error(f"{where}: {what}, expected {expected}. {next_step}") from problem
    if not isinstance(found, dict):
        raise error(f"{where}: found a {type(found).__name__}, expected {expected}. {next_step}")
    return found
