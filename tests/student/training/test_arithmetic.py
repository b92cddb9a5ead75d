"""Defaults of a run on a GPU, with a GPU that is only said to be there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from pipeline.models.devices.precision import precision_restored
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training import arithmetic
from pipeline.student.training.arithmetic import describe_arithmetic, used_arithmetic
from pipeline.student.training.training_arguments import training_arguments
from runs import build_cache, train
from tiny import english


@pytest.fixture(params=["NVIDIA H100", "Tesla T4"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU with and one without bfloat16, as far as TrainingArguments ask."""
    name, modern = request.param, request.param == "NVIDIA H100"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or modern)
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda"))
    monkeypatch.setattr(TrainingArguments, "n_gpu", 1)
    for module in ("transformers.training_args", arithmetic.__name__):
        monkeypatch.setattr(f"{module}.is_torch_tf32_available", lambda: modern)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    return name


def arguments(tmp_path: Path, recorded: dict[str, Any] | None = None, **options: Any) -> TrainingArguments:
    return training_arguments(TrainStudentConfig(cache="c", output=str(tmp_path), **options), recorded)


def test_defaults_follow_the_gpu_and_are_what_is_recorded_and_shown(gpu: str, tmp_path: Path) -> None:
    modern = gpu == "NVIDIA H100"
    with precision_restored():
        found = arguments(tmp_path)
        assert used_arithmetic(found) == {"bf16": modern, "tf32": modern, "optim": "adamw_torch_fused"}
        kind = "bfloat16 on NVIDIA H100" if modern else "float32 on Tesla T4, which has no bfloat16"
        assert describe_arithmetic(found) == f"in {kind}"
    assert found.dataloader_pin_memory and found.dataloader_num_workers == 0
    assert found.accelerator_config.non_blocking
    assert getattr(torch.backends, "fp32_precision", "none") == "none"


def test_options_win_over_the_gpu(gpu: str, tmp_path: Path) -> None:
    given = {"tf32": False, "optim": "sgd", "accelerator_config": {"even_batches": False}}
    with precision_restored():
        assert arguments(tmp_path, cross_tokenizer="project").dataloader_num_workers == 1
        options = {"cross_tokenizer": "project", "dataloader_num_workers": 0}
        found = arguments(tmp_path, bf16=False, training_args=given, **options)
        assert used_arithmetic(found) == {"bf16": False, "tf32": False, "optim": "sgd"}
        assert found.dataloader_num_workers == 0
        assert found.accelerator_config.non_blocking and not found.accelerator_config.even_batches
        assert arguments(tmp_path, training_args={"bf16": False}).bf16 is False
        assert arguments(tmp_path, device="cpu").dataloader_num_workers == 0


@pytest.mark.parametrize("before", [False, True])
def test_a_continued_run_keeps_its_precision(gpu: str, tmp_path: Path, before: bool) -> None:
    with precision_restored():
        assert arguments(tmp_path, {"bf16": before}).bf16 is before


def test_on_a_cpu_nothing_changes(tmp_path: Path) -> None:
    found = arguments(tmp_path, device="cpu")
    assert used_arithmetic(found) == {"bf16": False, "tf32": False, "optim": "adamw_torch_fused"}
    assert describe_arithmetic(found) == "in float32 on cpu"
    for device in ("auto", "cpu"):
        assert describe_arithmetic(arguments(tmp_path, device=device, bf16=True)) == "in bfloat16 on cpu"
    assert not found.dataloader_pin_memory and not found.accelerator_config.non_blocking


def test_a_run_of_a_gpu_that_is_continued_on_a_cpu(tmp_path: Path, student_dir: Path, teacher_dir: Path) -> None:
    (tmp_path / "text.txt").write_text(english(12))
    cache, output = build_cache(tmp_path / "cache", teacher_dir, tmp_path / "text.txt"), tmp_path / "student"
    options: dict[str, Any] = {"student": student_dir, "max_steps": 3, "save_steps": 1, "batch_size": 2}

    def stop(step: int, total: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(output, cache, on_step=stop, **options)
    file = output / "distill_config.json"
    record = json.loads(file.read_text())
    assert record["arithmetic"] == {"bf16": False, "tf32": False, "optim": "adamw_torch_fused"}
    file.write_text(json.dumps({**record, "arithmetic": {**record["arithmetic"], "bf16": True}}))
    stages: list[str] = []
    train(output, cache, resume=True, on_stage=stages.append, **options)
    assert stages[-1].endswith("in bfloat16 on cpu")
    assert json.loads(file.read_text())["arithmetic"]["bf16"] is True
