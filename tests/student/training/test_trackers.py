"""Metrics of a run in trackers, and what is said of one that is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training import training_arguments as arguments
from runs import build_cache, train


def config(tmp_path: Path, *trackers: str) -> TrainStudentConfig:
    return TrainStudentConfig(cache="c", student="s", output=str(tmp_path), device="cpu", report_to=trackers)


def test_tensorboard_has_the_usual_names(tmp_path: Path, teacher_dir: Path, student_dir: Path, text_file: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    cache = build_cache(tmp_path / "cache", teacher_dir, text_file)
    output = tmp_path / "out"
    options = {"eval_cache": str(cache), "max_steps": 2, "eval_steps": 2, "logging_steps": 1}
    train(output, cache, student=student_dir, report_to=("tensorboard",), **options)
    (events,) = output.glob("runs/*/events*")
    found = accumulator.EventAccumulator(str(events)).Reload()
    assert {"train/loss", "train/kl", "train/learning_rate", "eval/loss", "eval/kl"} <= set(found.Tags()["scalars"])
    assert [event.step for event in found.Scalars("train/kl")] == [1, 2]


def test_several_at_once_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arguments, "INSTALLED", {})
    assert arguments.training_arguments(config(tmp_path, "tensorboard", "wandb")).report_to == ["tensorboard", "wandb"]
    assert arguments.training_arguments(config(tmp_path, "none")).report_to == []
    assert arguments.training_arguments(config(tmp_path)).report_to == []


def test_a_missing_package_is_found_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(arguments.INSTALLED, "wandb", lambda: False)
    with pytest.raises(ConfigError, match="`report_to` wandb: the package wandb is not installed"):
        arguments.training_arguments(config(tmp_path, "wandb"))


def test_unknown_and_contradicting_trackers(tmp_path: Path):
    with pytest.raises(ConfigError, match="expected tensorboard, trackio, wandb, mlflow, none"):
        config(tmp_path, "board")
    with pytest.raises(ConfigError, match="Leave none out"):
        config(tmp_path, "none", "wandb")
