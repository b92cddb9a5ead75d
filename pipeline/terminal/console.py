"""Stages, progress, warnings and results: stdout for results, stderr for everything else."""

from __future__ import annotations

import json
import logging as standard_logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from pipeline.terminal.click_options import here_with_flags
from pipeline.terminal.output_encoding import can_print
from pipeline.terminal.tables import duration

# Paths and tokens are printed as they are: "[b]" in one is not markup.
out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
# FORCE_COLOR makes colours in a log, but no terminal whose bars can move.
_live = None if sys.stderr is not None and sys.stderr.isatty() else False
err = Console(soft_wrap=True, highlight=False, markup=False, emoji=False, stderr=True, force_interactive=_live)

LINE_EVERY_S = 30.0
BAR_WIDTH = 24


@contextmanager
def _log_may_fail() -> Iterator[None]:
    """A log on a full disk does not end a run of days. A closed pipe does: its reader wants no more."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError:
        pass


class Status:
    """Stages and progress on stderr: a live bar in a terminal, a line every 30 seconds in a log. Texts that name
    options name the flags of the running command instead."""

    def __init__(self) -> None:
        self.silent = int(os.environ.get("RANK", "0")) != 0  # under torchrun, the first process reports
        self.progress: Progress | None = None
        self.task: Any = None
        self.pace: _Pace | None = None
        self.began = time.monotonic()
        self.last_line = 0.0

    def __enter__(self) -> Status:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @_log_may_fail()
    def stage(self, text: str) -> None:
        self._stop()
        self.began = time.monotonic()
        if not self.silent:
            err.print(Text(here_with_flags(text), style="bold"), "…")

    @_log_may_fail()
    def warn(self, text: str) -> None:
        if not self.silent:
            err.print(Text("warning:", style="yellow"), here_with_flags(text))

    @_log_may_fail()
    def line(self, text: str) -> None:
        if not self.silent:
            err.print(here_with_flags(text))

    @_log_may_fail()
    def step(
        self,
        done: float,
        total: float,
        unit: str,
        *,
        facts: Sequence[str] = (),
        rate: str | None = None,
        seconds_left: float | None = None,
    ) -> None:
        """Shows how far a stage is, how fast it advances, and the time that it still needs.

        Args:
            unit: what is counted, such as "rows" or "rows checked".
            facts: what else to show.
            rate, seconds_left: where the caller knows better than a mean over the steps.
        """
        if self.silent:
            return
        if self.pace is not None and done < self.pace.last:  # a new stage began without a call of `stage`
            self._stop()
            self.began = time.monotonic()
        if self.pace is None:
            self.pace = _Pace(done, self.began)
        text = self.pace.describe(done, total, unit, rate, seconds_left)
        text = " · ".join((text, *facts))
        if not err.is_interactive:
            now = time.monotonic()
            if now - self.last_line >= LINE_EVERY_S or done >= total:
                self.last_line = now
                err.print(f"{done:,.0f}/{total:,.0f} {text}")
            return
        if self.progress is None:
            columns = (
                BarColumn(bar_width=BAR_WIDTH),
                MofNCompleteColumn(),
                TextColumn("{task.description}", markup=False),
            )
            self.progress = Progress(*columns, console=err, transient=False)
            self.task = self.progress.add_task("", total=total)
            self.progress.start()
        # rich would make room for a long text by leaving out the bar.
        room = err.width - BAR_WIDTH - 2 * len(f"{total:.0f}") - len(" / ")
        shown = Text(text)
        shown.truncate(max(room, 1), overflow="ellipsis")
        self.progress.update(self.task, completed=done, total=total, description=shown.plain)

    @_log_may_fail()
    def _stop(self) -> None:
        self.pace = None
        progress, self.progress = self.progress, None
        if progress is not None:
            progress.stop()


class _Pace:
    """The time of a stage, and its mean speed since its first step: a resumed run begins with many."""

    def __init__(self, done: float, began: float) -> None:
        self.began, self.first_step = began, time.monotonic()
        self.first, self.last = done, done

    def describe(self, done: float, total: float, unit: str, rate: str | None, seconds_left: float | None) -> str:
        """As in: rows · 2:05 left · 4.2 rows/s."""
        self.last = done
        now = time.monotonic()
        speed = (done - self.first) / (now - self.first_step) if now > self.first_step else 0.0
        if rate is None and speed > 0:
            rate = f"{speed:,.0f} {unit.split()[0]}/s" if speed >= 100 else f"{speed:.2g} {unit.split()[0]}/s"
        if seconds_left is None and speed > 0:
            seconds_left = (total - done) / speed
        time_text: str | None
        if done >= total:
            time_text = f"{duration(now - self.began)} in all"
        else:
            time_text = None if seconds_left is None else f"{duration(seconds_left)} left"
        return " · ".join(part for part in (unit, time_text, rate) if part is not None)


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
