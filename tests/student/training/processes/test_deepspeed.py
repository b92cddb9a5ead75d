"""Training with DeepSpeed ZeRO stage 2 on two processes gives the weights of one process.

Skipped without deepspeed, which takes minutes to compile. Uses DS_ACCELERATOR=cpu over gloo.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.training_arguments import training_arguments
from runs import SGD, build_cache, distance, log_history, on_two_processes, train, weights
from tiny import conversations, write_jsonl

PAGE = (Path(__file__).resolve().parents[4] / "docs/scaling.md").read_text(encoding="utf-8")

WORKER = """
import json, sys
from pathlib import Path
from runs import train
given = json.loads(sys.argv[1])
output, cache, student = (Path(given.pop(name)) for name in ("output", "cache", "student"))
train(output, cache, student=student, **given)
"""


def zero2(**changes: Any) -> dict[str, Any]:
    """The configuration in docs/scaling.md."""
    found = re.search(r"```json\n(\{.*?zero_optimization.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return {**json.loads(found[1]), **changes}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_with_zero_2_give_the_weights_of_one(
    teacher_dir: Path, student_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    cache = build_cache(tmp_path / "cache", teacher_dir, write_jsonl(tmp_path / "chat.jsonl", conversations(18)))
    held_out = build_cache(tmp_path / "held", teacher_dir, write_jsonl(tmp_path / "more.jsonl", conversations(5)))
    arguments = {**SGD, "learning_rate": 0.5}
    options: dict[str, Any] = {"max_steps": 4, "logging_steps": 1, "eval_cache": str(held_out), "eval_steps": 2}
    train(tmp_path / "one", cache, student=student_dir, batch_size=4, arguments=arguments, **options)

    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "zero2.json").write_text(json.dumps(zero2(zero_allow_untested_optimizer=True)))  # plain SGD
    (tmp_path / "arguments.json").write_text(json.dumps({**arguments, "deepspeed": str(tmp_path / "zero2.json")}))
    given = {"output": tmp_path / "two", "cache": cache, "student": student_dir, "batch_size": 1}
    given |= {"gradient_accumulation_steps": 2, "training_args": tmp_path / "arguments.json", **options}
    on_two_processes(tmp_path, str(tmp_path / "worker.py"), json.dumps(given, default=str))

    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert distance(one, weights(student_dir)) > 0.05
    assert distance(one, {name: two[name] for name in one}) < 2e-6  # it saves the tied head too
    for entry, other in zip(log_history(tmp_path / "one"), log_history(tmp_path / "two"), strict=True):
        for name in {"loss", "kl", "ce", "agreement", "eval_kl", "eval_ce", "eval_loss"} & entry.keys():
            assert other[name] == pytest.approx(entry[name], rel=2e-6), (entry["step"], name)


@pytest.mark.parametrize("changes", [{"fp16": {"enabled": True}}, {"train_micro_batch_size_per_gpu": 7}])
def test_values_that_the_options_do_not_have_are_refused(tmp_path: Path, changes: dict[str, Any]):
    pytest.importorskip("deepspeed")
    config = TrainStudentConfig(
        cache="c", student="s", output=str(tmp_path), device="cpu", training_args={"deepspeed": zero2(**changes)}
    )
    with pytest.raises(
        ConfigError, match="the deepspeed configuration .* differs from the options of the run"
    ) as raised:
        training_arguments(config)
    assert next(iter(changes)) in str(raised.value)


def test_missing_deepspeed_is_named_in_the_error(teacher_dir: Path, student_dir: Path, tmp_path: Path):
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        (tmp_path / "zero2.json").write_text(json.dumps(zero2()))
        arguments = {"deepspeed": str(tmp_path / "zero2.json")}
        cache = build_cache(tmp_path / "cache", teacher_dir, write_jsonl(tmp_path / "c.jsonl", conversations(2)))
        with pytest.raises(ConfigError, match=r"training.arguments.*deepspeed"):
            train(tmp_path / "two", cache, student=student_dir, arguments=arguments)
    else:
        pytest.skip("deepspeed is installed")
