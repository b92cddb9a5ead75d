"""The inputs of a run must not lie in its output, where they would be replaced or deleted.

Every run that fills a directory checks this before anything is changed. Only URLs and local paths that exist are
compared: names of models and datasets on the hub are skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cache_format.storage.directory import inside
from pipeline.errors import ConfigError
from pipeline.models.paths import adapter_base


def check_inputs_apart(output: str, inputs: Mapping[str, Any]) -> None:
    """Check that no input is the output directory or lies in it, also through links.

    Args:
        inputs: option -> a path, several of them, or an object, which is skipped.

    Raises:
        ConfigError: naming the option and the path.
    """
    for option, value in inputs.items():
        for path in value if isinstance(value, list | tuple) else [value]:
            if isinstance(path, str | os.PathLike) and any(inside(each, output) for each in _places(os.fspath(path))):
                raise ConfigError(
                    f"`output` {output}: found `{option}` {os.fspath(path)} in it, which this run would replace: "
                    "nothing was changed. Choose another directory."
                )


def _places(path: str) -> Iterator[str | Path]:
    """Where an input is: its own place, that of a link to it, the files that links in it lead to, an adapter's base."""
    if "://" in path:
        yield path
        return
    place = Path(path).expanduser()
    if not place.exists():
        return
    yield place
    yield place.parent  # a link in the output would be deleted, although what it leads to is elsewhere
    if place.is_dir():
        yield from (each for each in place.iterdir() if each.is_symlink() and each.is_file())
        base = adapter_base(path)
        if base is not None and Path(base).expanduser().exists():
            yield Path(base).expanduser()
