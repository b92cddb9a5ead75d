"""The benchmark of on-policy rounds, complete, with tiny sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import cache_format as cf
import distill
from benchmarks import on_policy


@pytest.mark.long
def test_students_of_a_round_see_as_many_loss_tokens_and_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("reasoning_gym")
    trained: list[dict[str, Any]] = []
    train = distill.train_student

    def train_student(cache: Any, student: Any, output: Any, **options: Any) -> Any:
        summary = train(cache, student, output, **options)
        trained.append({"cache": cache, **options})
        return summary

    monkeypatch.setattr(distill, "train_student", train_student)
    result = on_policy.run(tmp_path, 1, on_policy.QUICK)
    (table,) = result.tables
    names = [on_policy.BEFORE, on_policy.OWN, on_policy.TEACHERS, on_policy.MIXED]
    assert [row[0] for row in table.rows] == names
    assert len(trained) == 5 and all(each["kd_weight"] == 1.0 for each in trained[1:])
    written = {name: cf.open_cache(tmp_path / "seed-0/caches" / name).metadata.corpus for name in ("own", "teachers")}
    assert "writer" in written["own"]["generation"] and "writer" not in written["teachers"]["generation"]
    budget = min(corpus["counted_tokens"] for corpus in written.values()) * on_policy.QUICK.round_epochs
    for each, names in zip(trained[2:], (["own"], ["teachers"], ["own", "teachers"]), strict=True):
        per_loss_token = [written[name]["tokens"] / written[name]["counted_tokens"] for name in names]
        assert each["max_tokens"] == pytest.approx(budget * sum(per_loss_token) / len(names), abs=1)
    trained.clear()
    assert on_policy.run(tmp_path, 1, on_policy.QUICK).tables == result.tables and trained == []  # from what is there
