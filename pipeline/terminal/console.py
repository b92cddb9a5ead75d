"""Stages, progress, warnings and results: stdout for results, stderr for everything else."""

from __future__ import annotations

import json
import logging as standard_logging
import os
import time
from collections.abc import Callable
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from pipeline.terminal.output_encoding import can_print

# Paths and tokens are printed as they are: "[b]" in one is not markup.
out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
err = Console(soft_wrap=True, highlight=False, markup=False, emoji=False, stderr=True)

LINE_EVERY_S = 30.0


class Status:
    """Stages and progress on stderr: a live bar in a terminal, a line every 30 seconds in a log.

    Args:
        translate: applied to every text, such as from option names to flags.
    """

    def __init__(self, translate: Callable[[str], str] = str) -> None:
        self.silent = int(os.environ.get("RANK", "0")) != 0  # under torchrun, the first process reports
        self.translate = translate
        self.progress: Progress | None = None
        self.task: Any = None
        self.last_line = 0.0

    def __enter__(self) -> Status:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def stage(self, text: str) -> None:
        self._stop()
        if not self.silent:
            err.print(Text(self.translate(text), style="bold"), "…")

    def warn(self, text: str) -> None:
        if not self.silent:
            err.print(Text("warning:", style="yellow"), self.translate(text))

    def line(self, text: str) -> None:
        if not self.silent:
            err.print(self.translate(text))

    def step(self, done: float, total: float, text: str = "") -> None:
        """Args: text: facts next to the bar."""
        if self.silent:
            return
        if not err.is_terminal and text:
            now = time.monotonic()
            if now - self.last_line >= LINE_EVERY_S or done >= total:
                self.last_line = now
                err.print(f"{done:,.0f}/{total:,.0f} {text}")
        if not err.is_terminal:
            return
        if self.progress is None:
            columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
            self.progress = Progress(*columns, console=err, transient=False)
            self.task = self.progress.add_task("", total=total)
            self.progress.start()
        self.progress.update(self.task, completed=done, total=total, description=text)

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def show_result(view: Callable[[], Any], data: Callable[[], Any], json_file: str | None) -> None:
    """Prints the view of a result, or its JSON for `--json`; with `--json FILE` both, the JSON into the file."""
    if json_file != "-":
        out.print(view())
    if json_file is not None:
        text = json.dumps(data(), indent=2, ensure_ascii=False)
        if json_file == "-":
            click.echo(text if can_print(text) else json.dumps(data(), indent=2))
        else:
            with open(json_file, "w", encoding="utf-8") as stream:
                stream.write(text + "\n")


def quiet_libraries() -> None:
    """Turns off progress bars and advice of transformers and lm-eval, which would tear our own output apart."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    standard_logging.getLogger("lm_eval").setLevel(standard_logging.ERROR)
