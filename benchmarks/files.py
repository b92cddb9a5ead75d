"""Atomic writes in a work directory that several processes share, any of which may be killed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_text(file: Path, text: str) -> None:
    """Writes to a temporary name and renames it, so that no other process ever sees half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def write_json(file: Path, data: Any) -> None:
    write_text(file, json.dumps(data, indent=1) + "\n")


def write_json_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Returns the file."""
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    return file
