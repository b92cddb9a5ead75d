"""Progress on stderr: time left and rate, from one mechanism, in a terminal and in a log."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from pipeline.terminal import console
from pipeline.terminal.console import Status
from runs import build_cache
from runs import command as run

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture()
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(console, "time", found)
    return found


def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=stream, soft_wrap=True, highlight=False, force_interactive=False))
    return stream


def test_a_log_has_a_line_every_thirty_seconds_with_time_left_and_rate(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    stream = log(monkeypatch)
    with Status() as status:
        for done in range(0, 101, 10):
            status.step(done, 100, "rows checked")
            clock.now += 10
    assert stream.getvalue().splitlines() == [
        "0/100 rows checked",
        "30/100 rows checked · 1:10 left · 1 rows/s",
        "60/100 rows checked · 0:40 left · 1 rows/s",
        "90/100 rows checked · 0:10 left · 1 rows/s",
        "100/100 rows checked · 1:40 in all · 1 rows/s",
    ]


def test_what_the_caller_knows_better_wins_and_facts_follow(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    stream = log(monkeypatch)
    with Status() as status:
        status.step(5, 10, "steps", rate="480 tokens/s", seconds_left=125, facts=["loss 2.5", "KL 1.0"])
    assert stream.getvalue() == "5/10 steps · 2:05 left · 480 tokens/s · loss 2.5 · KL 1.0\n"


def test_a_resumed_run_is_timed_from_where_it_began(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    stream = log(monkeypatch)
    with Status() as status:
        status.step(900, 1000, "steps")
        clock.now += 40
        status.step(920, 1000, "steps")
    assert stream.getvalue().splitlines()[-1] == "920/1,000 steps · 2:40 left · 0.5 steps/s"


def test_the_time_of_a_stage_includes_its_first_step(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    stream = log(monkeypatch)
    with Status() as status:
        clock.now += 100
        status.stage("caching")
        clock.now += 37
        status.step(6, 6, "rows", rate="136 tokens/s", seconds_left=0)
    assert stream.getvalue().splitlines()[-1] == "6/6 rows · 0:37 in all · 136 tokens/s"


def test_each_stage_is_timed_by_itself(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    stream = log(monkeypatch)
    with Status() as status:
        for _ in range(2):  # two students, say, without a line between them
            status.step(1, 3, "rows")
            clock.now += 60
            status.step(3, 3, "rows")
            clock.now += 1000
    assert [line for line in stream.getvalue().splitlines() if "in all" in line] == [
        "3/3 rows · 1:00 in all · 0.033 rows/s"
    ] * 2


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch):
    stream = io.StringIO()
    live = Console(file=stream, force_terminal=True, soft_wrap=True, width=80)
    monkeypatch.setattr(console, "err", live)
    with Status() as status:
        status.step(1, 4, "rows", rate="7 tokens/s", seconds_left=61, facts=["exact mass 0.9"] * 9)
    text = stream.getvalue()
    last = text.rpartition("\r")[2]
    assert "━" in last and "1/4" in last and "rows · 1:01 left · 7 tokens/s · exact mass 0.9" in last
    assert len(Text.from_ansi(last.removesuffix("\x1b[?25h")).plain.rstrip()) <= 80


@pytest.mark.parametrize("name, value", [("FORCE_COLOR", "1"), ("TERM", "dumb"), ("NO_COLOR", "1")])
def test_a_log_never_has_a_live_bar(name: str, value: str):
    code = "from pipeline.terminal.console import Status, err\nwith Status() as s: s.stage('a'); s.step(1, 1, 'rows')"
    environment = {**os.environ, name: value}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert lines[-1] == "1/1 rows · 0:00 in all" and len(lines) == 2 and "\x1b[?25l" not in done.stderr
    assert ("\x1b[" in lines[0]) == (name == "FORCE_COLOR")


@pytest.mark.parametrize("name", ["stats", "verify", "merge"])
def test_commands_that_read_a_whole_cache_show_how_far_they_are(
    name: str, tmp_path: Path, teacher_dir: Path, text_file: Path
):
    cache = build_cache(tmp_path / "cache", teacher_dir, text_file, rows_per_shard=8)
    unit = {"stats": "rows", "verify": "rows checked", "merge": "shards checked"}[name]
    lines = run(name, cache).stderr.splitlines()
    done, _, total = lines[-1].partition(f" {unit} ")[0].partition("/")
    assert done == total and int(done) > 1 and " in all" in lines[-1]


class Full(io.StringIO):
    """A log on a full disk, or one that nobody reads any more."""

    def __init__(self, error: int) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise OSError(self.error, os.strerror(self.error))


@pytest.mark.parametrize("live", [False, True])
def test_log_on_a_full_disk_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch, live: bool):
    monkeypatch.setattr(console, "err", Console(file=Full(errno.ENOSPC), force_terminal=live, force_interactive=live))
    with Status() as status:
        status.stage("training")
        status.warn("a warning")
        status.line("a line")
        for step in range(3):
            status.step(step, 2, "steps")


def test_log_that_nobody_reads_ends_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(console, "err", Console(file=Full(errno.EPIPE)))
    with pytest.raises((BrokenPipeError, SystemExit)), Status() as status:
        status.line("a line")


def test_json_with_stdout_closed(monkeypatch: pytest.MonkeyPatch):
    """As in `distill stats … --json >&-`."""
    monkeypatch.setattr(sys, "stdout", None)
    for file in ("-", None):
        console.show_result(lambda: "a table", lambda: {"rows": 1}, file)
