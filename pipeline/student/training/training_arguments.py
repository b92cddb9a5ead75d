"""From the options of a run to transformers' TrainingArguments.

Options that were given win over `training_args`, which wins over the defaults of the other options. A run that is
continued keeps the precision it began with, on whatever device.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler, integrations

from cache_format.json_object import json_object
from pipeline.errors import ConfigError
from pipeline.models.loading import reason
from pipeline.options import options_of
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.arithmetic import default_arithmetic
from pipeline.student.training.early_stopping import HIGHER_IS_BETTER
from pipeline.student.validation.launch_environment import check_environment

# Decided by the run itself; `training_args` may not set them.
RESERVED = {
    "output_dir": "use `output`",
    "resume_from_checkpoint": "use `resume`",
    "eval_strategy": "use `eval_cache`, which is evaluated every `eval_steps`",
    "load_best_model_at_end": "always true with `eval_cache`, and without it there is no best checkpoint",
    "average_tokens_across_devices": "always true: the loss is a mean over the tokens of all processes",
    "remove_unused_columns": "always false: the targets are columns",
    "train_sampling_strategy": "rows are shuffled so that each part of the cache is read once",
    "fp16": "use `bf16`: gradients divided by the tokens of a step underflow in float16 (see `training.arithmetic`)",
    **dict.fromkeys(("fp16_full_eval", "bf16_full_eval"), "evaluations compute like training, see `bf16`"),
    "label_names": "the labels are in the cache",
    "label_smoothing_factor": "the loss is set by `kd_weight`, `divergence`, `temperature` and `tail`",
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), "use `compile`"),
    "use_liger_kernel": "head and loss are fused already",
    "disable_tqdm": "distill shows its own progress",
    "auto_find_batch_size": "the length of the run is computed from `batch_size`",
    "dataloader_drop_last": "always false: every row is trained on in every epoch",
    "hub_token": "a run uploads nothing, and would record it; log in with hf auth login for private models",
    "push_to_hub": "upload the finished student with distill push",
    "parallelism_config": "every process trains on rows of its own; use fsdp for large models (docs/scaling.md)",
    "ignore_data_skip": "always false: a resumed run continues with the rows that the first one had left",
}

# Smallest and largest value of arguments that TrainingArguments does not check itself.
LARGEST_SEED = 2**32 - 1
LIMITS: dict[str, tuple[int, float]] = {
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "dataloader_prefetch_factor": (1, math.inf),
    "seed": (0, LARGEST_SEED),
    "data_seed": (0, LARGEST_SEED),
}
# How FSDP saves checkpoints: whole, or in one part per process.
STATE_DICTS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
# What building an optimizer or a schedule raises for arguments that it does not take or packages that are missing.
NOT_BUILT = (TypeError, ValueError, ImportError, AttributeError, KeyError, RuntimeError)

# Options whose name differs from that of the argument.
ARGUMENTS = {
    "batch_size": "per_device_train_batch_size",
    "lr_scheduler": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "epochs": "num_train_epochs",
}

# Whether the package of a tracker is installed.
INSTALLED: dict[str, Callable[[], bool]] = {
    "tensorboard": integrations.is_tensorboard_available,
    "trackio": integrations.is_trackio_available,
    "wandb": integrations.is_wandb_available,
    "mlflow": integrations.is_mlflow_available,
}

# Defaults that differ from those of transformers.
DEFAULTS: dict[str, Any] = {
    "save_total_limit": 2,
    "logging_nan_inf_filter": False,  # would log an average instead of a loss that is NaN
    "log_level_replica": "passive",  # otherwise the other processes log what the first one does not
    "dataloader_pin_memory": False,
}

# The same on a GPU: batches are copied to the device while it computes.
GPU_DEFAULTS: dict[str, Any] = {
    "dataloader_pin_memory": True,
    "accelerator_config": {"non_blocking": True},
}


def training_arguments(config: TrainStudentConfig, recorded: Mapping[str, Any] | None = None) -> TrainingArguments:
    """The arguments of a run for transformers' Trainer.

    Args:
        recorded: `used_arithmetic` of the run that is continued.

    Raises: ConfigError for an unreadable file, an unknown or reserved argument, or a value that TrainingArguments
        refuses.
    """
    known = {field.name for field in fields(TrainingArguments)}
    given = read_training_args(config.training_args)
    defaults = DEFAULTS
    if config.device != "cpu" and not given.get("use_cpu") and torch.cuda.is_available():
        defaults = {**DEFAULTS, **GPU_DEFAULTS, **default_arithmetic()}
        if config.cross_tokenizer is not None:
            defaults["dataloader_num_workers"] = 1  # rows are converted in Python, which would hold up the step
        if isinstance(own := given.get("accelerator_config"), Mapping):
            given["accelerator_config"] = {**defaults["accelerator_config"], **own}
    if recorded is not None:
        defaults = {**defaults, "bf16": recorded["bf16"]}
    values = {**defaults, **_options(config, known), **given, **_options(config, known, explicit=True)}
    if config.eval_cache is not None:
        # The best checkpoint can only be kept if every evaluation has one.
        values |= {"eval_strategy": "steps", "load_best_model_at_end": True}
        values.setdefault("save_steps", values["eval_steps"])
        metric = values.setdefault("metric_for_best_model", "eval_loss") or "eval_loss"
        if values.get("greater_is_better") is None:  # Trainer would prefer the highest KL
            values["greater_is_better"] = str(metric).removeprefix("eval_") in HIGHER_IS_BETTER
        values.setdefault("per_device_eval_batch_size", values["per_device_train_batch_size"])
    elif "eval_steps" not in given:
        values.pop("eval_steps", None)
    if "activation_checkpointing" in known and "gradient_checkpointing" in values:  # its name in later releases
        values["activation_checkpointing"] = values.pop("gradient_checkpointing")
    # Set even where there is only a CPU: otherwise TrainingArguments refuses bfloat16, which CPUs support.
    values["use_cpu"] = config.device == "cpu" or values.get("use_cpu", False) or not torch.accelerator.is_available()
    check_environment(values)
    _check_numbers(config, values)
    if config.eval_cache is not None:
        _check_checkpoints(config, values)
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
        where = "" if config.training_args is None else f" or {_source(config)}"
        raise ConfigError(
            f"training arguments: {' '.join(str(error).split()).rstrip('.')}. Correct the options{where}."
        ) from error
    _check_accelerate(config, arguments)
    _check_trackers(arguments)
    return arguments


def _check_numbers(config: TrainStudentConfig, values: Mapping[str, Any]) -> None:
    """Raises ConfigError for numbers that Trainer would fail with, after the old output was deleted."""
    for field in fields(TrainingArguments):
        found, number = values.get(field.name), isinstance(field.default, int | float)
        if isinstance(found, str) and number and not isinstance(field.default, bool):
            raise ConfigError(f"{_where(config, field.name)} {found!r}: expected a number. Correct it.")
    for name in ("learning_rate", "weight_decay", "warmup_steps", "num_train_epochs"):
        if isinstance(values[name], int | float) and not 0.0 <= values[name] < float("inf"):
            raise ConfigError(
                f"{_where(config, name)} {values[name]}: expected a finite number, 0 or more. Correct it."
            )
    for name, (smallest, largest) in LIMITS.items():
        found = values.get(name)
        if found is not None and not (isinstance(found, int) and smallest <= found <= largest):
            limit = f"{smallest} or more" if largest == math.inf else f"{smallest} to {largest:,}"
            raise ConfigError(f"{_where(config, name)} {found}: expected an integer, {limit}. Correct it.")
    if values.get("max_steps", -1) == 0:
        raise ConfigError(f"{_source(config)}: max_steps 0: expected 1 or more, or -1 for whole epochs. Correct it.")
    if values.get("dataloader_persistent_workers") and not values.get("dataloader_num_workers"):
        raise ConfigError(
            f"{_source(config)}: dataloader_persistent_workers: found no `dataloader_num_workers`, the processes that "
            "it keeps. Set their number, or remove it."
        )
    if config.eval_cache is None and values.get("eval_on_start"):
        raise ConfigError(f"{_source(config)}: eval_on_start: found no `eval_cache` to evaluate on. Remove it.")


def _check_checkpoints(config: TrainStudentConfig, values: Mapping[str, Any]) -> None:
    """Raises ConfigError unless every checkpoint has an evaluation, from which the best one is chosen."""
    strategy = values.get("save_strategy", "steps")
    strategy = getattr(strategy, "value", strategy)
    if strategy not in ("steps", "best"):
        raise ConfigError(
            f"{_source(config)}: save_strategy {strategy}: found `eval_cache`, which keeps the best checkpoint, so "
            "expected steps or best. Remove it."
        )
    every, save = values["eval_steps"], values["save_steps"]
    if not isinstance(every, int | float) or not 0 < every < math.inf:
        raise ConfigError(f"{_source(config)}: eval_steps {every}: expected a number above 0. Correct it.")
    if strategy == "best" or not isinstance(save, int | float):  # the latter is for TrainingArguments to refuse
        return
    whole = (save < 1) == (every < 1) and math.isclose(save / every, round(save / every), rel_tol=1e-6)
    if not whole or save < every:
        raise ConfigError(
            f"{_where(config, 'save_steps')} {save}: found `eval_steps` {every}, expected a multiple of it, because "
            "every checkpoint needs an evaluation. Change one of them."
        )


def _options(config: TrainStudentConfig, known: set[str], *, explicit: bool = False) -> dict[str, Any]:
    """Values of the options that are arguments, by the argument's name.

    Args:
        explicit: only the options that were given.
    """
    found = {}
    for name in config.given if explicit else options_of(TrainStudentConfig):
        argument, value = ARGUMENTS.get(name, name), getattr(config, name)
        if argument in known and value is not None:
            found[argument] = list(value) if isinstance(value, tuple) else value
    return found


def _check_trackers(arguments: TrainingArguments) -> None:
    """Trainer itself would find a missing package only after the old output was deleted."""
    for name in arguments.report_to:
        if name in INSTALLED and not INSTALLED[name]():
            raise ConfigError(f"`report_to` {name}: the package {name} is not installed. pip install {name}")


def check_optimizer(config: TrainStudentConfig, arguments: TrainingArguments, steps: int) -> None:
    """Builds optimizer and schedule for a model of one layer. Trainer itself builds them only after the old output was
    deleted.

    Args:
        steps: length of the run.

    Raises: ConfigError if one of them cannot be built.
    """
    model = nn.Sequential(nn.Linear(1, 1, device=arguments.device))
    ours = copy.copy(arguments)
    if ours.optim_target_modules is not None:
        ours.optim_target_modules = "all-linear"  # the given ones are layers of the student
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(ours, model)
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters())
        plain = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
        if plain and not options.keys() & {"params", "model", "optimizer_dict"}:
            optimizer = kind(model.parameters(), **options)
    except NOT_BUILT as error:
        name = getattr(arguments.optim, "value", arguments.optim)
        raise ConfigError(
            f"{_source(config)}: optim {name}: the optimizer cannot be built: {reason(error)}. Correct its arguments, "
            "or choose another one."
        ) from error
    try:
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=copy.deepcopy(arguments.lr_scheduler_kwargs),
        )
    except NOT_BUILT as error:
        name = getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)
        raise ConfigError(
            f"`lr_scheduler` {name}: the schedule cannot be built: {reason(error)}. Correct its lr_scheduler_kwargs in "
            "`training_args`, or choose another one."
        ) from error


def _check_accelerate(config: TrainStudentConfig, arguments: TrainingArguments) -> None:
    deepspeed = getattr(arguments, "hf_deepspeed_config", None)
    if deepspeed is not None and deepspeed.is_zero3():
        raise ConfigError(
            f"{_source(config)}: deepspeed with ZeRO stage 3 gathers a weight only inside its module, but the fused "
            "loss reads the head outside of it. Use stage 2, or fsdp (docs/scaling.md)."
        )
    if (
        deepspeed is not None and deepspeed.mismatches
    ):  # Trainer itself would say so only after the old output was deleted
        found = "; ".join(each.removeprefix("- ") for each in deepspeed.mismatches)
        raise ConfigError(
            f"{_source(config)}: the deepspeed configuration (ds) differs from the options of the run (hf): {found}. "
            "Set these values to auto."
        )
    if config.compile and (arguments.fsdp or deepspeed is not None):
        raise ConfigError(f"{_source(config)}: fsdp and deepspeed cannot be combined with `compile`. Leave it out.")
    for name in ("split_batches", "dispatch_batches"):
        if getattr(arguments.accelerator_config, name):
            raise ConfigError(
                f"{_source(config)}: {name} of accelerator_config cannot be set: every process reads its own "
                "batches, of adjacent rows. Remove it."
            )
    if "num_steps" in (arguments.accelerator_config.gradient_accumulation_kwargs or {}):
        raise ConfigError(
            f"{_source(config)}: num_steps of gradient_accumulation_kwargs cannot be set: the length of the run is "
            "computed from `gradient_accumulation_steps`. Use that."
        )
    sharding = arguments.fsdp_config if arguments.fsdp and arguments.fsdp_config else {}
    state = sharding.get("state_dict_type", STATE_DICTS[0])
    if str(state).upper() not in STATE_DICTS:
        raise ConfigError(
            f"{_source(config)}: state_dict_type {state} of fsdp_config: expected {' or '.join(STATE_DICTS)}. "
            "Correct it."
        )


@contextmanager
def trainer_errors() -> Iterator[None]:
    """For arguments that only Trainer's constructor checks. Raises: ConfigError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ConfigError(
            f"training arguments: Trainer cannot be built: {reason(error)}. Correct `training_args`."
        ) from error


