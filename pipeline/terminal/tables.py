"""Pieces of tables and numbers for people, as rich renderables."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
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


def size_per_token(count: float, tokens: int, head: int = 0) -> str:
    """Bytes of a cache, in all and per token. The teacher's `head`, stored once, is left out of those per token."""
    if not head:
        return f"{size(count)}, {count / tokens:.1f} bytes per token"
    return f"{size(count)}: {size(head)} for the head, and {(count - head) / tokens:.1f} bytes per token"


def duration(seconds: float) -> str:
    """2:05 or 1:02:05; — if unknown."""
    if not math.isfinite(seconds):
        return "—"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Unbroken:
    """A table that fits the terminal, unless that would break a word: names and paths stay whole, and can be copied."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unlimited = options.update(max_width=sys.maxsize)
        for column in self.table.columns:
            if column.no_wrap:  # rich takes the longest word for its least width
                cells = (column.header, *column.cells)
                column.min_width = max(Measurement.get(console, unlimited, cell).maximum for cell in cells)
        needed = Measurement.get(console, unlimited, self.table).minimum
        self.table.width = needed if needed > options.max_width else None
        yield self.table


def titled(title: str, table: Table) -> RenderableType:
    """A title of its own line. A table's own would be folded to its width, and paths are long."""
    return Group(Text(title, style="italic"), Unbroken(table))


def pairs(title: str, rows: Sequence[tuple[str, str]]) -> RenderableType:
    """A two-column table of names and values."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    return titled(title, table)
