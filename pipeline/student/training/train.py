"""One run of stage two.

check_run ─▶ caches as datasets ─▶ student ─▶ DistillTrainer ─▶ best checkpoint saved in `output` ─▶ TrainSummary
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.losses import KlEstimateKind
from pipeline.models.adapters import attach, merged
from pipeline.models.devices.compilation import CompiledLayers
from pipeline.models.head import Head, evaluating, open_head
from pipeline.models.isolation.padding_free import without_padding
from pipeline.models.loading import model_name, weights_fingerprint
from pipeline.models.objective import objective_for
from pipeline.models.teacher_head import TeacherHead
from pipeline.student.data.cross_tokenizer import CrossTokenizerDataset, for_foreign_student
from pipeline.student.data.dataset import CacheDataset
from pipeline.student.data.mixed_dataset import MixedDataset, Rows
from pipeline.student.model.hidden_state_matching import HiddenStateMatching
from pipeline.student.model.initialization import freeze_embeddings, load_student
from pipeline.student.model.pruning import calibration_batches, prune
from pipeline.student.model_card import Origin, is_replaceable, write_card
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.arithmetic import describe_arithmetic, precision_restored, used_arithmetic
from pipeline.student.training.early_stopping import EarlyStopping, stopped_by
from pipeline.student.training.forward import remove_distillation_forward
from pipeline.student.training.output_directory import begin_output, check_base_weights, record_seen
from pipeline.student.training.trainer import DistillTrainer
from pipeline.student.training.training_arguments import read_ahead
from pipeline.student.validation.compatibility import StudentLimits, check_isolation, student_limits
from pipeline.student.validation.run_checks import CheckedRun, check_run


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """Result of a finished run."""

    output: str
    steps: int
    planned_steps: int
    train_loss: float | None  # mean over the steps of this call; None if it had none
    seconds: float
    parameters: int
    eval: dict[str, float]  # held-out metrics of the saved student; empty without a held-out cache
    best_step: int | None
    stopped: dict[str, Any] | None  # by `early_stopping`: {"step", "reasons"}
    evaluations: list[dict[str, float]]  # every held-out evaluation, with its step
    kl_estimate_kind: KlEstimateKind | None  # how the logged kl relates to that of the full distributions
    mixture: list[dict[str, Any]]  # use of each of several caches, from `Mix.seen`; empty for one cache
    warnings: list[str]


@dataclass(frozen=True)
class _Data:
    """Datasets of the run, in the student's tokens."""

    parts: list[CacheDataset]  # one per training cache
    train: Rows
    held_out: Rows | None
    vocab_size: int

    @classmethod
    def open(cls, run: CheckedRun) -> _Data:
        config, mix = run.config, run.mix
        vocab_size = mix.first.metadata.vocab_size
        dataset_of: Callable[[cf.Cache], CacheDataset] = CacheDataset
        if config.cross_tokenizer is not None:
            limits = StudentLimits()
            if config.student is not None:
                limits = student_limits(config.student, config.trust_remote_code, revision=config.revision)
            dataset_of, vocab_size = for_foreign_student(run.tokenizer, config.cross_tokenizer, limits)
        parts = [dataset_of(cache) for cache in mix.caches]
        train = parts[0] if len(parts) == 1 else MixedDataset(parts, [each.rows for each in mix.portions])
        held_out = None if run.held_out is None else dataset_of(run.held_out)
        return cls(parts, train, held_out, vocab_size)

    def stages(self) -> list[str]:
        """One line per cache with the result of re-tokenising; empty if the student has the teacher's tokenizer."""
        lines = []
        for part in self.parts:
            if isinstance(part, CrossTokenizerDataset):
                source = "" if len(self.parts) == 1 else f" of {part.cache.path}"
                lines.append(f"re-tokenising the text{source}: {part.describe()}")
        return lines


@dataclass(frozen=True)
class _Student:
    model: nn.Module
    head: Head
    base_weights: str | None  # fingerprint of the model that adapters are trained on
    adapted: nn.Module | None  # the model with its adapter
    parameters: int  # without the projections of hidden-state distillation, which are added later


