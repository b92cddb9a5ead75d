"""The table of methods: the complete benchmark on a tiny teacher, and how it reads numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import methods
from benchmarks.reasoning import last_number


def test_numbers_are_found_where_they_belong() -> None:
    assert last_number("3 apples and 4 pears: 1,234.5 grams") == 1234.5
    assert last_number("none") is None
    assert methods.first_number(" 288<|im_end|>\n17") == 288
    assert methods.first_number("no 5") is None


@pytest.mark.long
def test_every_method_trains_as_long_and_is_measured(
    teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[list[str]]
) -> None:
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(methods, "METHODS", [m for m in methods.METHODS if m.name in CHOSEN])
    sizes = methods.Sizes(train=4, held_out=2, solve=3, written_tokens=16, new_tokens=4, layers=1, teacher_layers="2")
    result = methods.run(teacher_dir, tmp_path, 1, sizes)

    (table,) = result.tables
    assert [row[0] for row in table.rows] == ["the teacher", *CHOSEN]
    teacher = json.loads((tmp_path / "teacher.json").read_text())
    assert teacher["heldout kl"] < 0.01 and teacher["heldout agreement"] > 0.95
    kl = [float(str(row[1])) for row in table.rows]
    assert all(other > kl[0] for other in kl[1:])
    for line in lines:
        if line[0] == "train-student":
            assert "--max-tokens" in line
    assert not any((tmp_path / "students").iterdir())

    lines.clear()
    assert methods.run(teacher_dir, tmp_path, 1, sizes).tables == result.tables  # from what is there
    assert {line[0] for line in lines} == {"cache-teacher"}


CHOSEN = ("hard labels", "forward KL + hidden states", "sequence level")
