"""Trackers get the metrics of a run, under the names that others use. One that is missing is named at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.errors import ConfigError
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.training_arguments import training_arguments
from runs import build_cache, log_history, train


def test_metrics_of_a_run_reach_tensorboard(
    teacher_dir: Path, student_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    cache = build_cache(tmp_path / "cache", teacher_dir, text_file)
    options = {"max_steps": 4, "logging_steps": 1, "eval_cache": str(cache), "eval_steps": 2, "batch_size": 2}
    train(tmp_path / "student", cache, student=student_dir, report_to=("tensorboard",), **options)
    (file,) = (tmp_path / "student" / "runs").rglob("events.*")
    events = EventAccumulator(str(file.parent)).Reload()
    logged = log_history(tmp_path / "student")
    for tag, name in (
        ("train/loss", "loss"),
        ("train/kl", "kl"),
        ("eval/kl", "eval_kl"),
        ("eval/agreement", "eval_agreement"),
    ):
        expected = [(entry["step"], pytest.approx(entry[name], rel=1e-5)) for entry in logged if name in entry]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected


@pytest.mark.parametrize(
    "name, message", [("tensorbord", "expected none, .*tensorboard"), ("clearml", "not installed")]
)
def test_a_tracker_that_is_missing_is_named(name: str, message: str, tmp_path: Path) -> None:
    config = TrainStudentConfig(cache="cache", output=str(tmp_path), device="cpu", report_to=("tensorboard", name))
    with pytest.raises(ConfigError, match=f"`report_to` {name}: .*{message}"):
        training_arguments(config)


@pytest.mark.parametrize("given, expected", [((), []), (("none",), []), (("tensorboard",), ["tensorboard"])])
def test_nothing_is_reported_unless_it_is_asked_for(
    given: tuple[str, ...], expected: list[str], tmp_path: Path
) -> None:
    config = TrainStudentConfig(cache="cache", output=str(tmp_path), device="cpu", report_to=given)
    assert training_arguments(config).report_to == expected
