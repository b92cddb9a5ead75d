"""Checkpoint directories of Trainer: their names, and whether one could not be saved because the disk is full.

Standard library only.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
ALMOST_NOTHING = 1 << 20  # bytes


def checkpoints_of(output: str | Path) -> dict[int, Path]:
    """Step -> its directory, complete or not. Other names, such as a copy checkpoint-4-backup, are the user's own."""
    found = {path: re.fullmatch(r"checkpoint-([0-9]+)", path.name) for path in Path(output).glob("checkpoint-*")}
    return {int(match[1]): path for path, match in found.items() if match is not None and path.is_dir()}


def remove_old_checkpoints(output: str | Path, *, limit: int, kept: set[int]) -> None:
    """Removes the oldest ones until `limit` are left, none of the steps in `kept`.

    Trainer's own rotation takes every directory that begins with checkpoint- for one, and so deletes the user's copies.
    """
    found = checkpoints_of(output)
    for step in sorted(found.keys() - kept)[: max(0, len(found) - limit)]:
        shutil.rmtree(found[step], ignore_errors=True)


def is_disk_full(error: Exception, folder: str | Path) -> bool:
    """Whether an error of saving into `folder` is that of a full disk. Libraries hide its number in a text."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    if any(os.strerror(number) in str(error) for number in FULL):  # safetensors
        return True
    # torch.save does not say why it could not write.
    return "inline_container" in str(error) and shutil.disk_usage(folder).free < ALMOST_NOTHING
