"""What a training run is told: one frozen configuration, and from it transformers' TrainingArguments."""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from pipeline.errors import ConfigError
from pipeline.losses import PositionWeighting, TailPolicy
from pipeline.models.adapters import Lora
from pipeline.student.model.pruning import Sizes
from pipeline.student.training.early_stopping import Mode

# What the run decides itself; a --training-args file may not.
RESERVED = {
    "output_dir": "use --output",
    "resume_from_checkpoint": "use --resume",
    "eval_strategy": "use --eval-cache, which is evaluated every --eval-steps",
    "load_best_model_at_end": "always true with --eval-cache, and without one there is no best",
    "average_tokens_across_devices": "always true: the loss is a mean over the tokens of all processes",
    "remove_unused_columns": "always false: the targets are columns",
    "train_sampling_strategy": "rows are shuffled so that each part of the cache is read once",
    "fp16": "use bf16: gradients divided by the tokens of a step underflow in float16",
    "label_names": "the labels are in the cache",
    "label_smoothing_factor": "the loss is that of --kd-weight, --divergence, --temperature and --tail",
    "use_liger_kernel": "head and loss are fused already",
    "disable_tqdm": "distill shows its own progress",
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
    "logging_nan_inf_filter": False,  # would log an average in place of a loss that is not a number
    "log_level_replica": "passive",  # else the other processes speak of what the first is silent about
    "dataloader_pin_memory": torch.cuda.is_available(),
}


@dataclass(frozen=True, kw_only=True)
class TrainStudentConfig:
    """One run of stage two. Fields named as in transformers.TrainingArguments are passed on to it; None: not given."""

    cache: str | tuple[str, ...]  # cache directory or URL; several, PATH:WEIGHT, see pipeline.student.data.cache_mix
    output: str  # checkpoint directory
    student: str | None = None  # transformers directory, hub name, .gguf file
    student_layers: int | None = None  # keep so many of its layers
    student_config: str | None = None  # config.json for random initialisation
    student_random: bool = False  # of `student` the architecture alone, with random weights
    student_width: int | None = None  # channels of the hidden state to keep
    student_intermediate: int | None = None  # neurons of each MLP to keep
    student_heads: int | None = None  # query heads of each layer to keep
    freeze_embeddings: bool = False  # and with them a head that is tied to them
    lora_rank: int | None = None  # train adapters of this rank alone
    lora_alpha: float | None = None  # default: twice the rank
    lora_dropout: float | None = None
    lora_targets: str = "auto"  # or ends of layer names with commas
    dora: bool = False
    lora_head: bool = False
    merge_adapter: bool = False  # save a plain model
    cross_tokenizer: str | None = None  # project or uld: the student has another tokenizer than the teacher
    eval_cache: str | None = None  # held-out cache
    kd_weight: float = 0.9  # α: 0 labels only, 1 teacher only
    temperature: float | None = None  # default: that of the cache
    tail: TailPolicy | None = None  # default: sampled if the cache has a sample of the tail, else bucket
    divergence: str = (
        "forward-kl"  # of the soft loss; weighted sums and own functions: see pipeline.losses.divergence_sum
    )
    kd_schedule: str | None = None  # in the place of kd_weight, see pipeline.student.training.schedules
    temperature_schedule: str | None = None  # in the place of temperature
    position_weighting: PositionWeighting = "uniform"
    hidden_loss: str | None = (
        None  # cosine, mse or normalized-mse: features besides, see pipeline.student.model.feature_matching
    )
    hidden_weight: float | None = None  # γ; default: 1
    layer_map: str | None = None  # uniform (default), last, or pairs STUDENT:TEACHER
    resample: bool = False  # every epoch another of several samples
    early_stopping: tuple[str, ...] = ()  # conditions, see pipeline.student.training.early_stopping
    early_stopping_mode: Mode = "all"  # of them must hold, or any
    cache_dir: str | None = None  # local copies of what is read of a remote cache
    cache_dir_gb: float = 100.0  # at most
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
    max_tokens: int | None = None  # in the place of either, see pipeline.student.training.budget
    seed: int | None = None
    bf16: bool | None = None  # autocast
    gradient_checkpointing: bool | None = None
    logging_steps: int | None = None
    eval_steps: int | None = None
    save_steps: int | None = None
    dataloader_num_workers: int | None = None

    @property
    def sizes(self) -> Sizes:
        return Sizes(width=self.student_width, intermediate=self.student_intermediate, heads=self.student_heads)

    @property
    def lora(self) -> Lora | None:
        """Raises: ConfigError for options of an adapter without one, or numbers that make none."""
        if self.lora_rank is None:
            for option, given in (
                ("--lora-alpha", self.lora_alpha is not None),
                ("--lora-dropout", self.lora_dropout is not None),
                ("--lora-targets", self.lora_targets != "auto"),
                ("--dora", self.dora),
                ("--lora-head", self.lora_head),
                ("--merge-adapter", self.merge_adapter),
            ):
                if given:
                    raise ConfigError(f"{option}: found no --lora-rank, so there is no adapter. Give one, such as 16.")
            return None
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        dropout = self.lora_dropout or 0.0
        if self.lora_rank < 1 or not 0.0 < alpha < math.inf or not 0.0 <= dropout < 1.0:
            raise ConfigError(
                f"--lora-rank {self.lora_rank}, --lora-alpha {alpha:g}, --lora-dropout {dropout:g}: expected a rank of "
                "1 or more, a positive alpha, and a dropout from 0 to below 1."
            )
        targets = () if self.lora_targets == "auto" else tuple(t.strip() for t in self.lora_targets.split(","))
        return Lora(
            rank=self.lora_rank,
            alpha=alpha,
            dropout=dropout,
            targets=targets,
            dora=self.dora,
            head=self.lora_head,
            merged=self.merge_adapter,
        )


