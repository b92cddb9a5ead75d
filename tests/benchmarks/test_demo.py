"""The demo on a tiny teacher, what it prints, and the numbers that it writes."""

from __future__ import annotations

import io
import json
import webbrowser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from benchmarks import demo, questions
from benchmarks.greedy import side_by_side


def test_held_out_questions_are_about_other_topics(tmp_path: Path) -> None:
    topics = {
        held_out: {
            topic
            for topic in questions.TOPICS
            if set(questions.questions(held_out=held_out)) & {form.format(topic) for form in questions.FORMS}
        }
        for held_out in (False, True)
    }
    assert topics[False] | topics[True] == set(questions.TOPICS) and not topics[False] & topics[True]
    asked = questions.questions(held_out=True)
    questions.write_questions(tmp_path / "asked.jsonl", held_out=True)
    lines = (tmp_path / "asked.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["messages"][-1]["content"] for line in lines] == asked
    assert len(asked) == len(set(asked)) > max(demo.SHOWN)


def test_answers_stand_beside_one_another_in_eighty_columns() -> None:
    answers = {
        "teacher": ["The moon is [bold]round[/bold]\nand bright. " * 3],
        "labels": ["x" * 100],
        "distilled": ["It shines at night."],
    }
    console = Console(width=80, record=True, file=io.StringIO())
    for table in side_by_side(["What is the moon? Answer in two sentences."], answers):
        console.print(table)
    printed = console.export_text()
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    assert "What is the moon?" in lines[0] and [line.split() for line in lines if "labels" in line] == [list(answers)]
    assert "[bold]round[/bold]" in printed and "It shines at night." in printed
    assert printed.count("x") == 100  # folded, not cut


@pytest.mark.parametrize(("terminal", "display", "shown"), [(True, ":0", 1), (False, ":0", 0), (True, "", 0)])
def test_the_report_is_shown_only_to_a_person_at_the_machine(
    terminal: bool, display: str, shown: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(demo.sys, "platform", "linux")
    monkeypatch.setattr(demo.sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    demo.open_page(tmp_path / "report.html")
    assert opened == [(tmp_path / "report.html").as_uri()] * shown


def test_the_table_has_medians_over_the_seeds(tmp_path: Path) -> None:
    def evaluated(kl: float) -> dict[str, Any]:
        values = dict.fromkeys(demo.METRICS, 1.0) | {"kl": kl}
        return {"tokens": 100, "metrics": {name: {"value": value} for name, value in values.items()}}

    compared = {"labels": [Path("a"), Path("b"), Path("c")], "teacher": [Path("t")]}
    found = {"a": evaluated(0.5), "b": evaluated(0.9), "c": evaluated(0.6), "t": evaluated(0.0)}
    demo.write_result(found, compared, tmp_path)
    result = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    (rows,) = result["tables"].values()
    assert [(row[""], row["KL"], row["KL of each seed"]) for row in rows] == [
        ("labels", 0.6, "0.500, 0.900, 0.600"),
        ("teacher", 0.0, "0.000"),
    ]
    assert result["settings"]["seeds"] == 3


@pytest.mark.long
def test_the_whole_demo_runs_and_repeats_nothing(
    teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[list[str]]
) -> None:
    monkeypatch.setattr(demo, "unpacked_teacher", lambda work: teacher_dir)
    monkeypatch.setattr(demo, "STUDENT_LAYERS", 1)
    monkeypatch.setattr(demo, "SHOWN", (0, 1))
    monkeypatch.setattr(demo, "SHOWN_TOKENS", 4)
    monkeypatch.setattr(demo, "WRITE", ["--generate", "--gen-max-new-tokens", "8"])
    monkeypatch.setattr(questions, "TOPICS", questions.TOPICS[:9])
    options = ["--output", str(tmp_path / "out"), "--seeds", "2", "--results", str(tmp_path / "results")]
    first = CliRunner().invoke(demo.demo, options, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    assert [line[0] for line in lines].count("train-student") == 4
    assert (tmp_path / "out/report.html").exists() and "What is the moon?" in first.output
    (rows,) = json.loads((tmp_path / "results/demo.json").read_text(encoding="utf-8"))["tables"].values()
    assert [row[""] for row in rows] == ["untrained", "labels", "distilled", "teacher"]
    assert rows[-1]["KL"] < min(row["KL"] for row in rows[:-1]) and rows[-1]["agreement"] > 0.9

    lines.clear()
    assert CliRunner().invoke(demo.demo, options, catch_exceptions=False).exit_code == 0
    assert "train-student" not in [line[0] for line in lines]
