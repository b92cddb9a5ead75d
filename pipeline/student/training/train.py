"""One run of stage two: student, Trainer, checkpoint, once all has been checked (checked.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.models.adapters import attach, merged
from pipeline.models.head import Head, open_head
from pipeline.models.loading import weights_fingerprint
from pipeline.models.objective import objective_for
from pipeline.student.data.cross_tokenizer import CrossTokenizerDataset, for_foreign_student
from pipeline.student.data.dataset import CacheDataset
from pipeline.student.data.mixed_dataset import MixedDataset, Rows
from pipeline.student.model.feature_matching import Features
from pipeline.student.model.initialization import freeze_embeddings, load_student
from pipeline.student.model.pruning import calibration_batches, prune
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.early_stopping import EarlyStopping, stopped_by
from pipeline.student.training.forward import remove_distillation_forward
from pipeline.student.training.output_directory import begin_output, check_adapted, record_seen
from pipeline.student.training.recipe import KlIs
from pipeline.student.training.trainer import DistillTrainer
from pipeline.student.training.training_arguments import read_ahead
from pipeline.student.validation.compatibility import check_isolation, longest_row
from pipeline.student.validation.run_checks import CheckedRun, check_run


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


@dataclass(frozen=True)
class _Data:
    """The rows that a student is trained on and measured on, in its own tokens."""

    parts: list[CacheDataset]  # of each cache
    train: Rows
    held_out: Rows | None
    vocab_size: int

    @classmethod
    def of(cls, run: CheckedRun) -> _Data:
        config, mix = run.config, run.mix
        vocab_size = mix.first.metadata.vocab_size
        dataset_of: Callable[[cf.Cache], CacheDataset] = CacheDataset
        if config.cross_tokenizer is not None:
            limit = None if config.student is None else longest_row(config.student, config.trust_remote_code)
            dataset_of, vocab_size = for_foreign_student(run.tokenizer, config.cross_tokenizer, limit)
        parts = [dataset_of(cache) for cache in mix.caches]
        train = parts[0] if len(parts) == 1 else MixedDataset(parts, [each.rows for each in mix.portions])
        held_out = None if run.held_out is None else dataset_of(run.held_out)
        return cls(parts, train, held_out, vocab_size)

    def retokenised(self) -> list[str]:
        """What has become of the text of each cache, if the student has another tokenizer."""
        found = []
        for part in self.parts:
            if isinstance(part, CrossTokenizerDataset):
                of = "" if len(self.parts) == 1 else f" of {part.cache.path}"
                found.append(f"re-tokenising the text{of}: {part.describe()}")
        return found


@dataclass(frozen=True)
class _Student:
    model: nn.Module
    head: Head
    base: str | None  # fingerprint of what an adapter was put on
    adapted: nn.Module | None  # the model with its adapter
    parameters: int  # without projections of hidden states, which join the model afterwards


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
    config, mix, budget, arguments = run.config, run.mix, run.budget, run.arguments
    data = _Data.of(run)
    for text in data.retokenised():
        on_stage(text)
    student = _load(run, data, on_stage)
    features = _features(run, student.head)
    teachers = [each.teacher for each in (run.recipe, run.eval_recipe) if each is not None and each.teacher is not None]
    for teacher in teachers:
        teacher.load(arguments.device)

    # Only now that everything has been loaded is what --overwrite names deleted.
    PartialState().wait_for_everyone()
    if arguments.process_index == 0 and run.resume_from is None:
        begin_output(config, mix, budget, run.recipe, student.base)
    callbacks: list[TrainerCallback] = [_Report(on_step, on_log)]
    if run.stopping:
        callbacks.append(EarlyStopping([str(each) for each in run.stopping], config.early_stopping_mode))
    trainer = DistillTrainer(
        head=student.head,
        model=student.adapted,
        recipe=run.recipe,
        eval_recipe=run.eval_recipe,
        resample=config.resample,
        features=features,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=run.tokenizer,
        callbacks=callbacks,
    )
    for teacher in teachers:
        teacher.share(student.head)
    trainer.remove_callback(PrinterCallback)  # the command line shows progress, not the library
    if len(data.parts) > 1:
        on_log({"mixture": mix.seen(budget.rows_after(budget.steps))})
    on_stage(_about_training(run, data, student, features))
    seconds = _train(trainer, run)
    state, stopped = trainer.state, stopped_by(trainer.state)
    if stopped is not None and state.is_world_process_zero:
        on_log({"stopped": stopped["reasons"], "step": stopped["step"]})
    best = state.best_model_checkpoint
    best_step = None if best is None else int(best.rpartition("-")[2])
    metrics = _evaluation_at(trainer, best_step)
    if data.held_out is not None and not metrics:
        metrics = trainer.evaluate()

    trainer.accelerator.wait_for_everyone()
    remove_distillation_forward(trainer.accelerator.unwrap_model(trainer.model))
    if features is not None:
        features.detach(student.model)
    if student.adapted is not None and config.merge_adapter:
        trainer.model = merged(student.adapted)
    trainer.save_model()
    seen = [] if len(data.parts) == 1 else mix.seen(budget.rows_after(state.global_step))
    if seen and state.is_world_process_zero:
        record_seen(config, seen)
    trainer.save_state()
    return TrainSummary(
        output=config.output,
        steps=state.global_step,
        planned_steps=state.max_steps,
        train_loss=trainer.mean_loss(),
        seconds=seconds,
        parameters=student.parameters,
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


def _load(run: CheckedRun, data: _Data, on_stage: Callable[[str], None]) -> _Student:
    config, arguments = run.config, run.arguments
    on_stage("loading the student")
    objective = objective_for(run.mix.first.metadata.alignment)
    model = load_student(
        config.student,
        layers=config.student_layers,
        config_file=config.student_config,
        random=config.student_random,
        sizes=config.sizes,
        vocab_size=data.vocab_size,
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
        model = prune(model.to(arguments.device), config.sizes, calibration_batches(data.train))
    if config.freeze_embeddings:
        freeze_embeddings(model)
    adapted = None
    if config.lora is not None:
        adapted = attach(model, config.lora, base=_place(config.student), seed=arguments.seed)
    head = open_head(model, data.vocab_size, masked=objective == "masked")
    for cache in run.mix.caches:
        check_isolation(cache, head)
    return _Student(model, head, base, adapted, sum(p.numel() for p in model.parameters()))


def _features(run: CheckedRun, head: Head) -> Features | None:
    """What draws the student's hidden states to the teacher's, if that is asked for."""
    if run.of_features is None:
        return None
    on = run.held_out or run.mix.first
    shares = (
        run.of_features.share(run.mix.counted_tokens, run.mix.tokens),
        run.of_features.share(on.num_counted_tokens, on.num_tokens),
    )
    features = Features.of(run.of_features, head, run.arguments.seed, shares)
    if run.arguments.fsdp and len(features.maps):
        raise ConfigError(
            "--hidden-loss: the student's states are of another width than the teacher's, and projections between "
            "them cannot be sharded. Train without fsdp, or a student of the teacher's width."
        )
    return features


def _about_training(run: CheckedRun, data: _Data, student: _Student, features: Features | None) -> str:
    projections = 0 if features is None else sum(p.numel() for p in features.parameters())
    trained = sum(p.numel() for p in student.model.parameters() if p.requires_grad) - projections
    of = "" if trained == student.parameters else f" of {student.parameters / 1e6:.1f}"
    passes = run.budget.rows_after(run.budget.steps) / run.mix.rows
    how_often = "" if passes == 1.0 else f", {passes:.3g} times"
    portions = zip(run.mix.portions, data.parts, strict=True)
    counted = sum(each.passes(each.rows) * part.counted_tokens for each, part in portions)
    text = f"{run.mix.rows:,} rows, {counted:,.0f} targets{how_often}"
    return f"training {trained / 1e6:.1f}{of} M parameters on {text}"


def _train(trainer: DistillTrainer, run: CheckedRun) -> float:
    """Seconds that it took."""
    try:
        result = trainer.train(resume_from_checkpoint=run.resume_from)
    except cf.CacheError as error:
        raise type(error)(_own_message(error)) from error
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"--batch-size {trainer.args.per_device_train_batch_size}: out of memory on {trainer.args.device}. Use a "
            "smaller one with as many --gradient-accumulation-steps more, or --gradient-checkpointing."
        ) from error
    if (stopping := trainer.early_stopping) is not None:  # a stop between two checkpoints
        trainer.state.stateful_callbacks[type(stopping).__name__] = stopping.state()
    return float(result.metrics["train_runtime"])


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
