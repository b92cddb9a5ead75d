"""One run of stage two: checks, student, Trainer, checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.heads import check_packing, open_head
from pipeline.losses import TailPolicy
from pipeline.student.checks import check_same_teacher_tokens, check_student_tokenizer, is_packed
from pipeline.student.data import WINDOW, CacheDataset
from pipeline.student.forward import LossRecipe, remove_distillation_forward
from pipeline.student.students import load_student, read_student_config
from pipeline.student.trainer import DistillTrainer

CONFIG_FILE = "distill_config.json"

# What the run decides itself; a --training-args file may not.
RESERVED = {
    "output_dir": "--output",
    "remove_unused_columns": "always false: targets are columns",
    "average_tokens_across_devices": "always true: see pipeline/student/trainer.py",
    "label_names": "not used",
    "resume_from_checkpoint": "--resume",
}

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # a fraction of all steps
    "weight_decay": 0.0,
    "num_train_epochs": 1.0,
    "logging_steps": 10,
    "save_total_limit": 2,
    "seed": 0,
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
}

# May differ between a run and its --resume.
RESUME_MAY_CHANGE = {"resume", "overwrite", "device", "student", "cache", "eval_cache", "output"}


@dataclass(frozen=True, kw_only=True)
class TrainStudentConfig:
    """One run of stage two. Fields named as in transformers.TrainingArguments are passed on to it; None: not given."""

    cache: str  # cache directory or URL
    output: str  # checkpoint directory
    student: str | None = None  # transformers directory, hub name, .gguf file
    student_layers: int | None = None  # keep so many of its layers
    student_config: str | None = None  # config.json for random initialisation
    eval_cache: str | None = None  # held-out cache
    kd_weight: float = 0.9  # α: 0 labels only, 1 teacher only
    temperature: float = 1.0
    tail: TailPolicy = "bucket"
    device: str = "auto"  # or cpu
    resume: bool = False
    overwrite: bool = False
    revision: str | None = None
    trust_remote_code: bool = False
    training_args: str | None = None  # JSON file of any TrainingArguments; flags win over it

    per_device_train_batch_size: int | None = None  # rows
    gradient_accumulation_steps: int | None = None
    learning_rate: float | None = None
    lr_scheduler_type: str | None = None
    warmup_steps: float | None = None  # steps, or a fraction of them if below 1
    weight_decay: float | None = None
    num_train_epochs: float | None = None
    max_steps: int | None = None  # optimizer steps; wins over epochs
    seed: int | None = None
    bf16: bool | None = None  # autocast
    gradient_checkpointing: bool | None = None
    logging_steps: int | None = None
    eval_steps: int | None = None
    save_steps: int | None = None
    dataloader_num_workers: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """What a finished run left in `output`."""

    output: str
    steps: int
    train_loss: float
    seconds: float
    parameters: int
    eval: dict[str, float]  # of the saved checkpoint; empty without a held-out cache
    best_step: int | None
    warnings: list[str]


def train_student(
    config: TrainStudentConfig,
    *,
    on_stage: Callable[[str], None] = lambda _: None,
    on_step: Callable[[int, int], None] = lambda step, total: None,
    on_log: Callable[[dict[str, float]], None] = lambda _: None,
    on_warning: Callable[[str], None] = lambda _: None,
) -> TrainSummary:
    """Trains a student on a cache and saves it as a plain transformers directory with tokenizer and configuration.

    Raises:
        CacheError: a cache cannot be read; MismatchError: student and cache do not belong together.
        ConfigError, ModelError: options or student cannot be used; nothing in `output` was touched.
    """
    recipe = LossRecipe(kd_weight=config.kd_weight, temperature=config.temperature, tail=config.tail)
    cache = cf.open_cache(config.cache, cached_record_batches=WINDOW + 1)
    held_out = None if config.eval_cache is None else cf.open_cache(config.eval_cache)
    if cache.metadata.alignment != "next":
        raise ConfigError(f"{cache.path}: its targets are of a masked model; only causal students can be trained yet")
    given = None if config.student_config is None else read_student_config(config.student_config)
    tokenizer, warnings = check_student_tokenizer(
        cache,
        config.student,
        config_vocab_size=None if given is None else given.get("vocab_size"),
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    if held_out is not None:
        warnings += check_same_teacher_tokens(cache, held_out)
    arguments = training_arguments(config)
    with arguments.main_process_first(local=False):  # one process decides about the directory, the others follow
        resume_from = _prepare_output(config, owner=arguments.process_index == 0)
    for warning in warnings:
        on_warning(warning)

    on_stage("loading the student")
    model = load_student(
        config.student,
        layers=config.student_layers,
        config_file=config.student_config,
        vocab_size=cache.metadata.vocab_size,
        seed=arguments.seed,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    head = open_head(model, cache.metadata.vocab_size)
    if is_packed(cache):
        check_packing(model, head)

    trainer = DistillTrainer(
        head=head,
        recipe=recipe,
        args=arguments,
        train_dataset=CacheDataset(cache),
        eval_dataset=None if held_out is None else CacheDataset(held_out),
        processing_class=tokenizer,
        callbacks=[_Report(on_step, on_log)],
    )
    trainer.remove_callback(PrinterCallback)  # the command line shows progress, not the library
    if trainer.is_world_process_zero():
        _write_config(config, cache)
    parameters = sum(p.numel() for p in model.parameters())
    on_stage(f"training {parameters / 1e6:.1f} M parameters on {len(cache):,} rows, {cache.num_counted_tokens:,} targets")
    result = trainer.train(resume_from_checkpoint=resume_from)
    best = trainer.state.best_model_checkpoint
    best_step = None if best is None else int(best.rpartition("-")[2])
    metrics = _evaluation_at(trainer, best_step)
    if held_out is not None and not metrics:
        metrics = trainer.evaluate()

    trainer.accelerator.wait_for_everyone()
    remove_distillation_forward(trainer.accelerator.unwrap_model(trainer.model))
    trainer.save_model()
    trainer.save_state()
    return TrainSummary(
        output=config.output,
        steps=trainer.state.global_step,
        train_loss=result.training_loss,
        seconds=result.metrics["train_runtime"],
        parameters=parameters,
        eval={name.removeprefix("eval_"): value for name, value in metrics.items()},
        best_step=best_step,
        warnings=warnings,
    )


def _evaluation_at(trainer: DistillTrainer, step: int | None) -> dict[str, float]:
    """What the held-out evaluation at a step found."""
    for entry in trainer.state.log_history:
        if entry["step"] == step and "eval_kl" in entry:
            return {name: value for name, value in entry.items() if name.startswith("eval_")}
    return {}


def training_arguments(config: TrainStudentConfig) -> TrainingArguments:
    """Defaults, then the --training-args file, then flags.

    Raises:
        ConfigError: unreadable file, unknown or reserved argument, or values that TrainingArguments refuses.
    """
    known = {field.name for field in fields(TrainingArguments)}
    values = dict(DEFAULTS)
    if config.training_args is not None:
        values |= _read_training_args(config.training_args, known)
    values |= {k: v for k, v in asdict(config).items() if k in known and v is not None}
    if config.device not in ("auto", "cpu"):
        raise ConfigError(f"--device {config.device}: expected auto or cpu; choose GPUs with CUDA_VISIBLE_DEVICES")
    if config.eval_cache is not None:
        # The best checkpoint can only be kept if every evaluation has one.
        steps = values.setdefault("eval_steps", 100)
        values |= {"eval_strategy": "steps", "load_best_model_at_end": True}
        values.setdefault("save_steps", steps)
        values.setdefault("metric_for_best_model", "eval_loss")
        values.setdefault("greater_is_better", False)
        values.setdefault("per_device_eval_batch_size", values["per_device_train_batch_size"])
    values["use_cpu"] = config.device == "cpu" or values.get("use_cpu", False)
    try:
        return TrainingArguments(
            **values,
            output_dir=config.output,
            remove_unused_columns=False,
            average_tokens_across_devices=True,
            disable_tqdm=True,
            label_names=["labels"],
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training arguments: {' '.join(str(error).split())}") from error


def _read_training_args(file: str, known: set[str]) -> dict[str, Any]:
    try:
        values = json.loads(Path(file).read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: found a {type(values).__name__}, expected an object of training arguments")
    for name in values:
        if name in RESERVED:
            raise ConfigError(f"{file}: {name} cannot be set here: {RESERVED[name]}")
        if name not in known:
            raise ConfigError(f"{file}: {name} is not an argument of transformers.TrainingArguments")
    return values


def _prepare_output(config: TrainStudentConfig, owner: bool) -> str | None:
    """The checkpoint to resume from, if any. The owner checks the directory, and touches what --overwrite allows."""
    output = Path(config.output)
    if not owner:
        return get_last_checkpoint(str(output)) if config.resume else None
    found = output.is_dir() and any(output.iterdir())
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output}: is a file, expected a directory to write to")
    if config.resume:
        checkpoint = get_last_checkpoint(str(output)) if found else None
        if checkpoint is None:
            raise ConfigError(f"{output}: found no checkpoint to resume from. Start without --resume.")
        _check_same_config(config, output / CONFIG_FILE)
        return checkpoint
    if found and not config.overwrite:
        raise ConfigError(
            f"{output}: is not empty, nothing was changed. Continue that run with --resume, replace it with "
            "--overwrite, or choose another directory."
        )
    if found:
        if not (output / CONFIG_FILE).is_file():
            raise ConfigError(
                f"{output}: has no {CONFIG_FILE}, so it is not a student of ours and --overwrite does not touch it. "
                "Choose another directory."
            )
        shutil.rmtree(output)
    return None


def _write_config(config: TrainStudentConfig, cache: cf.Cache) -> None:
    """Everything that made this student, beside it."""
    record = {
        "config": asdict(config),
        "cache": {
            "teacher": dict(cache.metadata.teacher),
            "targets": dict(cache.metadata.targets),
            "token_stream_sha256": cache.metadata.corpus.get("token_stream_sha256"),
            "shards_sha256": [shard.sidecar_sha256 for shard in cache.manifest.shards],
        },
    }
    Path(config.output).mkdir(parents=True, exist_ok=True)
    (Path(config.output) / CONFIG_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def _check_same_config(config: TrainStudentConfig, file: Path) -> None:
    recorded = json.loads(file.read_text())["config"] if file.is_file() else {}
    given = json.loads(json.dumps(asdict(config)))
    different = [
        f"{name} was {recorded[name]!r}, is {given[name]!r}"
        for name in sorted(recorded.keys() & given.keys() - RESUME_MAY_CHANGE)
        if recorded[name] != given[name]
    ]
    if different:
        raise cf.MismatchError(
            f"{file}: the interrupted run had other settings ({'; '.join(different)}): resuming would mix two "
            "runs. Use the same settings, or another --output."
        )


class _Report(TrainerCallback):
    def __init__(self, on_step: Callable[[int, int], None], on_log: Callable[[dict[str, float]], None]) -> None:
        self.on_step, self.on_logs = on_step, on_log

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.on_step(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            self.on_logs({**logs, "step": state.global_step})
