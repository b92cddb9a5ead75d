"""Training arguments that Trainer would fail with are refused before the old output is deleted."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.training_arguments import check_optimizer, training_arguments
from pipeline.student.validation.launch_environment import environment_restored
from runs import build_cache, train


@pytest.fixture(scope="module")
def cache(teacher_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("refused") / "cache", teacher_dir, text_file)


@pytest.fixture(scope="module")
def finished(cache: Path, student_dir: Path) -> Path:
    """The output of a finished run."""
    train(cache.with_name("finished"), cache, student=student_dir, max_steps=1)
    return cache.with_name("finished")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "arguments, options, words",
    [
        ({}, {"lr_scheduler": "warmup_stable_decay"}, "num_decay_steps"),
        ({}, {"lr_scheduler": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_kwargs": {"num_cycle": 2}}, {}, "num_cycle"),
        ({"optim": "galore_adamw"}, {}, "optim galore_adamw: the optimizer cannot be built"),
        ({"adam_beta2": 2.0}, {}, "beta"),
        ({"optim_args": "momentum"}, {}, "the optimizer cannot be built"),
        ({"per_device_train_batch_size": 0}, {}, "per_device_train_batch_size 0: expected an integer, 1 or more"),
        ({"gradient_accumulation_steps": 0}, {}, "gradient_accumulation_steps 0"),
        ({"dataloader_num_workers": -1}, {}, "dataloader_num_workers -1: expected an integer, 0 or more"),
        ({}, {"seed": -1}, "`seed` -1"),
        ({"max_grad_norm": "1"}, {}, "max_grad_norm '1': expected a number"),
        ({"max_steps": 0}, {"max_steps": None}, "max_steps 0"),
        ({"eval_on_start": True}, {}, "found no `eval_cache`"),
        ({"auto_find_batch_size": True}, {}, "auto_find_batch_size cannot be set here"),
        ({"dataloader_drop_last": True}, {}, "dataloader_drop_last cannot be set here"),
        ({"ignore_data_skip": True}, {}, "ignore_data_skip cannot be set here"),
        ({"push_to_hub": True}, {}, "push_to_hub cannot be set here"),
        ({"parallelism_config": {"tp_size": 2}}, {}, "parallelism_config cannot be set here"),
        ({"fp16_full_eval": True}, {}, "fp16_full_eval cannot be set here"),
        ({"dataloader_persistent_workers": True}, {}, "found no `dataloader_num_workers`"),
        ({"fsdp": True}, {}, "Trainer cannot be built: Using fsdp only works in distributed training"),
        ({"fsdp": True, "fsdp_config": {"state_dict_type": "NO_SUCH"}}, {}, "state_dict_type NO_SUCH of fsdp_config"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, {}, "Trainer cannot be built: "),
        (
            {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LamaDecoderLayer"]}},
            {},
            "found LamaDecoderLayer, but the student has no such layer (it has LlamaDecoderLayer)",
        ),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
            {},
            "num_steps of gradient_accumulation_kwargs cannot be set: the length of the run is",
        ),
    ],
)
def test_the_old_student_is_kept(
    finished: Path, cache: Path, student_dir: Path, arguments: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    before = files(finished)
    options = {"max_steps": 2, **options}
    with pytest.raises(ConfigError) as raised:
        train(finished, cache, student=student_dir, overwrite=True, arguments=arguments, **options)
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert files(finished) == before


@pytest.mark.parametrize(
    "environment, arguments, words",
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {}, "ACCELERATE_MIXED_PRECISION=fp16: found in the environment"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"bf16": True}, "gradients would underflow. Use `bf16`"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "this run has no `bf16`. Give `bf16=True`"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "fp8: found in the environment"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, '{"fsdp": true, '),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, '{"deepspeed": "zero2.json"}'),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "Use `compile`"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "Use fsdp in `training_args`"),
    ],
)
def test_what_accelerate_launch_sets_must_be_an_option(
    finished: Path,
    cache: Path,
    student_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    arguments: dict[str, Any],
    words: str,
) -> None:
    before = files(finished)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as raised:
        train(finished, cache, student=student_dir, overwrite=True, max_steps=2, arguments=arguments)
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert files(finished) == before


@pytest.mark.parametrize("precision, options", [("no", {}), ("bf16", {"bf16": True}), ("no", {"bf16": True})])
def test_what_accelerate_launch_sets_and_the_options_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, options: dict[str, Any]
) -> None:
    for name, value in {"MIXED_PRECISION": precision, "DYNAMO_BACKEND": "NO", "USE_CPU": "False"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    config = TrainStudentConfig(cache="c", student="s", output=str(tmp_path / "o"), device="cpu", **options)
    arguments = training_arguments(config)
    expected = "bf16" if options else "no"
    assert arguments.mixed_precision == expected and arguments.bf16 == bool(options)


def test_given_arguments_stay_as_they_are(tmp_path: Path) -> None:
    given = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}
    before = copy.deepcopy(given)
    config = TrainStudentConfig(cache="c", student="s", output=str(tmp_path / "o"), device="cpu", training_args=given)
    assert training_arguments(config).fsdp_config["transformer_layer_cls_to_wrap"] == ["LlamaDecoderLayer"]
    assert given == before


def test_accelerates_marks_do_not_reach_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    before = dict(os.environ)
    with environment_restored():
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    "given",
    [
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}},
        {"optim": "adafactor"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"per_device_train_batch_size": 3, "dataloader_num_workers": 2, "dataloader_prefetch_factor": 1},
    ],
)
def test_arguments_that_trainer_takes(tmp_path: Path, given: dict[str, Any]) -> None:
    config = TrainStudentConfig(cache="c", student="s", output=str(tmp_path / "o"), device="cpu", training_args=given)
    check_optimizer(config, training_arguments(config), steps=10)


@pytest.mark.parametrize(
    "given, options, words",
    [
        ({}, {"save_steps": 50}, "`save_steps` 50: found `eval_steps` 100, expected a multiple"),
        ({"save_steps": 0}, {}, "save_steps 0: found `eval_steps` 100"),
        ({"eval_steps": 0.3, "save_steps": 0.5}, {}, "save_steps 0.5: found `eval_steps` 0.3"),
        ({"eval_steps": 10, "save_steps": 0.5}, {}, "save_steps 0.5: found `eval_steps` 10"),
        ({"eval_steps": 0}, {}, "eval_steps 0: expected a number above 0"),
        ({"save_strategy": "no"}, {}, "save_strategy no: found `eval_cache`"),
        ({"save_strategy": "epoch"}, {}, "save_strategy epoch: found `eval_cache`"),
    ],
)
def test_every_checkpoint_needs_an_evaluation(
    tmp_path: Path, given: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    config = TrainStudentConfig(
        cache="c", eval_cache="h", student="s", output=str(tmp_path / "o"), device="cpu", training_args=given, **options
    )
    with pytest.raises(ConfigError) as raised:
        training_arguments(config)
    assert words in str(raised.value) and "--" not in str(raised.value)


@pytest.mark.parametrize(
    "given, options",
    [
        ({}, {"save_steps": 200}),
        ({"eval_steps": 0.1, "save_steps": 0.3}, {}),
        ({"save_strategy": "best", "save_steps": 3}, {}),
    ],
)
def test_checkpoints_with_an_evaluation(tmp_path: Path, given: dict[str, Any], options: dict[str, Any]) -> None:
    config = TrainStudentConfig(
        cache="c", eval_cache="h", student="s", output=str(tmp_path / "o"), device="cpu", training_args=given, **options
    )
    assert training_arguments(config).load_best_model_at_end
