"""Training with compiled layers: the same students within rounding, checkpoints with the same names."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM

from pipeline.errors import ConfigError
from pipeline.models.devices import compilation
from pipeline.teacher.targets.hidden_rule import HiddenRule
from runs import Stop, build_cache, distance, train, weights


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[CompileCounter]:
    caplog.set_level(logging.WARNING, "torch.__trace")  # else torch writes a trace for the log of the test
    counter = CompileCounter()
    monkeypatch.setattr(compilation, "BACKEND", counter)
    yield counter
    torch.compiler.reset()


@pytest.fixture(scope="module")
def cache(teacher_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    return build_cache(folder / "cache", teacher_dir, text_file, hidden=HiddenRule(layers="last"))


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"eval_steps": 2, "gradient_checkpointing": True},
        {"padding_free": False, "hidden_loss": "mse"},
        {"bf16": True},
        {"lora_rank": 2, "merge_adapter": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_students_are_the_same(
    tmp_path: Path, cache: Path, student_dir: Path, graphs: CompileCounter, options: dict[str, Any]
) -> None:
    options = {"max_steps": 4, "batch_size": 4, **options}
    if "eval_steps" in options:
        options["eval_cache"] = str(cache)
    train(tmp_path / "plain", cache, student=student_dir, **options)
    assert graphs.frame_count == 0
    train(tmp_path / "compiled", cache, student=student_dir, compile=True, **options)
    assert graphs.frame_count > 0
    tolerance = 1e-3 if "bf16" in options else 1e-5
    assert distance(weights(tmp_path / "plain"), weights(tmp_path / "compiled")) < tolerance


@pytest.mark.long
def test_a_given_student_is_not_compiled_afterwards_and_resumes_exactly(
    tmp_path: Path, cache: Path, student_dir: Path
) -> None:
    options = {"max_steps": 4, "save_steps": 2, "compile": True}
    train(tmp_path / "whole", cache, student=student_dir, **options)
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", cache, student=model, on_step=Stop(3), **options)
    assert not any("forward" in vars(module) for module in model.modules())
    train(tmp_path / "parts", cache, student=student_dir, resume=True, **options)
    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0.0


@pytest.mark.parametrize("arguments, reason", [({"torch_compile": True}, "use `compile`"), ({"fsdp": True}, "fsdp")])
def test_what_compiles_or_wraps_layers_itself_is_refused(
    tmp_path: Path, cache: Path, student_dir: Path, arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        train(tmp_path / "student", cache, student=student_dir, compile=True, max_steps=1, arguments=arguments)
