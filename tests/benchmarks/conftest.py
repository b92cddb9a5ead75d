"""Benchmarks that call the command line: their commands, run in this process."""

from __future__ import annotations

import pytest

from runs import command


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The words of every command that `demo.distill` has run."""
    from benchmarks import demo

    found: list[list[str]] = []

    def in_this_process(*words: object) -> None:
        found.append([str(word) for word in words])
        command(*words)

    monkeypatch.setattr(demo, "distill", in_this_process)
    return found
