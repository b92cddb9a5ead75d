"""Checkpoint directories of Trainer, checkpoint-N, known by their names. Standard library only."""

from __future__ import annotations

import re
from pathlib import Path


def checkpoints_of(output: str | Path) -> dict[int, Path]:
    """Step -> its directory, complete or not. Other names, such as a copy checkpoint-4-backup, are the user's own."""
    found = {path: re.fullmatch(r"checkpoint-([0-9]+)", path.name) for path in Path(output).glob("checkpoint-*")}
    return {int(match[1]): path for path, match in found.items() if match is not None and path.is_dir()}
