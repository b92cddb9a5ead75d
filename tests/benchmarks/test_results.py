"""Every benchmark can be imported, and its words are those of its file in benchmarks/results."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import measure, teacher
from benchmarks.__main__ import NAMES, RESULTS

NOT_TRIED = {"fused_loss", "loader", "reading", "scaling", "engines", "servers", "server_rounding"}  # minutes, or vLLM
NOT_TRIED |= {"compiled_kernels"}  # in a process without Triton's interpreter: tests/models/devices


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_has_a_run_and_a_result(name: str) -> None:
    assert callable(importlib.import_module(f"benchmarks.{name}").run)
    assert stored(name)["benchmark"] == name


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(set(NAMES) - NOT_TRIED))
def test_titles_and_columns_are_those_of_the_result(
    name: str, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "WORK", tmp_path / "work")
    settings = measure.Settings(quick=True, repetitions=2, teacher=teacher_dir)
    result = importlib.import_module(f"benchmarks.{name}").run(settings)
    measure.write(result, tmp_path, "python -m benchmarks")
    found = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert words(found) == words(stored(name))


def stored(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def words(result: dict[str, Any]) -> list[str]:
    """Question, bound, settings, titles and columns, with every number replaced by 0."""
    found = [result["question"], result["bound"], *result["settings"]]
    for title, rows in result["tables"].items():
        found += [title, *rows[0]]
    return [re.sub(r"\d[\d,]*", "0", text) for text in found]
