"""The length of a run: steps for a number of tokens, and agreement with the steps that Trainer takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cache_format as cf
import pipeline.student.training.train as train_module
from pipeline.errors import ConfigError
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.budget import Budget, steps_for_tokens
from pipeline.student.training.train import train_student
from pipeline.student.training.training_arguments import training_arguments
from runs import build_cache, log_history, train
from tiny import conversations, english, write_jsonl


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 9), st.integers(1, 4000))
def test_steps_for_tokens_is_the_first_step_that_reaches_them(rows: int, step: int, per_row: int, tokens: int):
    found = steps_for_tokens(tokens, rows, float(rows * per_row), step)
    # Row by row; a step does not cross the end of an epoch.
    seen = steps = 0
    while seen < tokens:
        left = rows
        while left > 0 and seen < tokens:
            seen += per_row * min(step, left)
            left -= step
            steps += 1
    assert found == steps
    assert Budget(rows, step, steps).rows_after(steps) * per_row == seen


def test_the_tokens_of_n_epochs_take_n_epochs():
    assert steps_for_tokens(3 * 1013 * 7, 1013, 1013.0 * 7, 8) == 3 * 127
    assert steps_for_tokens(10**12, 10**9, 1024e9, 256) == -(-(10**12) // (1024 * 256))


@pytest.mark.parametrize("sizes", [(8, 1), (2, 4), (3, 2)])
@pytest.mark.parametrize("epochs", [0.4, 1.0, 2.5])
def test_budget_has_the_steps_that_trainer_takes(sizes: tuple[int, int], epochs: float, tmp_path: Path):
    rows, accumulation = sizes
    settings = {"batch_size": rows, "gradient_accumulation_steps": accumulation}
    config = TrainStudentConfig(cache="c", output=str(tmp_path), device="cpu", epochs=epochs, **settings)
    budget = Budget.for_run(37, training_arguments(config))
    batches = -(-37 // rows)
    per_epoch = -(-batches // accumulation)
    assert budget.steps_per_epoch == per_epoch and budget.steps == int(np.ceil(epochs * per_epoch))
    assert budget.rows_after(per_epoch) == 37 and budget.rows_after(2 * per_epoch + 1) == 74 + rows * accumulation


@pytest.fixture(scope="module")
def folder(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget")
    write_jsonl(folder / "chats.jsonl", conversations(12))
    (folder / "text.txt").write_text(english(16, seed=5))
    for name, data in (("chats", "chats.jsonl"), ("text", "text.txt")):
        build_cache(folder / name, teacher_dir, folder / data)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("mixed", [False, True])
def test_run_with_max_tokens_sees_them_and_schedules_end_at_its_end(
    folder: Path, tmp_path: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch, mixed: bool
):
    seen: list[int] = []

    class Trainer(train_module.DistillTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(int(inputs["num_tokens"]))
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(train_module, "DistillTrainer", Trainer)
    cache = (f"{folder / 'chats'}:1", f"{folder / 'text'}:1") if mixed else str(folder / "chats")
    config = TrainStudentConfig(
        cache=cache,
        output=str(tmp_path / "s"),
        student=str(student_dir),
        device="cpu",
        max_tokens=2500,
        batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        lr_scheduler="linear",
        warmup=0,
        kd_schedule="linear:1:0.5",
    )
    summary = train_student(config)
    assert sum(seen) == pytest.approx(2500, abs=4 * 48)  # a step of four rows
    logs = [entry for entry in log_history(tmp_path / "s") if "kd_weight" in entry]
    assert summary.steps == summary.planned_steps == len(logs)
    assert logs[-1]["kd_weight"] == 0.5 and logs[0]["kd_weight"] == 1.0
    assert logs[-1]["learning_rate"] == pytest.approx(3e-4 / summary.steps)
    assert json.loads((tmp_path / "s/distill_config.json").read_text())["config"]["max_tokens"] == 2500
    if mixed:
        assert sum(each["tokens"] for each in summary.mixture) == pytest.approx(sum(seen), rel=0.05)
    else:
        whole = cf.open_cache(folder / "chats").num_tokens
        assert 1 < sum(seen) / whole < 3  # in the middle of an epoch


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_steps": 5}, "`max_tokens` 100: found `max_steps` 5 too"),
        ({"epochs": 2.0}, "found `epochs` 2.0 too"),
        ({"arguments": {"max_steps": 5}}, "found max_steps 5 in `training_args` too"),
        ({"arguments": {"num_train_epochs": 3}}, "found num_train_epochs 3 in `training_args` too"),
        ({"max_tokens": 0}, "`max_tokens` 0: expected 1 or more"),
    ],
)
def test_two_lengths_are_refused(folder: Path, tmp_path: Path, student_dir: Path, options: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        train(tmp_path / "s", folder / "text", student=student_dir, **{"max_tokens": 100, **options})
    assert not (tmp_path / "s").exists()
