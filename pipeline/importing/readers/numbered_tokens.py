"""Tokens that a file names by number: 123, "123" or "token_id:123"."""

from __future__ import annotations

from typing import Any

from pipeline.importing.readers.foreign_rows import BadRow
from pipeline.teacher.engines.server.token_names import numbered


def token_of(name: Any, position: int) -> int:
    """The token that is named. Raises: BadRow."""
    if isinstance(name, int) and not isinstance(name, bool):
        return name
    if isinstance(name, str) and (found := numbered(name)) is not None:
        return found
    if isinstance(name, str) and name.isdecimal():
        return int(name)
    raise BadRow(f"position {position}: token {name!r}, expected a number or token_id:NUMBER")
