"""Pieces of tables and numbers for people, as rich renderables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

BARS = " ▏▎▍▌▋▊▉█"


def bar(share: float, width: int = 16) -> str:
    """A bar of `share` (0 to 1) of `width` characters, to an eighth of one."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (BARS[part] if part else "")).ljust(width)


def size(count: float) -> str:
    """Bytes for people: 1.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def duration(seconds: float) -> str:
    """2:05 or 1:02:05; — if unknown."""
    if not math.isfinite(seconds):
        return "—"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def titled(title: str, table: Table) -> RenderableType:
    """A title of its own line. A table's own would be folded to its width, and paths are long."""
    return Group(Text(title, style="italic"), table)


def pairs(title: str, rows: Sequence[tuple[str, str]]) -> RenderableType:
    """A two-column table of names and values."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    return titled(title, table)