def training_arguments(config: TrainStudentConfig) -> TrainingArguments:
    """Defaults, then the --training-args file, then flags.

    Raises:
        ConfigError: unreadable file, unknown or reserved argument, or values that TrainingArguments refuses.
    """
    known = {field.name for field in fields(TrainingArguments)}
    values = dict(DEFAULTS)
    if config.training_args is not None:
        values |= read_training_args(config.training_args)
    values |= {k: v for k, v in asdict(config).items() if k in known and v is not None}
    if config.device not in ("auto", "cpu"):
        raise ConfigError(f"--device {config.device}: expected auto or cpu; choose GPUs with CUDA_VISIBLE_DEVICES.")
    if config.eval_cache is not None:
        # The best checkpoint can only be kept if every evaluation has one.
        steps = values.setdefault("eval_steps", 100)
        values |= {"eval_strategy": "steps", "load_best_model_at_end": True}
        values.setdefault("save_steps", steps)
        values.setdefault("metric_for_best_model", "eval_loss")
        values.setdefault("greater_is_better", False)
        values.setdefault("per_device_eval_batch_size", values["per_device_train_batch_size"])
    if "activation_checkpointing" in known and "gradient_checkpointing" in values:  # its name in later releases
        values["activation_checkpointing"] = values.pop("gradient_checkpointing")
    values["use_cpu"] = config.device == "cpu" or values.get("use_cpu", False)
    for name in ("learning_rate", "weight_decay", "warmup_steps"):
        value = values[name]
        if isinstance(value, (int, float)) and not 0.0 <= value < math.inf:
            option = "--" + name.removesuffix("_steps").replace("_", "-")
            given = option if getattr(config, name) is not None else f"{config.training_args}: {name}"
            raise ConfigError(f"{given} {value}: expected a number, 0 or more. Correct it.")
    try:
        arguments = TrainingArguments(
            **values,
            output_dir=config.output,
            remove_unused_columns=False,
            average_tokens_across_devices=True,
            disable_tqdm=True,
            label_names=["labels"],
        )
    except (ValueError, TypeError, ImportError) as error:  # the last: what an argument needs is not installed
        where = "" if config.training_args is None else f" or {config.training_args}"
        raise ConfigError(
            f"training arguments: {' '.join(str(error).split()).rstrip('.')}. Correct the flags{where}."
        ) from error
    deepspeed = getattr(arguments, "hf_deepspeed_config", None)
    if deepspeed is not None and deepspeed.is_zero3():
        raise ConfigError(
            f"{config.training_args}: deepspeed with ZeRO stage 3, which gathers a weight inside of its module only: "
            "the head's is read outside, by the fused loss. Use stage 2, or fsdp (docs/scaling.md)."
        )
    for name in ("split_batches", "dispatch_batches"):
        if getattr(arguments.accelerator_config, name):
            raise ConfigError(
                f"{config.training_args}: {name} of accelerator_config cannot be set: every process reads batches "
                "of its own, of rows that lie together. Remove it from the file."
            )
    return arguments


def read_ahead(config: TrainStudentConfig, arguments: TrainingArguments) -> None:
    """For a cache that is read over a network: a worker that reads while the model computes, unless the user has said
    how many. One, since each of several would fetch nearly all of the record batches."""
    asked = {} if config.training_args is None else read_training_args(config.training_args)
    if config.dataloader_num_workers is None and "dataloader_num_workers" not in asked:
        arguments.dataloader_num_workers = 1


def read_training_args(file: str) -> dict[str, Any]:
    known = {field.name for field in fields(TrainingArguments)}
    example = 'expected an object of training arguments, such as {"max_grad_norm": 0.5}'
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: no such file, {example}. Check --training-args.") from error
    except ValueError as error:  # JSON or UTF-8
        raise ConfigError(f"{file}: not JSON ({error}), {example}. Correct it.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: found a {type(values).__name__}, {example}. Correct it.")
    for name in values:
        if name in RESERVED:
            raise ConfigError(f"{file}: {name} cannot be set here: {RESERVED[name]}. Remove it from the file.")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"{file}: {name} is not an argument of transformers.TrainingArguments. "
                + (f"Did you mean {near[0]}?" if near else "Remove it, or correct its spelling.")
            )
    return values
