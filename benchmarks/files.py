"""Files of a work directory, which several processes may share, and any of them may be killed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(file: Path, text: str) -> None:
    """By renaming: what another process opens, or what a killed one leaves, is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def write_json(file: Path, data: Any) -> None:
    write_text(file, json.dumps(data, indent=1) + "\n")