def train_student(
    config: TrainStudentConfig,
    *,
    on_stage: Callable[[str], None] = lambda _: None,
    on_step: Callable[[int, int], None] = lambda step, total: None,
    on_log: Callable[[dict[str, Any]], None] = lambda _: None,
    on_warning: Callable[[str], None] = lambda _: None,
) -> TrainSummary:
    """Trains a student on a cache and saves it as a plain transformers directory with tokenizer and configuration.

    If `config.student` is a loaded model, it is trained in place: converted to float32, moved to the device of the run,
    and with adapters in it unless they are merged. With `student_layers`, narrower sizes or `student_random`, a new
    model is made from it and trained instead. Its training or evaluation mode and gradient checkpointing are restored.

    Args:
        on_stage: called with a line of text when a stage begins.
        on_step: called with the step and the number of steps after each optimizer step.
        on_log: called with Trainer's logs and their step; with {"mixture": planned use of each cache, from `Mix.seen`}
            before a run on several caches; with {"stopped": reasons, "step"} after an early stop.
        on_warning: called with each warning about the options.

    Raises:
        CacheError: a cache cannot be read.
        MismatchError: student and cache do not match.
        ConfigError, ModelError: the options or the student cannot be used. `output` has not been changed.
        DivergedError: the loss or the weights became NaN or Inf.
    """
    with precision_restored():
        run = check_run(config)
        for warning in run.warnings:
            on_warning(warning)
        student = run.config.student
        with evaluating(student) if isinstance(student, PreTrainedModel) else nullcontext():
            return _train_student(run, on_stage, on_step, on_log)


def _train_student(
    run: CheckedRun,
    on_stage: Callable[[str], None],
    on_step: Callable[[int, int], None],
    on_log: Callable[[dict[str, Any]], None],
) -> TrainSummary:
    config, mix, budget, arguments = run.config, run.mix, run.budget, run.arguments
    if any("://" in cache.path for cache in mix.caches):
        read_ahead(config, arguments)
    data = _Data.open(run)
    for text in data.stages():
        on_stage(text)
    student = _load(run, data, on_stage)
    matching = _hidden_state_matching(run, student.head)
    losses = [run.loss] if run.eval_loss is None else [run.loss, run.eval_loss]
    teachers = [loss.teacher_head for loss in losses if isinstance(loss.teacher_head, TeacherHead)]
    for teacher in teachers:
        teacher.load(arguments.device)

    # The old output is deleted only now, when everything has been loaded.
    PartialState().wait_for_everyone()
    if arguments.process_index == 0 and run.resume_from is None:
        begin_output(config, mix, budget, run.loss, used_arithmetic(arguments), student.base_weights)
    callbacks: list[TrainerCallback] = [_Report(on_step, on_log)]
    if run.stopping:
        callbacks.append(EarlyStopping([str(each) for each in run.stopping], config.early_stopping_mode))
    checkpointing = [(module, module.gradient_checkpointing) for module in _with_checkpointing(student.model)]
    trainer = DistillTrainer(
        head=student.head,
        model=student.adapted,
        loss=run.loss,
        eval_loss=run.eval_loss,
        resample=config.resample,
        matching=matching,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=run.tokenizer,
        callbacks=callbacks,
    )
    try:
        for teacher in teachers:
            teacher.share(student.head)
        trainer.remove_callback(PrinterCallback)  # the library prints nothing
        if len(data.parts) > 1:
            on_log({"mixture": mix.seen(budget.rows_after(budget.steps))})
        on_stage(_training_stage(run, data, student, matching))
        with closing(CompiledLayers(student.head)) if config.compile else nullcontext():
            seconds = _fit(trainer, run)
        state, stopped = trainer.state, stopped_by(trainer.state)
        if stopped is not None and state.is_world_process_zero:
            on_log({"stopped": stopped["reasons"], "step": stopped["step"]})
        best = state.best_model_checkpoint
        best_step = None if best is None else int(best.rpartition("-")[2])
        metrics = _evaluation_at(trainer, best_step)
        if data.held_out is not None and not metrics:
            metrics = trainer.evaluate()
        trainer.accelerator.wait_for_everyone()
    finally:  # also after an error: a loaded model still belongs to the caller
        remove_distillation_forward(trainer.accelerator.unwrap_model(trainer.model))
        if matching is not None:
            matching.detach(student.model)
        for module, before in checkpointing:
            module.gradient_checkpointing = before

    if student.adapted is not None and config.merge_adapter:
        trainer.model = merged(student.adapted)
    replaceable = is_replaceable(Path(config.output))  # before peft writes a card of its own
    trainer.save_model()
    seen = [] if len(data.parts) == 1 else mix.seen(budget.rows_after(state.global_step))
    if seen and state.is_world_process_zero:
        record_seen(config, seen)
    evaluations = [
        {"step": entry["step"], **_without_prefix(entry)} for entry in state.log_history if "eval_kl" in entry
    ]
    if replaceable and state.is_world_process_zero:
        write_card(_origin(run, state.global_step), _without_prefix(metrics), config.eval_cache, evaluations)
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
        evaluations=evaluations,
        kl_estimate_kind=None if run.eval_loss is None else run.eval_loss.kl_estimate_kind,
        warnings=run.warnings,
        mixture=seen,
    )


