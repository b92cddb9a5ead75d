"""What a run is doing, on a console that the caller gives: a live bar in a terminal, now and then a line in a log."""

from __future__ import annotations

import os
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

LINE_EVERY_S = 30.0


class Status:
    """Stages, warnings and one progress bar at a time; a context manager, so that a bar never outlives an error."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.silent = int(os.environ.get("RANK", "0")) != 0  # under torchrun, the first process speaks
        self.progress: Progress | None = None
        self.task = TaskID(0)
        self.last_line = 0.0

    def __enter__(self) -> Status:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def stage(self, text: str) -> None:
        self._stop()
        if not self.silent:
            self.console.print(Text(text, style="bold"), "…")

    def warn(self, text: str) -> None:
        if not self.silent:
            self.console.print(Text("warning:", style="yellow"), text)

    def line(self, text: str) -> None:
        if not self.silent:
            self.console.print(text)

    def step(self, done: float, total: float, text: str = "") -> None:
        """`text`: facts beside the bar."""
        if self.silent:
            return
        if not self.console.is_terminal and text:
            now = time.monotonic()
            if now - self.last_line >= LINE_EVERY_S or done >= total:
                self.last_line = now
                self.console.print(f"{done:,.0f}/{total:,.0f} {text}")
        if not self.console.is_terminal:
            return
        if self.progress is None:
            columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
            self.progress = Progress(*columns, console=self.console, transient=False)
            self.task = self.progress.add_task("", total=total)
            self.progress.start()
        self.progress.update(self.task, completed=done, total=total, description=text)

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
