"""The benchmark of on-policy rounds: its prompts, and all of it on tiny teachers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cache_format as cf
import distill
from benchmarks import demo, on_policy, questions
from benchmarks.on_policy_tasks import QUICK, TASKS


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
def test_students_of_a_round_see_as_many_loss_tokens_and_are_trained_and_measured_once(
    name: str, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(demo, "unpacked_teacher", lambda work: teacher_dir)
    task = QUICK[name] if name != "demo" else replace(QUICK[name], student_layers=1)
    trained: dict[Path, dict[str, Any]] = {}
    train, measured, students = distill.train_student, on_policy.measured, []

    def train_student(cache: Any, student: Any, output: Path, **options: Any) -> Any:
        assert output not in trained
        trained[output] = {"cache": cache, **options}
        return train(cache, student, output, **options)

    def interrupted_once(student: Path, *caches: Path) -> dict[str, float]:
        students.append(student.name)
        if len(students) == 3:
            raise KeyboardInterrupt
        return measured(student, *caches)

    monkeypatch.setattr(distill, "train_student", train_student)
    monkeypatch.setattr(on_policy, "measured", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        on_policy.run(task, tmp_path, 1)
    result = on_policy.run(task, tmp_path, 1)
    (table,) = result.tables
    expected = on_policy.STUDENTS if task.mixed else on_policy.STUDENTS[:3]
    assert [row[0] for row in table.rows] == list(expected)
    assert [students.count(student) for student in dict.fromkeys(students)] == [1, 1, 2, 1][: len(expected)]
    assert not (tmp_path / "seed-0/students").exists()

    found = [options for output, options in trained.items() if output != tmp_path / "teacher"]
    assert len(found) == len(expected) and all(options["kd_weight"] == 1.0 for options in found)
    written = {name: cf.open_cache(tmp_path / "seed-0/caches" / name).metadata.corpus for name in ("own", "teachers")}
    assert "writer" in written["own"]["generation"] and "writer" not in written["teachers"]["generation"]
    budget = min(corpus["counted_tokens"] for corpus in written.values()) * task.round_epochs
    learned = (["own"], ["teachers"], ["own", "teachers"])[: len(expected) - 1]
    for options, names in zip(found[1:], learned, strict=True):
        per_loss_token = [written[name]["tokens"] / written[name]["counted_tokens"] for name in names]
        assert options["cache"] == tuple(f"{tmp_path}/seed-0/caches/{name}:1" for name in names)
        assert options["max_tokens"] == pytest.approx(budget * sum(per_loss_token) / len(names), abs=1)
    assert on_policy.run(task, tmp_path, 1).tables == result.tables  # from what is there