def _origin(run: CheckedRun, steps: int) -> Origin:
    config = run.config
    return Origin(
        output=Path(config.output).resolve(),
        student=None if config.student is None or config.student_random else model_name(config.student),
        caches=tuple(run.mix.caches),
        steps=steps,
        adapter=config.lora is not None and not config.merge_adapter,
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
    # Before pruning, which measures activity: rounding, and so the kept parts, may differ on another device.
    base_weights = None if config.lora is None else weights_fingerprint(model)
    if base_weights is not None and run.resume_from is not None:
        check_base_weights(config, base_weights)
    if config.sizes and not config.student_random:
        on_stage("measuring which parts of the student to keep")
        model = prune(model.to(arguments.device), config.sizes, calibration_batches(data.train))
    if config.freeze_embeddings:
        freeze_embeddings(model)
    adapted = None
    if config.lora is not None:
        adapted = attach(model, config.lora, base=_base_name(config.student), seed=arguments.seed)
    head = open_head(model, data.vocab_size, masked=objective == "masked")
    together = max(arguments.per_device_train_batch_size, arguments.per_device_eval_batch_size)
    for cache in run.mix.caches:
        check_isolation(cache, head, batch_size=together)
    longest = max(cache.metadata.corpus.get("window_length") or 0 for cache in run.mix.caches)
    head = without_padding(head, longest, wanted=config.padding_free, device=arguments.device)
    return _Student(model, head, base_weights, adapted, sum(p.numel() for p in model.parameters()))


def _hidden_state_matching(run: CheckedRun, head: Head) -> HiddenStateMatching | None:
    if (loss := run.hidden_loss) is None:
        return None
    measured = run.held_out or run.mix.first
    shares = (
        loss.share(run.mix.counted_tokens, run.mix.tokens),
        loss.share(measured.num_loss_tokens, measured.num_tokens),
    )
    matching = HiddenStateMatching.for_student(loss, head, run.arguments.seed, shares)
    if run.arguments.fsdp and len(matching.maps):
        raise ConfigError(
            f"`hidden_loss` {loss.loss}: the hidden states of student and teacher have different widths, and the "
            "projections between them cannot be sharded. Train without fsdp, or choose a student of the teacher's "
            "width."
        )
    return matching


def _training_stage(run: CheckedRun, data: _Data, student: _Student, matching: HiddenStateMatching | None) -> str:
    projections = 0 if matching is None else sum(p.numel() for p in matching.parameters())
    trained = sum(p.numel() for p in student.model.parameters() if p.requires_grad) - projections
    total = "" if trained == student.parameters else f" of {student.parameters / 1e6:.1f}"
    passes = run.budget.rows_after(run.budget.steps) / run.mix.rows
    repeats = "" if passes == 1.0 else f", {passes:.3g} times"
    portions = zip(run.mix.portions, data.parts, strict=True)
    loss_tokens = sum(each.passes(each.rows) * part.counted_tokens for each, part in portions)
    text = f"{run.mix.rows:,} rows, {loss_tokens:,.0f} loss tokens{repeats}"
    return f"training {trained / 1e6:.1f}{total} M parameters on {text}, {describe_arithmetic(run.arguments)}"


def _with_checkpointing(model: nn.Module) -> list[Any]:
    """The modules whose activations transformers can recompute."""
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]


def _fit(trainer: DistillTrainer, run: CheckedRun) -> float:
    """Trains; returns the seconds it took."""
    try:
        result = trainer.train(resume_from_checkpoint=run.resume_from)
    except cf.CacheError as error:
        raise type(error)(_message_only(error)) from error
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"`batch_size` {trainer.args.per_device_train_batch_size}: out of memory on {trainer.args.device}. Use a "
            "smaller one with more `gradient_accumulation_steps`, or `gradient_checkpointing=True`."
        ) from error
    if (stopping := trainer.early_stopping) is not None:  # for a stop between two checkpoints
        trainer.state.stateful_callbacks[type(stopping).__name__] = stopping.state()
    return float(result.metrics["train_runtime"])


def _base_name(student: str | PreTrainedModel | None) -> str:
    """How an adapter names its base model: an absolute path, or a hub name."""
    if student is None:
        return ""
    name = student.name_or_path if isinstance(student, PreTrainedModel) else model_name(student)
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def _evaluation_at(trainer: DistillTrainer, step: int | None) -> dict[str, float]:
    """Metrics of the held-out evaluation at a step; empty if there was none."""
    for entry in trainer.state.log_history:
        if entry["step"] == step and "eval_kl" in entry:
            return {name: value for name, value in entry.items() if name.startswith("eval_")}
    return {}


def _without_prefix(logs: dict[str, float]) -> dict[str, float]:
    """The held-out metrics in logs, without eval_."""
    return {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}


def _message_only(error: Exception) -> str:
    """The message of an error. From a loader process it arrives as the last line of a traceback."""
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
