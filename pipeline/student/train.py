"""One run of stage two: checks, student, Trainer, checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.heads import open_head
from pipeline.objective import objective_for
from pipeline.student.arguments import TrainStudentConfig, training_arguments
from pipeline.student.checks import check_isolation, check_same_teacher_tokens, check_student
from pipeline.student.data import WINDOW, CacheDataset
from pipeline.student.forward import remove_distillation_forward
from pipeline.student.output import begin_output, check_output
from pipeline.student.recipe import LossRecipe, realized_warnings
from pipeline.student.students import EITHER, load_student
from pipeline.student.trainer import DistillTrainer


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """What a finished run left in `output`."""

    output: str
    steps: int
    train_loss: float | None  # mean over the steps of this call; None if it was resumed with none left
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
    config = replace(config, output=str(Path(config.output).expanduser()))
    cache = cf.open_cache(config.cache, cached_record_batches=WINDOW + 1)
    held_out = None if config.eval_cache is None else cf.open_cache(config.eval_cache)
    recipe = LossRecipe.for_cache(
        cache,
        kd_weight=config.kd_weight,
        temperature=config.temperature,
        tail=config.tail,
        divergence=config.divergence,
        position_weighting=config.position_weighting,
        kd_schedule=config.kd_schedule,
        temperature_schedule=config.temperature_schedule,
    )
    eval_recipe = None if held_out is None else recipe.for_held_out(held_out)
    if config.resample and cache.metadata.num_samples == 1:
        raise ConfigError(
            f"--resample: {cache.path} has one sample of the tail at each position. Leave it out, or cache with "
            "--samples 2 or more."
        )
    if (config.student is None) == (config.student_config is None):
        raise ConfigError(EITHER)
    tokenizer, warnings = check_student(
        [cache] if held_out is None else [cache, held_out],
        config.student,
        config_file=config.student_config,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    for each, loss in ((cache, recipe), (held_out, eval_recipe)):
        if each is not None and loss is not None and loss.tail == "realized":
            warnings += realized_warnings(each)
    if held_out is not None:
        warnings += check_same_teacher_tokens(cache, held_out)
    arguments = training_arguments(config)
    if arguments.n_gpu > 1:
        warnings.append(
            f"{arguments.n_gpu} GPUs are visible, one is used. For all of them: torchrun --nproc-per-node "
            f"{arguments.n_gpu} --no-python distill train-student …"
        )
        arguments._n_gpu = 1  # else Trainer would use nn.DataParallel, which cannot split sparse targets
    resume_from = check_output(config, cache)
    for warning in warnings:
        on_warning(warning)

    on_stage("loading the student")
    objective = objective_for(cache.metadata.alignment)
    model = load_student(
        config.student,
        layers=config.student_layers,
        config_file=config.student_config,
        vocab_size=cache.metadata.vocab_size,
        seed=arguments.seed,
        objective=objective,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    head = open_head(model, cache.metadata.vocab_size, masked=objective == "masked")
    check_isolation(cache, head)

    # Only now that everything has been loaded is what --overwrite names deleted.
    PartialState().wait_for_everyone()
    if arguments.process_index == 0 and resume_from is None:
        begin_output(config, cache)
    trainer = DistillTrainer(
        head=head,
        recipe=recipe,
        eval_recipe=eval_recipe,
        resample=config.resample,
        args=arguments,
        train_dataset=CacheDataset(cache),
        eval_dataset=None if held_out is None else CacheDataset(held_out),
        processing_class=tokenizer,
        callbacks=[_Report(on_step, on_log)],
    )
    trainer.remove_callback(PrinterCallback)  # the command line shows progress, not the library
    parameters = sum(p.numel() for p in model.parameters())
    on_stage(
        f"training {parameters / 1e6:.1f} M parameters on {len(cache):,} rows, {cache.num_counted_tokens:,} targets"
    )
    try:
        result = trainer.train(resume_from_checkpoint=resume_from)
    except cf.CacheError as error:
        raise type(error)(_own_message(error)) from error
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"--batch-size {arguments.per_device_train_batch_size}: out of memory on {arguments.device}. Use a smaller "
            "one with as many --gradient-accumulation-steps more, or --gradient-checkpointing."
        ) from error
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
        train_loss=trainer.mean_loss(),
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
