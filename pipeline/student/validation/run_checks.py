"""All checks of a run that need no weights. They take seconds and change no file."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.losses import DistillLoss
from pipeline.models.adapters import has_adapters, require_peft
from pipeline.models.loading import model_name
from pipeline.student.data.cache_mix import Mix, open_mix
from pipeline.student.data.dataset import WINDOW
from pipeline.student.model.hidden_state_matching import HiddenStateLoss
from pipeline.student.model.initialization import check_one_origin
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.budget import Budget, check_one_length, rows_per_step, steps_for_tokens
from pipeline.student.training.early_stopping import Condition, check_conditions, too_few_evaluations
from pipeline.student.training.output_directory import check_output, processes_of
from pipeline.student.training.run_record import recorded_arithmetic
from pipeline.student.training.trainer import held_out_metrics
from pipeline.student.training.training_arguments import check_best_metric, check_optimizer, training_arguments
from pipeline.student.validation.compatibility import check_same_teacher_tokens, check_student
from pipeline.student.validation.cross_tokenizer_checks import check_cross_tokenizer
from pipeline.student.validation.loss_checks import loss_for_held_out
from pipeline.student.validation.mix_checks import loss_for_mix
from pipeline.student.validation.suitability import (
    check_resample,
    exact_entry_warnings,
    label_warnings,
    realized_warnings,
    resample_warnings,
)


@dataclass(frozen=True, kw_only=True)
class CheckedRun:
    """A run that has passed all checks that need no weights."""

    config: TrainStudentConfig
    mix: Mix  # training caches
    budget: Budget
    held_out: cf.Cache | None
    hidden_loss: HiddenStateLoss | None
    loss: DistillLoss
    eval_loss: DistillLoss | None
    arguments: TrainingArguments
    stopping: list[Condition]
    tokenizer: PreTrainedTokenizerBase
    resume_from: str | None
    warnings: list[str]


def check_run(config: TrainStudentConfig) -> CheckedRun:
    """Checks caches, loss, student, length and output directory of a run. Raises: as `train_student`."""
    config = _with_user_expanded(config)
    check_one_length(config)
    mix, held_out, hidden_loss = _open_caches(config)
    loss, warnings = _loss(config, mix, held_out, hidden_loss)
    foreign = config.cross_tokenizer is not None
    eval_loss = None if held_out is None else loss_for_held_out(loss, held_out, exact_only=foreign)
    metrics = held_out_metrics(eval_loss or loss)
    metrics = (*metrics, "features") if _serves_held_out(hidden_loss, held_out) else metrics
    stopping = check_conditions(
        config.early_stopping,
        config.early_stopping_mode,
        metrics=metrics,
        held_out_rows=None if held_out is None else len(held_out),
    )
    if config.resample:
        check_resample(mix.caches, loss.tail, any(loss.kd_weights))
    check_origin(config)
    tokenizer, student_warnings = check_student(
        mix.caches if held_out is None else [*mix.caches, held_out],
        config.student,
        config_file=config.student_config,
        tokenizer=config.tokenizer,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        cross_tokenizer=foreign,
    )
    warnings += student_warnings
    warnings += _target_warnings(config, mix, held_out, loss, eval_loss)
    if held_out is not None and eval_loss is not None:
        warnings += _held_out_warnings(mix, held_out, loss, eval_loss, hidden_loss)
    arguments = training_arguments(config, recorded_arithmetic(config) if config.resume else None)
    check_best_metric(config, arguments, metrics)
    warnings += _restrict_to_one_gpu(arguments)
    if config.max_tokens is not None:
        arguments.max_steps = steps_for_tokens(config.max_tokens, mix.rows, mix.tokens, rows_per_step(arguments))
    budget = Budget.for_run(mix.rows, arguments)
    check_optimizer(config, arguments, budget.steps)
    if config.resample:
        passes = budget.rows_after(budget.steps) / mix.rows  # over the mixture
        warnings += resample_warnings([(each.cache, each.passes(passes * each.rows)) for each in mix.portions])
    too_few = too_few_evaluations(
        stopping, config.early_stopping_mode, steps=budget.steps, every=arguments.eval_steps or 1
    )
    warnings += [] if too_few is None else [too_few]
    resume_from = check_output(config, mix, held_out, budget, loss)
    if resume_from is not None:
        arguments.eval_on_start = False  # a second evaluation at the same step would count twice for early stopping
    warnings += _resume_warnings(resume_from, arguments.world_size)
    return CheckedRun(
        config=config,
        mix=mix,
        budget=budget,
        held_out=held_out,
        hidden_loss=hidden_loss,
        loss=loss,
        eval_loss=eval_loss,
        arguments=arguments,
        stopping=stopping,
        tokenizer=tokenizer,
        resume_from=resume_from,
        warnings=warnings,
    )


def _with_user_expanded(config: TrainStudentConfig) -> TrainStudentConfig:
    output = os.fspath(config.output)
    if "://" not in output:  # Path would collapse the slashes of a URL, which `check_output` refuses
        output = str(Path(output).expanduser())
    return replace(config, output=output)


def _restrict_to_one_gpu(arguments: TrainingArguments) -> list[str]:
    """With more, Trainer uses nn.DataParallel, which cannot split sparse targets. Returns a warning."""
    visible = arguments.n_gpu
    if visible <= 1:
        return []
    arguments._n_gpu = 1
    return [f"{visible} GPUs are visible, one is used. To use all, start {visible} processes with torchrun"]


def _resume_warnings(checkpoint: str | None, processes: int) -> list[str]:
    before = processes if checkpoint is None else processes_of(checkpoint)
    if before == processes:
        return []
    return [
        f"{checkpoint} was written by {before} process{'es' * (before != 1)}, and {processes} "
        f"continue{'s' * (processes == 1)}: every step has the same rows, but rounding and dropout differ"
    ]


def _open_caches(config: TrainStudentConfig) -> tuple[Mix, cf.Cache | None, HiddenStateLoss | None]:
    """The training caches, the held-out cache, and the hidden-state loss. Caches read only the states of its layers."""
    options: dict[str, Any] = {
        "hidden_layers": [],
        "read_cache": cf.ReadCache.of(config.cache_dir, config.cache_dir_gb),
    }
    mix = open_mix(config.cache, cached_record_batches=WINDOW + 1, **options)
    held_out = None if config.eval_cache is None else cf.open_cache(config.eval_cache, **options)
    hidden_loss = HiddenStateLoss.for_cache(
        mix.first, loss=config.hidden_loss, weight=config.hidden_weight, layer_map=config.layer_map
    )
    layers = [] if hidden_loss is None else hidden_loss.teacher_layers
    mix = mix.with_states(layers)
    if held_out is not None:
        held_out = held_out.with_states(layers if _serves_held_out(hidden_loss, held_out) else [])
    return mix, held_out, hidden_loss


def _serves_held_out(hidden_loss: HiddenStateLoss | None, held_out: cf.Cache | None) -> bool:
    """Whether the held-out loss includes the hidden-state loss."""
    return hidden_loss is not None and held_out is not None and hidden_loss.serves(held_out)


def _loss(
    config: TrainStudentConfig, mix: Mix, held_out: cf.Cache | None, hidden_loss: HiddenStateLoss | None
) -> tuple[DistillLoss, list[str]]:
    """The loss, with warnings about it."""
    tail = config.tail
    if config.cross_tokenizer is not None:
        if hidden_loss is not None:
            raise ConfigError(
                f"`hidden_loss` {config.hidden_loss}: found `cross_tokenizer` {config.cross_tokenizer} as well, "
                "but with it the hidden states of student and teacher belong to different tokens. Leave one out."
            )
        for each in [*([] if held_out is None else [held_out]), *mix.caches]:
            tail = check_cross_tokenizer(
                each,
                config.cross_tokenizer,
                tail=config.tail,
                divergence=config.divergence,
                temperature=config.temperature,
                scheduled_temperature=config.temperature_schedule is not None,
                position_weighting=config.position_weighting,
                resample=config.resample,
            )
    return loss_for_mix(
        mix,
        hidden=hidden_loss,
        kd_weight=config.kd_weight,
        temperature=config.temperature,
        tail=tail,
        divergence=config.divergence,
        position_weighting=config.position_weighting,
        kd_schedule=config.kd_schedule,
        temperature_schedule=config.temperature_schedule,
        exact_only=config.cross_tokenizer is not None,
        uld=config.cross_tokenizer == "uld",
    )


def _target_warnings(
    config: TrainStudentConfig, mix: Mix, held_out: cf.Cache | None, loss: DistillLoss, eval_loss: DistillLoss | None
) -> list[str]:
    """Warnings about parts of the targets that this loss cannot use."""
    warnings: list[str] = []
    for each, its_loss in (*((cache, loss) for cache in mix.caches), (held_out, eval_loss)):
        if each is not None and its_loss is not None and its_loss.tail == "realized":
            warnings += realized_warnings(each)
    if min(loss.kd_weights) < 1.0:
        warnings += [warning for cache in mix.caches for warning in label_warnings(cache)]
    foreign = config.cross_tokenizer is not None
    if any(loss.kd_weights) and not loss.full and (foreign or "sampled" not in loss.divergence.tails):
        name = f"`cross_tokenizer` {config.cross_tokenizer}" if foreign else f"`divergence` {loss.divergence}"
        caches = list(mix.caches)
        if held_out is not None and not any(cache.metadata.sampled for cache in caches):
            caches.append(held_out)  # otherwise the warning about the training caches is enough
        warnings += exact_entry_warnings(caches, loss.tail, name, loss.divergence)
    if config.cross_tokenizer == "project" and loss.tail == "bucket" and set(loss.temperatures) != {1.0}:
        warnings.append(
            "`cross_tokenizer` project: entries without a token of the student join the tail, whose mass at "
            f"another temperature (`temperature` {loss.temperature:g}) is estimated as if none of them were likely. "
            "Temperature 1 needs no estimate"
        )
    return warnings


def _held_out_warnings(
    mix: Mix, held_out: cf.Cache, loss: DistillLoss, eval_loss: DistillLoss, hidden_loss: HiddenStateLoss | None
) -> list[str]:
    """Warnings about differences between the held-out loss and the training loss."""
    warnings: list[str] = []
    if eval_loss.tail != loss.tail and not loss.full and not eval_loss.full:
        warnings.append(
            f"{held_out.path}: its targets do not support `tail={loss.tail}`, the held-out loss uses "
            f"`tail={eval_loss.tail}`"
        )
    for cache in mix.caches:
        warnings += check_same_teacher_tokens(cache, held_out)
    if hidden_loss is not None and not hidden_loss.serves(held_out):
        warnings.append(
            f"{held_out.path}: does not have the hidden states of {mix.first.path}, the held-out loss is without "
            "`hidden_loss`"
        )
    return warnings


def check_origin(config: TrainStudentConfig) -> None:
    """Raises ConfigError if the options that create the student contradict one another."""
    check_one_origin(config.student, config.student_config)
    if config.student_config is not None and config.student_random:
        raise ConfigError(
            "`student_random`: found `student_config`, which already implies random weights. "
            "Leave `student_random` out."
        )
    if config.student_config is not None and config.sizes:
        raise ConfigError(
            "`student_width`, `student_intermediate`, `student_heads`: found `student_config`, whose random weights "
            f"cannot be pruned. Set the sizes in {config.student_config}."
        )
    if isinstance(config.student, PreTrainedModel) and not config.student_random and has_adapters(config.student):
        raise ConfigError(
            f"{model_name(config.student)}: has adapters already, such as those of an earlier run with `lora_rank`, so "
            "the trained student could not be loaded. Load it again, or give the directory of the adapter, which is "
            "merged when it is loaded."
        )
    if config.lora is None:
        return
    require_peft("`lora_rank`")
    if config.creates_student and not config.merge_adapter:
        raise ConfigError(
            "`lora_rank`: an adapter is saved without its base model, but this run creates the base model. Add "
            "`merge_adapter=True`, or train an adapter on a saved model."
        )
    if isinstance(config.student, PreTrainedModel) and not config.student.name_or_path and not config.merge_adapter:
        raise ConfigError(
            "`lora_rank`: an adapter names its base model by path or hub name, but this loaded model has neither. Add "
            "`merge_adapter=True`, or save the model first and give its path."
        )
    if config.freeze_embeddings:
        raise ConfigError(
            "`freeze_embeddings`: found `lora_rank`, which already trains only the adapters. "
            "Leave `freeze_embeddings` out."
        )
