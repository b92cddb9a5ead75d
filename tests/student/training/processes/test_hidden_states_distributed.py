"""Hidden-state distillation on two processes gives the weights and projections of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import on_processes
from safetensors.torch import load_file

from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.targets.hidden_rule import HiddenRule
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from runs import SGD, distance, log_history, train, weights
from tiny import conversations, write_jsonl

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(teacher_dir: Path, student_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one: one process with batches of 4; two: two processes with batches of 2."""
    folder = tmp_path_factory.mktemp("distributed-hidden-states")
    data = DataConfig(data=str(write_jsonl(folder / "chat.jsonl", conversations(18))), seq_len=48)
    cache = folder / "cache"
    config = {"targets": TargetRule(top_k=16), "hidden": HiddenRule(layers="1,2", every=2), "device": "cpu"}
    cache_teacher(CacheTeacherConfig(teacher=str(teacher_dir), data=data, output=str(cache), **config))
    options: dict[str, Any] = {
        "eval_cache": str(cache),
        "eval_steps": 2,
        "logging_steps": 1,
        "max_steps": 4,
        "hidden_loss": "normalized-mse",
        "layer_map": "0:1,1:2",
        "arguments": {**SGD, "learning_rate": 0.1},
    }
    train(folder / "one", cache, student=student_dir, batch_size=4, **options)
    file = folder / "arguments.json"
    file.write_text(json.dumps(options.pop("arguments")))
    given = {"student": student_dir, "batch_size": 2, "training_args": str(file)}
    on_processes(2, train, folder / "two", cache, **given, **options)
    return folder


def test_two_processes_give_the_weights_and_projections_of_one(runs: Path, student_dir: Path) -> None:
    one, two = weights(runs / "one"), weights(runs / "two")
    assert distance(one, weights(student_dir)) > 0.01 and distance(one, two) < 2e-6
    one, two = (load_file(runs / name / "projections.safetensors") for name in ("one", "two"))
    assert one.keys() == {"0-1", "1-2"} and distance(one, two) < 2e-6


def test_two_processes_log_the_hidden_state_loss_of_one(runs: Path) -> None:
    logs = [log_history(runs / name) for name in ("one", "two")]
    for name in ("features", "eval_features", "eval_loss"):
        one, two = ([entry[name] for entry in log if name in entry] for log in logs)
        assert len(one) >= 2 and one == pytest.approx(two, rel=1e-5)
