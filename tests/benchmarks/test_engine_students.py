"""The benchmark of students from both engines, complete, with tiny models and transformers in vLLM's place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import cache_format as cf
import distill
from benchmarks import engine_students
from pipeline.teacher.targets.rules import TargetRule
from runs import build_cache


@pytest.mark.long
def test_students_of_a_seed_are_compared_and_nothing_is_repeated(
    teacher_dir: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo, work = tmp_path / "demo", tmp_path / "work"
    (demo / "caches").mkdir(parents=True)
    (demo / "teacher").symlink_to(teacher_dir)
    for name in ("train", "heldout"):
        build_cache(demo / "caches" / name, teacher_dir, chat_file, targets=TargetRule(), packing=False)
    monkeypatch.setattr(engine_students, "ENGINES", ("transformers", "auto"))
    result = engine_students.run(demo, work, seeds=2, layers=1)

    train, own = cf.open_cache(demo / "caches/train"), cf.open_cache(work / "caches/transformers")
    for row, other in zip(train.iter_rows(), own.iter_rows(), strict=True):
        np.testing.assert_array_equal(row.input_ids, other.input_ids)
        np.testing.assert_array_equal(row.loss_mask, other.loss_mask)
    students, targets = result.tables
    assert [row[0] for row in students.rows] == ["transformers", "auto", engine_students.DIFFERENCE]
    first, second, difference = (row[1:] for row in students.rows)
    assert first == second and difference[:3] == ["0.0000 ± 0.0000", "0.0000 ± 0.0000", "0.00 ± 0.00"]
    assert len(set(first[3].split(", "))) == 2  # the seeds differ
    assert targets.rows == [[train.num_loss_tokens, "100.00%", "100.00%"]]

    monkeypatch.setattr(distill, "train_student", None)
    monkeypatch.setattr(distill, "evaluate", None)
    assert engine_students.run(demo, work, seeds=2, layers=1).tables == result.tables
