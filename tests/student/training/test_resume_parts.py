"""Runs resumed from checkpoints that lack a part, from a moved output, and with an evaluation at the start."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from runs import SGD, Stop, build_cache, distance, train, weights
from tiny import english


@pytest.fixture(scope="module")
def cache(teacher_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("parts") / "cache", teacher_dir, text_file)


@pytest.fixture(scope="module")
def held_out(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts-held-out")
    (folder / "text.txt").write_text(english(20, seed=5))
    return build_cache(folder / "cache", teacher_dir, folder / "text.txt")


def test_a_checkpoint_without_optimizer_is_not_continued(tmp_path: Path, cache: Path, student_dir: Path) -> None:
    options: dict[str, Any] = {"student": student_dir, "max_steps": 4, "save_steps": 2}
    only_model = {**options, "arguments": {"save_only_model": True}}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "s", cache, on_step=Stop(3), **only_model)
    with pytest.raises(ConfigError, match="checkpoint-2 has no state of the optimizer, .*Start with `overwrite=True`"):
        train(tmp_path / "s", cache, resume=True, **only_model)
    train(tmp_path / "s", cache, overwrite=True, **only_model)
    with pytest.raises(ConfigError, match="found a finished run, nothing to resume"):
        train(tmp_path / "s", cache, resume=True, **only_model)


@pytest.mark.parametrize("lost", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_copied_in_part_is_skipped(tmp_path: Path, cache: Path, student_dir: Path, lost: str) -> None:
    options: dict[str, Any] = {"student": student_dir, "max_steps": 5, "save_steps": 2, "learning_rate": 1e-2}
    train(tmp_path / "whole", cache, **options)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "s", cache, on_step=Stop(5), **options)
    (tmp_path / "s/checkpoint-4" / lost).unlink()
    summary = train(tmp_path / "s", cache, resume=True, **options)
    assert not [each for each in summary.warnings if "processes" in each]
    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "s")) == 0.0


# The step is far too large: the first evaluations are the best.
DIVERGING: dict[str, Any] = {
    "max_steps": 12,
    "eval_steps": 1,
    "save_steps": 1,
    "kd_weight": 1.0,
    "arguments": {**SGD, "learning_rate": 24.0, "max_grad_norm": 1.0},
}


@pytest.mark.parametrize("old_place", ["is gone", "is still there"])
def test_a_moved_run_keeps_its_best_checkpoint(
    tmp_path: Path, cache: Path, held_out: Path, student_dir: Path, old_place: str
) -> None:
    options = {**DIVERGING, "student": student_dir, "eval_cache": str(held_out)}
    old, new = tmp_path / "old", tmp_path / "new"
    whole = train(old, cache, **options)
    assert whole.best_step is not None and whole.best_step < 12
    expected = weights(old)
    for name in ("model.safetensors", "trainer_state.json"):  # killed after the last checkpoint
        (old / name).unlink()
    shutil.copytree(old, new)
    if old_place == "is gone":
        shutil.rmtree(old)
    else:
        shutil.copy(old / "checkpoint-12/model.safetensors", old / f"checkpoint-{whole.best_step}")
    moved = train(new, cache, resume=True, **options)
    assert moved.best_step == whole.best_step and moved.eval == whole.eval
    assert distance(expected, weights(new)) == 0.0


def test_an_evaluation_at_the_start_counts_once(tmp_path: Path, cache: Path, held_out: Path, student_dir: Path) -> None:
    arguments = {**DIVERGING["arguments"], "learning_rate": 1e-9, "eval_on_start": True}  # never better
    options = {**DIVERGING, "arguments": arguments, "student": student_dir, "eval_cache": str(held_out)}
    options |= {"eval_steps": 2, "save_steps": 2, "early_stopping": ("kl:50%:4",)}
    whole = train(tmp_path / "whole", cache, **options)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", cache, on_step=Stop(5), **options)
    parts = train(tmp_path / "parts", cache, resume=True, **options)
    assert whole.steps == parts.steps == 8 and parts.stopped == whole.stopped
    assert [each["step"] for each in parts.evaluations] == [each["step"] for each in whole.evaluations]
