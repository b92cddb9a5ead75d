"""One run of stage two.

check_run ─▶ caches as datasets ─▶ student ─▶ DistillTrainer ─▶ best checkpoint saved in `output` ─▶ TrainSummary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

import cache_format as cf
from cache_format.wording import quantity
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate_config import MOST_NATS
from pipeline.evaluation.intervals import Metric, Relation
from pipeline.losses import KlEstimateKind
from pipeline.models.adapters import merged
from pipeline.models.devices.compilation import CompiledLayers
from pipeline.models.devices.precision import precision_restored
from pipeline.models.loading import lent, model_name
from pipeline.models.teacher_head import TeacherHead
from pipeline.student.model.hidden_state_matching import HiddenStateMatching
from pipeline.student.model_card import HeldOut, Origin, is_replaceable, write_card
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.arithmetic import describe_arithmetic, used_arithmetic
from pipeline.student.training.early_stopping import EarlyStopping, stopped_by
from pipeline.student.training.forward import own_forward
from pipeline.student.training.output_directory import begin_output, check_contents, claimed, follow_best, saving
from pipeline.student.training.run_parts import RunData, RunStudent, load_run_student, match_hidden_states
from pipeline.student.training.run_record import record_of, record_seen
from pipeline.student.training.trainer import DistillTrainer
from pipeline.student.training.training_arguments import read_ahead, trainer_errors
from pipeline.student.validation.launch_environment import environment_restored
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


def train_student(
    config: TrainStudentConfig,
    *,
    on_stage: Callable[[str], None] = lambda _: None,
    on_begin: Callable[[], None] = lambda: None,
    on_step: Callable[[int, int], None] = lambda step, total: None,
    on_log: Callable[[dict[str, Any]], None] = lambda _: None,
    on_warning: Callable[[str], None] = lambda _: None,
) -> TrainSummary:
    """Trains a student on a cache and saves it as a plain transformers directory with tokenizer and configuration.

    If `config.student` is a loaded model, it is trained in place: converted to float32, moved to the device of the run,
    and with adapters in it unless they are merged. With `student_layers`, narrower sizes or `student_random`, a new
    model is made from it and trained instead. The mode of its modules, its attention, gradient checkpointing
    and what is trainable in it are restored.

    Args:
        on_stage: called with a line of text when a stage begins.
        on_begin: called when everything is loaded, before the first change to `output`.
        on_step: called with the step and the number of steps after each optimizer step.
        on_log: called with Trainer's logs and their step; with {"mixture": planned use of each cache, from `Mix.seen`}
            before a run on several caches; with {"stopped": reasons, "step"} after an early stop.
        on_warning: called with each warning about the options.

    Raises:
        CacheError: a cache cannot be read.
        MismatchError: student and cache do not match.
        ConfigError, ModelError: the options or the student cannot be used, or another process is training into
            `output`, which has not been changed.
        DivergedError: the loss or the weights became NaN or Inf.
        DiskFullError: no space left for a checkpoint or the student.
    """
    with precision_restored():
        run = check_run(config)
        for warning in run.warnings:
            on_warning(warning)
        with lent(run.config.student):
            return _train_student(run, on_stage, on_begin, _Report(on_step, on_log))


def _train_student(
    run: CheckedRun, on_stage: Callable[[str], None], on_begin: Callable[[], None], report: _Report
) -> TrainSummary:
    """Loads everything, then trains into the output directory, which is claimed for that long."""
    config, mix, arguments = run.config, run.mix, run.arguments
    if any("://" in cache.path for cache in mix.caches):
        read_ahead(config, arguments)
    data = RunData.open(run)
    for text in data.stages():
        on_stage(text)
    student = load_run_student(run, data, on_stage)
    matching = match_hidden_states(run, student.head)
    losses = [run.loss] if run.eval_loss is None else [run.loss, run.eval_loss]
    teachers = [loss.teacher_head for loss in losses if isinstance(loss.teacher_head, TeacherHead)]
    for teacher in teachers:
        teacher.load(arguments.device)

    if arguments.process_index == 0 and run.resume_from is not None:
        follow_best(run.resume_from, config.output)
    with environment_restored(), ExitStack() as installed:
        with trainer_errors():
            trainer = installed.enter_context(_trainer(run, data, student, matching, report))
        # The old output is deleted only now, when everything has been loaded and built.
        PartialState().wait_for_everyone()
        first = arguments.process_index == 0
        with claimed(config.output) if first else nullcontext():
            if first:
                _begin(run, student, on_begin)
            return _train_into_output(run, data, student, matching, teachers, on_stage, report, trainer, installed)


def _begin(run: CheckedRun, student: RunStudent, on_begin: Callable[[], None]) -> None:
    """Makes the output directory that of this run, if it still is as it was when the run was checked."""
    if check_contents(run.config, run.mix, run.held_out, run.budget, run.loss) != run.resume_from:
        raise ConfigError(
            f"{run.config.output}: another run has saved a checkpoint since this one started: nothing was changed. "
            "Run the same command again."
        )
    on_begin()
    if run.resume_from is None:
        with saving(run.config.output):
            begin_output(run.config, _record(run, student))


def _train_into_output(
    run: CheckedRun,
    data: RunData,
    student: RunStudent,
    matching: HiddenStateMatching | None,
    teachers: list[TeacherHead],
    on_stage: Callable[[str], None],
    report: _Report,
    trainer: DistillTrainer,
    installed: ExitStack,
) -> TrainSummary:
    """Args: installed: removes what the trainer has put into the model, which is saved without it."""
    config, mix, budget, on_log = run.config, run.mix, run.budget, report.on_logs
    with installed:
        for teacher in teachers:
            teacher.share(student.head)
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

    seen = [] if len(data.parts) == 1 else mix.seen(budget.rows_after(state.global_step))
    evaluations = [
        {"step": entry["step"], **_without_prefix(entry)} for entry in state.log_history if "eval_kl" in entry
    ]
    with saving(config.output):
        _save(run, trainer, student, seen, _without_prefix(metrics), evaluations)
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


def _record(run: CheckedRun, student: RunStudent) -> dict[str, Any]:
    """The record of a run that begins."""
    return {
        **record_of(run.config, run.mix, run.held_out, run.budget, run.loss),
        "arithmetic": used_arithmetic(run.arguments),
        "student_fingerprint": student.fingerprint,
        **({} if student.base_weights is None else {"adapted_weights": student.base_weights}),
    }


@contextmanager
def _trainer(
    run: CheckedRun, data: RunData, student: RunStudent, matching: HiddenStateMatching | None, report: TrainerCallback
) -> Iterator[DistillTrainer]:
    """A trainer. At the end, also after an error, what it put into the model is removed: a loaded model still belongs
    to the caller."""
    callbacks = [report]
    if run.stopping:
        callbacks.append(EarlyStopping([str(each) for each in run.stopping], run.config.early_stopping_mode))
    with own_forward(student.adapted or student.model):
        trainer = DistillTrainer(
            head=student.head,
            model=student.adapted,
            loss=run.loss,
            eval_loss=run.eval_loss,
            resample=run.config.resample,
            matching=matching,
            args=run.arguments,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            processing_class=run.tokenizer,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)  # the library prints nothing
        try:
            yield trainer
        finally:
            if matching is not None:
                matching.detach(student.model)


def _save(
    run: CheckedRun,
    trainer: DistillTrainer,
    student: RunStudent,
    seen: list[dict[str, Any]],
    metrics: dict[str, float],
    evaluations: list[dict[str, float]],
) -> None:
    """The student with its tokenizer and card, then the state of the run, which says that it is finished."""
    config, state = run.config, trainer.state
    if student.adapted is not None and config.merge_adapter:
        trainer.model = merged(student.adapted)
    replaceable = is_replaceable(Path(config.output))  # before peft writes a card of its own
    trainer.save_model()
    if seen and state.is_world_process_zero:
        record_seen(config, seen)
    if replaceable and state.is_world_process_zero:
        write_card(_origin(run, state.global_step), _held_out(run, metrics), evaluations)
    trainer.save_state()


def _held_out(run: CheckedRun, metrics: dict[str, float]) -> HeldOut | None:
    """What the card says of the last evaluation, which is over all rows and without intervals."""
    cache, loss, crossed = run.held_out, run.eval_loss, run.config.cross_tokenizer is not None
    if cache is None or loss is None or run.config.eval_cache is None:
        return None
    relations: dict[str, Relation] = {"kl": loss.kl_estimate_kind}
    found = {
        name: Metric(value=value, error=None, relation=relations.get(name, "full")) for name, value in metrics.items()
    }
    if crossed or metrics["ce"] > MOST_NATS:
        found.pop("perplexity")
    tokens = None if crossed else cache.num_loss_tokens
    return HeldOut(cache=run.config.eval_cache, metrics=found, tokens=tokens, rows=len(cache), all_rows=len(cache))


def _origin(run: CheckedRun, steps: int) -> Origin:
    config = run.config
    return Origin(
        output=Path(config.output).resolve(),
        student=None if config.student is None or config.student_random else model_name(config.student),
        caches=tuple(run.mix.caches),
        steps=steps,
        adapter=config.lora is not None and not config.merge_adapter,
    )


def _training_stage(run: CheckedRun, data: RunData, student: RunStudent, matching: HiddenStateMatching | None) -> str:
    projections = 0 if matching is None else sum(p.numel() for p in matching.parameters())
    trained = sum(p.numel() for p in student.model.parameters() if p.requires_grad) - projections
    total = "" if trained == student.parameters else f" of {student.parameters / 1e6:.1f}"
    passes = run.budget.rows_after(run.budget.steps) / run.mix.rows
    repeats = "" if passes == 1.0 else f", {passes:.3g} times"
    portions = zip(run.mix.portions, data.parts, strict=True)
    loss_tokens = sum(each.passes(each.rows) * part.loss_tokens for each, part in portions)
    text = f"{quantity(run.mix.rows, 'row')}, {loss_tokens:,.0f} loss tokens{repeats}"
    return f"training {trained / 1e6:.1f}{total} M parameters on {text}, {describe_arithmetic(run.arguments)}"


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
    def __init__(self, on_step: Callable[[int, int], None], on_log: Callable[[dict[str, Any]], None]) -> None:
        self.on_step, self.on_logs = on_step, on_log

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.on_step(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            self.on_logs({**logs, "step": state.global_step})
