"""One run of stage two: checks, student, Trainer, checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import cache_format as cf
from pipeline.adapters import attach, merged, require_peft
from pipeline.errors import ConfigError
from pipeline.heads import open_head
from pipeline.models import weights_fingerprint
from pipeline.objective import objective_for
from pipeline.student.arguments import TrainStudentConfig, read_ahead, training_arguments
from pipeline.student.budget import Budget, check_one_length, rows_per_step, steps_for_tokens
from pipeline.student.caches import Mix, open_mix, recipe_for
from pipeline.student.checks import check_isolation, check_same_teacher_tokens, check_student, longest_row
from pipeline.student.cross_tokenizer import CrossTokenizerDataset, check_cross_tokenizer, for_foreign_student
from pipeline.student.data import WINDOW, CacheDataset
from pipeline.student.features import FeatureRecipe, Features
from pipeline.student.forward import remove_distillation_forward
from pipeline.student.mixing import MixedDataset, Rows
from pipeline.student.output import begin_output, check_adapted, check_output, processes_of, record_seen
from pipeline.student.pruning import calibration_batches, prune
from pipeline.student.recipe import KlIs, LossRecipe
from pipeline.student.stopping import Condition, EarlyStopping, check_conditions, stopped_by, too_few_evaluations
from pipeline.student.students import check_one_origin, freeze_embeddings, load_student
from pipeline.student.suitability import check_resample, exact_entry_warnings, realized_warnings, resample_warnings
from pipeline.student.trainer import DistillTrainer, held_out_metrics


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """What a finished run left in `output`."""

    output: str
    steps: int
    planned_steps: int
    train_loss: float | None  # mean over the steps of this call; None if it was resumed with none left
    seconds: float
    parameters: int
    eval: dict[str, float]  # of the saved checkpoint; empty without a held-out cache
    best_step: int | None
    stopped: dict[str, Any] | None  # by --early-stopping: {"step", "reasons"}
    evaluations: list[dict[str, float]]  # every held-out evaluation, with its step
    kl_is: KlIs | None  # of the divergence of the whole distributions, all of these
    mixture: list[dict[str, Any]]  # what was seen of each of several caches, as `Mix.seen`; empty for one
    warnings: list[str]


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


def train_student(
    config: TrainStudentConfig,
    *,
    on_stage: Callable[[str], None] = lambda _: None,
    on_step: Callable[[int, int], None] = lambda step, total: None,
    on_log: Callable[[dict[str, Any]], None] = lambda _: None,
    on_warning: Callable[[str], None] = lambda _: None,
) -> TrainSummary:
    """Trains a student on a cache and saves it as a plain transformers directory with tokenizer and configuration.

    Args:
        on_log: gets Trainer's logs with their step; when the run stops early {"stopped": reasons, "step"}; before a run
            on several caches {"mixture": what will be seen of each, as `Mix.seen`}.

    Raises:
        CacheError: a cache cannot be read; MismatchError: student and cache do not belong together.
        ConfigError, ModelError: options or student cannot be used; nothing in `output` was touched.
    """
    run = check_run(config)
    for warning in run.warnings:
        on_warning(warning)
    if any("://" in cache.path for cache in run.mix.caches):
        read_ahead(config, run.arguments)
    return perform(run, on_stage=on_stage, on_step=on_step, on_log=on_log)


def check_run(config: TrainStudentConfig) -> CheckedRun:
    """Everything that can be wrong with a run and is found out in seconds.

    Raises: as `train_student`.
    """
    config = replace(config, output=str(Path(config.output).expanduser()))
    check_one_length(config)
    options: dict[str, Any] = {
        "hidden_layers": [],
        "read_cache": cf.ReadCache.of(config.cache_dir, config.cache_dir_gb),
    }
    mix = open_mix(config.cache, cached_record_batches=WINDOW + 1, **options)
    held_out = None if config.eval_cache is None else cf.open_cache(config.eval_cache, **options)
    of_features = FeatureRecipe.for_cache(
        mix.first, loss=config.hidden_loss, weight=config.hidden_weight, layer_map=config.layer_map
    )
    states_held_out = of_features is not None and held_out is not None and of_features.serves(held_out)
    layers = [] if of_features is None else of_features.teacher_layers
    mix = mix.with_states(layers)
    held_out = None if held_out is None else held_out.with_states(layers if states_held_out else [])
    tail, foreign = config.tail, config.cross_tokenizer is not None
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
        exact_alone=foreign,
    )
    recipe = replace(recipe, uld=config.cross_tokenizer == "uld")
    eval_recipe = None if held_out is None else recipe.for_held_out(held_out, exact_alone=foreign)
    stopping = check_conditions(
        config.early_stopping,
        config.early_stopping_mode,
        metrics=(*held_out_metrics(eval_recipe or recipe), *(["features"] if states_held_out else [])),
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
        cross_tokenizer=foreign,
    )
    warnings += about_student
    for each, loss in (*((cache, recipe) for cache in mix.caches), (held_out, eval_recipe)):
        if each is not None and loss is not None and loss.tail == "realized":
            warnings += realized_warnings(each)
    if any(recipe.kd_weights) and recipe.teacher is None and (foreign or "sampled" not in recipe.mixture.tails):
        loss = f"--cross-tokenizer {config.cross_tokenizer}" if foreign else f"--divergence {recipe.mixture}"
        looked_at = list(mix.caches)
        if held_out is not None and not any(cache.metadata.sampled for cache in looked_at):
            looked_at.append(held_out)  # else it has been said
        warnings += exact_entry_warnings(looked_at, recipe.tail, loss, recipe.mixture)
    if held_out is not None and eval_recipe is not None:
        if eval_recipe.tail != recipe.tail and recipe.teacher is None and eval_recipe.teacher is None:
            warnings.append(
                f"{held_out.path}: its targets cannot serve --tail {recipe.tail}, the held-out loss is by --tail "
                f"{eval_recipe.tail}"
            )
        for cache in mix.caches:
            warnings += check_same_teacher_tokens(cache, held_out)
        if of_features is not None and not states_held_out:
            warnings.append(
                f"{held_out.path}: has not the hidden states of {mix.first.path}: its loss is without --hidden-loss"
            )
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


def perform(
    run: CheckedRun,
    *,
    on_stage: Callable[[str], None] = lambda _: None,
    on_step: Callable[[int, int], None] = lambda step, total: None,
    on_log: Callable[[dict[str, Any]], None] = lambda _: None,
    when_loaded: Callable[[], None] = lambda: None,
    shared: Callable[[Rows], Rows] = lambda rows: rows,
) -> TrainSummary:
    """Loads the student, trains and saves it.

    Args:
        when_loaded: called once nothing but training is left that could go wrong, before the output is touched.
        shared: gives the rows to train and to evaluate on their batches.
    """
    config, mix, budget, held_out, arguments = run.config, run.mix, run.budget, run.held_out, run.arguments
    vocab_size = mix.first.metadata.vocab_size
    dataset_of: Callable[[cf.Cache], CacheDataset] = CacheDataset
    if config.cross_tokenizer is not None:
        limit = None if config.student is None else longest_row(config.student, config.trust_remote_code)
        dataset_of, vocab_size = for_foreign_student(run.tokenizer, config.cross_tokenizer, limit)
    parts = [dataset_of(cache) for cache in mix.caches]
    train_dataset = shared(parts[0] if len(parts) == 1 else MixedDataset(parts, [each.rows for each in mix.portions]))
    eval_dataset = None if held_out is None else shared(dataset_of(held_out))
    for part in parts:
        if isinstance(part, CrossTokenizerDataset):
            of = "" if len(parts) == 1 else f" of {part.cache.path}"
            on_stage(f"re-tokenising the text{of}: {part.describe()}")
    on_stage("loading the student")
    objective = objective_for(mix.first.metadata.alignment)
    model = load_student(
        config.student,
        layers=config.student_layers,
        config_file=config.student_config,
        random=config.student_random,
        sizes=config.sizes,
        vocab_size=vocab_size,
        seed=arguments.seed,
        objective=objective,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    # Before it is narrowed, which is measured: other devices round in other ways.
    base = None if config.lora is None else weights_fingerprint(model)
    if base is not None and run.resume_from is not None:
        check_adapted(config, base)
    if config.sizes and not config.student_random:
        on_stage("measuring which parts of it to keep")
        model = prune(model.to(arguments.device), config.sizes, calibration_batches(train_dataset))
    if config.freeze_embeddings:
        freeze_embeddings(model)
    lora = config.lora
    adapted = None if lora is None else attach(model, lora, base=_place(config.student), seed=arguments.seed)
    head = open_head(model, vocab_size, masked=objective == "masked")
    for cache in mix.caches:
        check_isolation(cache, head)
    parameters = sum(p.numel() for p in model.parameters())
    features, projections = None, 0
    if run.of_features is not None:
        on = held_out or mix.first
        shares = (
            run.of_features.share(mix.counted_tokens, mix.tokens),
            run.of_features.share(on.num_counted_tokens, on.num_tokens),
        )
        features = Features.of(run.of_features, head, arguments.seed, shares)
        projections = sum(p.numel() for p in features.parameters())
        if arguments.fsdp and len(features.maps):
            raise ConfigError(
                "--hidden-loss: the student's states are of another width than the teacher's, and projections between "
                "them cannot be sharded. Train without fsdp, or a student of the teacher's width."
            )

    teachers = [each.teacher for each in (run.recipe, run.eval_recipe) if each is not None and each.teacher is not None]
    for teacher in teachers:
        teacher.load(arguments.device)

    when_loaded()
    # Only now that everything has been loaded is what --overwrite names deleted.
    PartialState().wait_for_everyone()
    if arguments.process_index == 0 and run.resume_from is None:
        begin_output(config, mix, budget, run.recipe, base)
    callbacks: list[TrainerCallback] = [_Report(on_step, on_log)]
    if run.stopping:
        callbacks.append(EarlyStopping([str(each) for each in run.stopping], config.early_stopping_mode))
    trainer = DistillTrainer(
        head=head,
        model=adapted,
        recipe=run.recipe,
        eval_recipe=run.eval_recipe,
        resample=config.resample,
        features=features,
        args=arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=run.tokenizer,
        callbacks=callbacks,
    )
    for teacher in teachers:
        teacher.share(head)
    trainer.remove_callback(PrinterCallback)  # the command line shows progress, not the library
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) - projections
    of = "" if trained == parameters else f" of {parameters / 1e6:.1f}"
    passes = budget.rows_after(budget.steps) / mix.rows
    how_often = "" if passes == 1.0 else f", {passes:.3g} times"
    if len(parts) > 1:
        on_log({"mixture": mix.seen(budget.rows_after(budget.steps))})
    counted = sum(each.passes(each.rows) * part.counted_tokens for each, part in zip(mix.portions, parts, strict=True))
    text = f"{mix.rows:,} rows, {counted:,.0f} targets{how_often}"
    on_stage(f"training {trained / 1e6:.1f}{of} M parameters on {text}")
    try:
        result = trainer.train(resume_from_checkpoint=run.resume_from)
    except cf.CacheError as error:
        raise type(error)(_own_message(error)) from error
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"--batch-size {arguments.per_device_train_batch_size}: out of memory on {arguments.device}. Use a smaller "
            "one with as many --gradient-accumulation-steps more, or --gradient-checkpointing."
        ) from error
    state, stopping = trainer.state, trainer.early_stopping
    if stopping is not None:  # a stop between two checkpoints
        state.stateful_callbacks[type(stopping).__name__] = stopping.state()
    stopped = stopped_by(state)
    if stopped is not None and state.is_world_process_zero:
        on_log({"stopped": stopped["reasons"], "step": stopped["step"]})
    best = state.best_model_checkpoint
    best_step = None if best is None else int(best.rpartition("-")[2])
    metrics = _evaluation_at(trainer, best_step)
    if held_out is not None and not metrics:
        metrics = trainer.evaluate()

    trainer.accelerator.wait_for_everyone()
    remove_distillation_forward(trainer.accelerator.unwrap_model(trainer.model))
    if features is not None:
        features.detach(model)
    if adapted is not None and config.merge_adapter:
        trainer.model = merged(adapted)
    trainer.save_model()
    seen = [] if len(parts) == 1 else mix.seen(budget.rows_after(state.global_step))
    if seen and state.is_world_process_zero:
        record_seen(config, seen)
    trainer.save_state()
    return TrainSummary(
        output=config.output,
        steps=state.global_step,
        planned_steps=state.max_steps,
        train_loss=trainer.mean_loss(),
        seconds=result.metrics["train_runtime"],
        parameters=parameters,
        eval=_without_prefix(metrics),
        best_step=best_step,
        stopped=stopped,
        evaluations=[
            {"step": entry["step"], **_without_prefix(entry)} for entry in state.log_history if "eval_kl" in entry
        ],
        kl_is=None if run.eval_recipe is None else run.eval_recipe.kl_is,
        warnings=run.warnings,
        mixture=seen,
    )


def _place(student: str | None) -> str:
    """What an adapter names as its base: a path that is good from any directory, or a hub name."""
    return "" if student is None else str(Path(student).resolve()) if Path(student).exists() else student


def _evaluation_at(trainer: DistillTrainer, step: int | None) -> dict[str, float]:
    """What the held-out evaluation at a step found."""
    for entry in trainer.state.log_history:
        if entry["step"] == step and "eval_kl" in entry:
            return {name: value for name, value in entry.items() if name.startswith("eval_")}
    return {}


def _without_prefix(logs: dict[str, float]) -> dict[str, float]:
    """The held-out numbers among logs, by their short names."""
    return {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}


def _own_message(error: Exception) -> str:
    """The message of an error; from a process that reads the cache it arrives at the end of a traceback."""
    last_line = str(error).strip().splitlines()[-1]
    return last_line.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")


class _Report(TrainerCallback):
    def __init__(self, on_step: Callable[[int, int], None], on_log: Callable[[dict[str, float]], None]) -> None:
        self.on_step, self.on_logs = on_step, on_log

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.on_step(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            self.on_logs({**logs, "step": state.global_step})
