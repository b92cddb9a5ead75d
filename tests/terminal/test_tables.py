"""Tables: 80 columns if they fit, and names and paths in one piece."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from pipeline.terminal.evaluation_view import evaluation_view
from pipeline.terminal.tables import pairs

LONG = "models/" + "a-rather-long-name-" * 6
TASK = "leaderboard_math_counting_and_probability_hard"
METRICS = ("kl", "ce", "perplexity", "agreement", "top5_agreement", "ece", "ece_teacher", "acceptance", "tokens_8")


def lines(view: RenderableType) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=80, soft_wrap=True, highlight=False, markup=False).print(view)
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def student(task: str) -> dict[str, Any]:
    value = {"value": 10.12345, "error": 0.0123}
    return {"metrics": dict.fromkeys(METRICS, value), "tasks": {f"{task} exact_match": value}, "tokens": 123_456_789}


def test_prose_is_wrapped_and_a_long_name_is_not_broken():
    wrapped = lines(pairs("title", [("targets", "threshold, " * 20)]))
    assert max(map(len, wrapped)) <= 80 and len(wrapped) > 3
    assert any(line.endswith(LONG) for line in lines(pairs("title", [("teacher", LONG), ("rows", "3")])))


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_students_side_by_side_fit_80_columns(count: int):
    names = {f"students/{i}": student("arc_easy") for i in range(count)}
    assert max(map(len, lines(evaluation_view("Held out", names)))) <= 80


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_names_of_students_and_tasks_are_not_broken(count: int):
    names = {f"{LONG}{i}": student(TASK) for i in range(count)}
    shown = lines(evaluation_view("Held out", names, teacher_tasks=student(TASK)["tasks"]))
    assert sum(line.endswith(name) for name in names for line in shown) == count
    assert any(line.lstrip().startswith(TASK) for line in shown) and not any("…" in line for line in shown)
