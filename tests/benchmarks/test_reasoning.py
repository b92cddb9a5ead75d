"""The demo of generated answers: its problems, and all of it on a tiny teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cache_format as cf
from benchmarks import reasoning
from benchmarks.reasoning import last_number


def test_sums_are_different_and_right() -> None:
    pytest.importorskip("reasoning_gym")
    found = reasoning.sums(600)
    expressions = [expression for expression, _ in found]
    assert len(set(expressions)) == 600
    assert not set(expressions) & {expression for expression, _ in reasoning.EXAMPLES}
    for expression, solution in found:
        assert sum(int(word) for word in expression.split(" + ")) == int(solution)
    for expression, answer in reasoning.EXAMPLES:
        assert last_number(answer) == sum(int(word) for word in expression.split(" + "))
    assert reasoning.sums(8) == found[:8]


@pytest.mark.long
def test_every_student_trains_as_long_and_is_asked(
    teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[list[str]]
) -> None:
    pytest.importorskip("reasoning_gym")
    (tmp_path / "judge.py").write_text("def accept(example, answer):\n    return True\n")
    monkeypatch.setattr(reasoning, "KEEP_IF", f"{tmp_path}/judge.py:accept")  # a tiny teacher cannot calculate
    sizes = reasoning.Sizes(train=4, held_out=3, answers=2, new_tokens=6, layers=1, steps=2)
    result = reasoning.run(teacher_dir, tmp_path, 2, sizes)
    (table,) = result.tables
    assert [row[0] for row in table.rows][-3:] == list(reasoning.METHODS)
    trained = [line for line in lines if line[0] == "train-student"]
    assert len(trained) == 6 and all(line[line.index("--max-steps") + 1] == "2" for line in trained)
    cache = cf.open_cache(tmp_path / "caches/answers")
    asked = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(len(row["teacher_messages"]) == 2 * len(reasoning.EXAMPLES) + 1 for row in asked)
    assert len(cache) == 8 and cf.open_cache(tmp_path / "caches/solutions").num_loss_tokens > 0

    lines.clear()
    assert reasoning.run(teacher_dir, tmp_path, 2, sizes).tables == result.tables  # from what is there
    assert "train-student" not in [line[0] for line in lines]
