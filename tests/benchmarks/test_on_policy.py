"""The benchmark of on-policy rounds: its prompts, and all of it on tiny teachers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cache_format as cf
import distill
from benchmarks import demo, on_policy, questions
from benchmarks.on_policy_tasks import QUICK, TASKS, Demo


def test_questions_of_the_demo_are_about_other_topics_in_and_out_of_the_round() -> None:
    task = TASKS["demo"]
    asked = {name: [row["messages"][0]["content"] for row in rows] for name, rows in task.prompts().items()}
    assert [len(found) for found in asked.values()] == [task.before, task.round, task.held_out]
    assert set().union(*asked.values()) == {q for held_out in (0, 1) for q in questions.questions(held_out=held_out)}
    form = questions.FORMS[0]
    topics = [{topic for topic in questions.TOPICS if form.format(topic) in found} for found in asked.values()]
    assert sum(map(len, topics)) == len(questions.TOPICS) == len(set().union(*topics))


@pytest.mark.long
@pytest.mark.parametrize("name", TASKS)
def test_students_of_a_round_see_as_many_loss_tokens_and_are_measured(
    name: str, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(demo, "unpacked_teacher", lambda work: teacher_dir)
    trained: list[dict[str, Any]] = []
    train = distill.train_student

    def train_student(cache: Any, student: Any, output: Any, **options: Any) -> Any:
        summary = train(cache, student, output, **options)
        trained.append({"cache": cache, "output": output, **options})
        return summary

    monkeypatch.setattr(distill, "train_student", train_student)
    task = QUICK[name]
    if isinstance(task, Demo):
        task = replace(task, teacher_layers=2, student_layers=1)
    result = on_policy.run(task, tmp_path, 1)
    (table,) = result.tables
    assert [row[0] for row in table.rows] == list(on_policy.STUDENTS)
    students = [each for each in trained if each["output"] != tmp_path / "teacher"]
    assert len(students) == 4 and all(each["kd_weight"] == 1.0 for each in students)
    written = {name: cf.open_cache(tmp_path / "seed-0/caches" / name).metadata.corpus for name in ("own", "teachers")}
    assert "writer" in written["own"]["generation"] and "writer" not in written["teachers"]["generation"]
    budget = min(corpus["counted_tokens"] for corpus in written.values()) * task.round_epochs
    for each, names in zip(students[1:], (["own"], ["teachers"], ["own", "teachers"]), strict=True):
        per_loss_token = [written[name]["tokens"] / written[name]["counted_tokens"] for name in names]
        assert each["max_tokens"] == pytest.approx(budget * sum(per_loss_token) / len(names), abs=1)
    trained.clear()
    assert on_policy.run(task, tmp_path, 1).tables == result.tables and trained == []  # from what is there


@pytest.mark.long
def test_a_round_goes_on_after_the_last_measured_student(
    teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "unpacked_teacher", lambda work: teacher_dir)
    task = replace(QUICK["demo"], student_layers=1)
    measured, calls = on_policy.measured, []

    def interrupted(student: Path, *caches: Path) -> dict[str, float]:
        calls.append(student.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measured(student, *caches)

    monkeypatch.setattr(on_policy, "measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        on_policy.run(task, tmp_path, 1)
    on_policy.run(task, tmp_path, 1)
    assert [calls.count(name) for name in dict.fromkeys(calls)] == [1, 1, 2, 1]
    assert not (tmp_path / "seed-0/students").exists()
