"""What a path given as `data` refers to: checked with the standard library alone, before `datasets` is imported.

What looks like a local path is only looked for locally: a misspelt file name must not become a request to a server.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

from pipeline.errors import DataError
from pipeline.models.paths import looks_local, or_elsewhere

# Each also with .gz behind it.
EXTENSIONS = (".txt", ".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow")

PathLike = str | os.PathLike[str]


def local_paths(data: object) -> list[Path]:
    """The local files and directories that `data` names; none for hub names and objects.

    Raises:
        DataError: no such file or directory, or no file matches the pattern.
    """
    names = data if is_path_list(data) else [data]
    return [path for name in names if isinstance(name, str | os.PathLike) for path in find_local(os.fspath(name)) or ()]


def is_path_list(data: object) -> TypeGuard[Sequence[PathLike]]:
    """Whether `data` is several paths rather than rows."""
    return (
        isinstance(data, list | tuple) and len(data) > 0 and all(isinstance(each, str | os.PathLike) for each in data)
    )


def find_local(data: str) -> list[Path] | None:
    """The file or directory, or the files that match a pattern, in order; None for the name of a dataset on the hub.

    Raises:
        DataError: it looks like a local path and there is nothing, or it is not a path.
    """
    path = Path(data).expanduser()
    try:
        exists = path.exists()
    except OSError as error:  # such as a name that is too long
        raise DataError(
            f"{data[:40]}…: found a string of {len(data):,} characters, expected a path or the name of a dataset "
            f"({error.strerror}). Give a text as rows: [{{'text': '…'}}]."
        ) from error
    if exists:
        return [path]
    if glob.has_magic(data):
        matches = (Path(match) for match in glob.glob(str(path), recursive=True))
        if files := sorted(match for match in matches if match.is_file()):
            return files
        raise DataError(f"{data}: no file matches this pattern. Check it with ls.")
    if _looks_local(data):
        raise DataError(f"{data}: no such file or directory. Check the path{or_elsewhere(data)}.")
    return None


def data_name(data: Any) -> str:
    """The name of `data` to record and to show: its path or paths, or what kind of object it is."""
    if isinstance(data, str | os.PathLike):
        return os.fspath(data)
    if is_path_list(data):
        return ", ".join(os.fspath(each) for each in data[:3]) + (f" and {len(data) - 3} more" if len(data) > 3 else "")
    return f"given {type(data).__name__}"


def extension(path: Path) -> str:
    """The extension in lower case, that before .gz if there is one."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _looks_local(data: str) -> bool:
    """Hub names have no extension of a file either."""
    return looks_local(data) or extension(Path(data)) in EXTENSIONS or data.lower().endswith(".gz")
