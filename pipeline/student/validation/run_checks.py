"""All that can be wrong with a run and is found out in seconds, before a weight is loaded or a file touched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.models.adapters import require_peft
from pipeline.student.data.cache_mix import Mix, open_mix, recipe_for
from pipeline.student.data.cross_tokenizer import check_cross_tokenizer
from pipeline.student.data.dataset import WINDOW
from pipeline.student.model.feature_matching import FeatureRecipe
from pipeline.student.model.initialization import check_one_origin
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.budget import Budget, check_one_length, rows_per_step, steps_for_tokens
from pipeline.student.training.early_stopping import Condition, check_conditions, too_few_evaluations
from pipeline.student.training.output_directory import check_output, processes_of
from pipeline.student.training.recipe import LossRecipe
from pipeline.student.training.trainer import held_out_metrics
from pipeline.student.training.training_arguments import training_arguments
from pipeline.student.validation.compatibility import check_same_teacher_tokens, check_student
from pipeline.student.validation.suitability import (
    check_resample,
    exact_entry_warnings,
    realized_warnings,
    resample_warnings,
)


@dataclass(frozen=True, kw_only=True)
class CheckedRun:
    """A run of which everything has been checked that can be without weights; nothing was touched."""

    config: TrainStudentConfig
    mix: Mix  # of the caches that are trained on
    budget: Budget
    held_out: cf.Cache | None
    of_features: FeatureRecipe | None
    recipe: LossRecipe
    eval_recipe: LossRecipe | None
    arguments: TrainingArguments
    stopping: list[Condition]
    tokenizer: PreTrainedTokenizerBase
    resume_from: str | None
    warnings: list[str]


def check_run(config: TrainStudentConfig) -> CheckedRun:
    """Caches, loss, student, steps and output of a run, refused if they cannot be. Raises: as `train_student`."""
    config = replace(config, output=str(Path(config.output).expanduser()))
    check_one_length(config)
    mix, held_out, of_features = _open_caches(config)
    recipe, warnings = _recipe(config, mix, held_out, of_features)
    eval_recipe = None
    if held_out is not None:
        eval_recipe = recipe.for_held_out(held_out, exact_alone=config.cross_tokenizer is not None)
    metrics = held_out_metrics(eval_recipe or recipe)
    stopping = check_conditions(
        config.early_stopping,
        config.early_stopping_mode,
        metrics=(*metrics, "features") if _has_states(held_out, of_features) else metrics,
        held_out_rows=None if held_out is None else len(held_out),
    )
    if config.resample:
        check_resample(mix.caches, recipe.tail, any(recipe.kd_weights))
    check_origin(config)
    tokenizer, about_student = check_student(
        [*mix.caches, *([] if held_out is None else [held_out])],
        config.student,
        config_file=config.student_config,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        cross_tokenizer=config.cross_tokenizer is not None,
    )
    warnings += about_student
    warnings += _about_targets(config, mix, held_out, recipe, eval_recipe)
    if held_out is not None and eval_recipe is not None:
        warnings += _about_held_out(mix, held_out, recipe, eval_recipe, of_features)
    arguments = training_arguments(config)
    if arguments.n_gpu > 1:
        warnings.append(
            f"{arguments.n_gpu} GPUs are visible, one is used. For all of them: torchrun --nproc-per-node "
            f"{arguments.n_gpu} --no-python distill train-student …"
        )
        arguments._n_gpu = 1  # else Trainer would use nn.DataParallel, which cannot split sparse targets
    if config.max_tokens is not None:
        arguments.max_steps = steps_for_tokens(config.max_tokens, mix.rows, mix.tokens, rows_per_step(arguments))
    budget = Budget.of(mix.rows, arguments)
    if config.resample:
        rows = budget.rows_after(budget.steps) / mix.rows  # as often as the whole mixture
        warnings += resample_warnings([(each.cache, each.passes(rows * each.rows)) for each in mix.portions])
    never = too_few_evaluations(
        stopping, config.early_stopping_mode, steps=budget.steps, every=arguments.eval_steps or 1
    )
    warnings += [] if never is None else [never]
    resume_from = check_output(config, mix, budget, recipe)
    if resume_from is not None and (processes := processes_of(resume_from)) != arguments.world_size:
        warnings.append(
            f"{resume_from} was written by {processes} process{'es' * (processes != 1)}, {arguments.world_size} go on: "
            "every step has the same rows, but sums are rounded in another order, and dropout draws other numbers"
        )
    return CheckedRun(
        config=config,
        mix=mix,
        budget=budget,
        held_out=held_out,
        of_features=of_features,
        recipe=recipe,
        eval_recipe=eval_recipe,
        arguments=arguments,
        stopping=stopping,
        tokenizer=tokenizer,
        resume_from=resume_from,
        warnings=warnings,
    )


def _open_caches(config: TrainStudentConfig) -> tuple[Mix, cf.Cache | None, FeatureRecipe | None]:
    """The caches, each with the hidden states that the loss needs and it has, and what is to be done with these."""
    options: dict[str, Any] = {
        "hidden_layers": [],
        "read_cache": cf.ReadCache.of(config.cache_dir, config.cache_dir_gb),
    }
    mix = open_mix(config.cache, cached_record_batches=WINDOW + 1, **options)
    held_out = None if config.eval_cache is None else cf.open_cache(config.eval_cache, **options)
    of_features = FeatureRecipe.for_cache(
        mix.first, loss=config.hidden_loss, weight=config.hidden_weight, layer_map=config.layer_map
    )
    layers = [] if of_features is None else of_features.teacher_layers
    mix = mix.with_states(layers)
    if held_out is not None:
        held_out = held_out.with_states(layers if _has_states(held_out, of_features) else [])
    return mix, held_out, of_features


def _has_states(held_out: cf.Cache | None, of_features: FeatureRecipe | None) -> bool:
    """Whether the held-out loss can have the part of the hidden states too."""
    return of_features is not None and held_out is not None and of_features.serves(held_out)


def _recipe(
    config: TrainStudentConfig, mix: Mix, held_out: cf.Cache | None, of_features: FeatureRecipe | None
) -> tuple[LossRecipe, list[str]]:
    """The loss, and warnings about it."""
    tail = config.tail
    if config.cross_tokenizer is not None:
        if of_features is not None:
            raise ConfigError(
                "--hidden-loss: with --cross-tokenizer the student's states are of other tokens than the teacher's. "
                "Leave one of them out."
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
    recipe, warnings = recipe_for(
        mix,
        features=of_features,
        kd_weight=config.kd_weight,
        temperature=config.temperature,
        tail=tail,
        divergence=config.divergence,
        position_weighting=config.position_weighting,
        kd_schedule=config.kd_schedule,
        temperature_schedule=config.temperature_schedule,
        exact_alone=config.cross_tokenizer is not None,
    )
    return replace(recipe, uld=config.cross_tokenizer == "uld"), warnings


def _about_targets(
    config: TrainStudentConfig, mix: Mix, held_out: cf.Cache | None, recipe: LossRecipe, eval_recipe: LossRecipe | None
) -> list[str]:
    """Warnings about what the targets cannot say to this loss."""
    warnings: list[str] = []
    for each, loss in (*((cache, recipe) for cache in mix.caches), (held_out, eval_recipe)):
        if each is not None and loss is not None and loss.tail == "realized":
            warnings += realized_warnings(each)
    foreign = config.cross_tokenizer is not None
    if any(recipe.kd_weights) and recipe.teacher is None and (foreign or "sampled" not in recipe.mixture.tails):
        name = f"--cross-tokenizer {config.cross_tokenizer}" if foreign else f"--divergence {recipe.mixture}"
        looked_at = list(mix.caches)
        if held_out is not None and not any(cache.metadata.sampled for cache in looked_at):
            looked_at.append(held_out)  # else it has been said
        warnings += exact_entry_warnings(looked_at, recipe.tail, name, recipe.mixture)
    return warnings


def _about_held_out(
    mix: Mix, held_out: cf.Cache, recipe: LossRecipe, eval_recipe: LossRecipe, of_features: FeatureRecipe | None
) -> list[str]:
    """Warnings about how the held-out loss differs from the one that is trained."""
    warnings: list[str] = []
    if eval_recipe.tail != recipe.tail and recipe.teacher is None and eval_recipe.teacher is None:
        warnings.append(
            f"{held_out.path}: its targets cannot serve --tail {recipe.tail}, the held-out loss is by --tail "
            f"{eval_recipe.tail}"
        )
    for cache in mix.caches:
        warnings += check_same_teacher_tokens(cache, held_out)
    if of_features is not None and not of_features.serves(held_out):
        warnings.append(
            f"{held_out.path}: has not the hidden states of {mix.first.path}: its loss is without --hidden-loss"
        )
    return warnings


def check_origin(config: TrainStudentConfig) -> None:
    """Raises ConfigError if the options that say where the student's weights come from contradict one another."""
    check_one_origin(config.student, config.student_config)
    if config.student_config is not None and config.student_random:
        raise ConfigError("--student-random: a --student-config has random weights already. Leave it out.")
    if config.student_config is not None and config.sizes:
        raise ConfigError(
            "--student-width, --student-intermediate, --student-heads: there is nothing to cut out of random weights. "
            f"Write the sizes into {config.student_config}."
        )
    if config.lora is None:
        return
    require_peft("--lora-rank")
    made = config.student_config or config.student_layers or config.student_random or config.sizes
    if made and not config.merge_adapter:
        raise ConfigError(
            "--lora-rank: an adapter is saved without the model that it belongs to, and this student's is made in this "
            "run. Add --merge-adapter, or train an adapter to a student that has been saved."
        )
    if config.freeze_embeddings:
        raise ConfigError("--freeze-embeddings: with --lora-rank only adapters are trained. Leave it out.")