def read_ahead(config: TrainStudentConfig, arguments: TrainingArguments) -> None:
    """For a cache that is read over a network: a worker that reads while the model computes, unless the user has set
    the number. One, since each of several would fetch nearly all record batches."""
    given = read_training_args(config.training_args)
    if config.dataloader_num_workers is None and "dataloader_num_workers" not in given:
        arguments.dataloader_num_workers = 1


def read_training_args(given: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """The contents of a `training_args` file, checked; or a mapping that stands for one.

    Raises: ConfigError.
    """
    if given is None:
        return {}
    expected = 'an object of training arguments, such as {"max_grad_norm": 0.5}'
    file = given if isinstance(given, str) else "`training_args`"
    values: Any = given
    if isinstance(given, str):
        try:
            data = Path(given).read_bytes()
        except FileNotFoundError as error:
            raise ConfigError(f"{file}: no such file, expected {expected}. Check `training_args`.") from error
        values = json_object(data, given, expected=expected, next_step="Correct it.", error=ConfigError)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{file}: found a {type(values).__name__}, expected {expected}. Correct it.")
    known = {field.name for field in fields(TrainingArguments)}
    for name in values:
        if name in RESERVED:
            raise ConfigError(f"{file}: {name} cannot be set here: {RESERVED[name]}. Remove it.")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"{file}: {name} is not an argument of transformers.TrainingArguments. "
                + (f"Did you mean {near[0]}?" if near else "Remove it, or correct its spelling.")
            )
    return copy.deepcopy(dict(values))  # Trainer adds to nested ones


def check_best_metric(config: TrainStudentConfig, arguments: TrainingArguments, metrics: Sequence[str]) -> None:
    """Trainer itself would miss it only after the first evaluation.

    Args:
        metrics: metrics that evaluations report, without eval_.

    Raises: ConfigError if `metric_for_best_model` is none of them.
    """
    metric = arguments.metric_for_best_model
    if config.eval_cache is not None and str(metric).removeprefix("eval_") not in metrics:
        raise ConfigError(
            f"{_source(config)}: metric_for_best_model {metric}: evaluations of this run report {', '.join(metrics)}. "
            "Choose one of them."
        )


def _source(config: TrainStudentConfig) -> str:
    """How errors name the place of a training argument."""
    return config.training_args if isinstance(config.training_args, str) else "`training_args`"


def _where(config: TrainStudentConfig, argument: str) -> str:
    """The option that set an argument, or the argument in its file."""
    option = next((name for name, its in ARGUMENTS.items() if its == argument), argument)
    return f"`{option}`" if option in config.given else f"{_source(config)}: {argument}"
