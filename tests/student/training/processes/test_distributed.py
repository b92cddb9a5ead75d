"""Training on two CPU processes gives the weights and metrics of one process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_processes
from transformers import TrainerState

import cache_format as cf
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.held_out import evaluate
from pipeline.student.training import train as training
from pipeline.student.training.train import DistillTrainer
from pipeline.teacher.targets.rules import TargetRule
from runs import SGD, build_cache, distance, log_history, train, weights
from tiny import conversations, english, write_jsonl


class Watched(DistillTrainer):
    """Writes the weights and logs of each rank next to the output."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call:
            name = f"{self.args.output_dir}-rank-{os.environ['RANK']}"
            torch.save(self.accelerator.unwrap_model(self.model).state_dict(), f"{name}.pt")
            Path(f"{name}.json").write_text(json.dumps(self.state.log_history))
        super().save_model(output_dir, _internal_call)


def watched_train(output: Path, cache: Path, **options: Any) -> None:
    training.DistillTrainer = Watched
    train(output, cache, **options)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["top-k", "hidden"])
def runs(
    request: pytest.FixtureRequest, teacher_dir: Path, student_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """one: one process with batches of 4; two: two processes with batches of 2. Two epochs each."""
    folder = tmp_path_factory.mktemp("distributed")
    data = write_jsonl(folder / "chat.jsonl", conversations(18))
    rule = TargetRule(kind=request.param, **({"top_k": 16} if request.param == "top-k" else {}))
    cache = build_cache(folder / "cache", teacher_dir, data, targets=rule)
    (folder / "text.txt").write_text(english(16, seed=5))
    held_out = build_cache(folder / "held-out", teacher_dir, folder / "text.txt", targets=rule)
    # The rows divide evenly into neither steps nor processes.
    assert len(cf.open_cache(cache)) % 8 not in (0, 4) and len(cf.open_cache(held_out)) % 2 == 1

    arguments = {**SGD, "learning_rate": 0.5}
    options: dict[str, Any] = {
        "eval_cache": str(held_out),
        "gradient_accumulation_steps": 2,
        "epochs": 2,
        "logging_steps": 1,
        "eval_steps": 3,
        "kd_weight": 0.7,
        "early_stopping": ["ce:noise:50"],  # gathers held-out sums per row; never stops
        "arguments": arguments,
    }
    train(folder / "one", cache, student=student_dir, batch_size=4, **options)

    # Written here, because both processes read it.
    file = folder / "arguments.json"
    file.write_text(json.dumps(options.pop("arguments")))
    given = {"student": student_dir, "batch_size": 2, "training_args": str(file)}
    on_processes(2, watched_train, folder / "two", cache, **given, **options)
    return folder


def test_two_processes_give_the_weights_of_one(runs: Path, student_dir: Path):
    one, two = weights(runs / "one"), weights(runs / "two")
    assert distance(one, weights(student_dir)) > 0.05
    assert distance(one, two) < 2e-6


def test_both_processes_have_equal_weights(runs: Path):
    first, second = (torch.load(runs / f"two-rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert distance(first, second) == 0.0


def test_two_processes_log_the_metrics_of_one(runs: Path):
    one, two = log_history(runs / "one"), log_history(runs / "two")
    assert [sorted(entry) for entry in one] == [sorted(entry) for entry in two]
    numbers = {"kl", "ce", "agreement", "loss", "eval_kl", "eval_ce", "eval_agreement", "eval_loss", "train_loss"}
    compared = 0
    for entry, other in zip(one, two, strict=True):
        for name in numbers & entry.keys():
            assert other[name] == pytest.approx(entry[name], rel=2e-6), (entry["step"], name)
            compared += 1
    assert compared > 40
    ranks = [json.loads((runs / f"two-rank-{rank}.json").read_text()) for rank in (0, 1)]
    for first, second in zip(*ranks, strict=True):
        for name in numbers & first.keys():
            assert first[name] == second[name]


def test_evaluation_on_two_processes_sees_each_row_once(runs: Path):
    best = min((e for e in log_history(runs / "two") if "eval_loss" in e), key=lambda e: e["eval_loss"])
    alone = evaluate(EvaluateConfig(cache=str(runs / "held-out"), student=str(runs / "two"), device="cpu"))
    for name in ("kl", "ce", "agreement"):
        assert best[f"eval_{name}"] == pytest.approx(getattr(alone, name), rel=1e-6)


def test_two_processes_gather_sums_per_row_in_order(runs: Path):
    (one,), (two,) = (
        TrainerState.load_from_json(str(runs / name / "trainer_state.json")).stateful_callbacks["EarlyStopping"][
            "attributes"
        ]["progress"]
        for name in ("one", "two")
    )
    assert len(one["rows"]) == len(cf.open_cache(runs / "held-out")) and one["step"] == two["step"]
    assert two["rows"] == pytest.approx(one["rows"], rel=1e-5) and len(set(one["rows"])) > 5
    assert two["delta"] == pytest.approx(one["delta"], rel=1e-3)
