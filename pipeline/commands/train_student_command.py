"""`distill train-student`: cache and student in, checkpoint out."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import click

from pipeline.commands.push_command import check_visibility, public_option, upload_student
from pipeline.student.train_config import TrainStudentConfig
from pipeline.terminal.click_options import build_config, config_options, distill_command, interrupted, json_option


@distill_command(
    "train-student",
    "distill train-student --cache caches/train --student models/student --output students/first",
    "distill train-student --cache caches/train --eval-cache caches/heldout \\",
    "    --student models/teacher --student-layers 6 --output students/six-layers",
    config=TrainStudentConfig,
)
@config_options(TrainStudentConfig)
@click.option(
    "--push-to-hub",
    metavar="OWNER/NAME",
    help="Upload the trained student, as distill push does.",
)
@public_option()
@json_option()
def command(
    config_file: str | None, push_to_hub: str | None, public: bool | None, json_file: str | None, **given: Any
) -> None:
    """Train a student on a cache.

    The result is a plain transformers directory with its tokenizer. On several GPUs: torchrun --nproc-per-node N
    --no-python distill train-student …
    """
    config = build_config(TrainStudentConfig, given, config_file)
    check_visibility(push_to_hub, public)
    _check_inputs(config)
    first = int(os.environ.get("RANK", "0")) == 0  # of the processes of torchrun
    if push_to_hub is not None and first:
        from pipeline.hub import open_student_repository

        open_student_repository(push_to_hub, private=not public)
    from pipeline.terminal.console import Status, quiet_libraries, show_result

    quiet_libraries()
    from pipeline.student.training.output_directory import last_checkpoint
    from pipeline.student.training.train import train_student
    from pipeline.terminal.training_views import held_out_line, mixture_lines, step_facts, training_view

    facts: dict[str, Any] = {}
    begun = False

    def begin() -> None:
        nonlocal begun
        begun = True

    def log(logs: dict[str, Any]) -> None:
        nonlocal facts
        if "loss" in logs:
            facts = step_facts(logs)
        elif "eval_kl" in logs:
            status.line(held_out_line(logs))
        elif "mixture" in logs:
            for line in mixture_lines(logs["mixture"]):
                status.line(line)
        elif "stopped" in logs:
            status.line(f"step {logs['step']:,} stopped early: {'; '.join(logs['stopped'])}")

    with Status() as status:
        try:
            summary = train_student(
                config,
                on_stage=status.stage,
                on_begin=begin,
                on_step=lambda step, total: status.step(step, total, "steps", **facts),
                on_log=log,
                on_warning=status.warn,
            )
        except KeyboardInterrupt:
            if not begun:
                interrupted("nothing was changed. Run the same command again.")
            if last_checkpoint(config.output) is None:
                interrupted(f"no checkpoint was saved in {config.output} yet. Start again with --overwrite.")
            interrupted(f"checkpoints are kept in {config.output}. Continue from the last one with --resume.")
    try:
        if push_to_hub is not None and first:
            upload_student(config.output, push_to_hub, bool(public))
    finally:  # the result is shown even if the upload fails
        if not status.silent:
            show_result(lambda: training_view(asdict(summary)), lambda: asdict(summary), json_file)


def _check_inputs(config: TrainStudentConfig) -> None:
    """Finds a wrong path in a fraction of a second, before torch is imported."""
    import cache_format as cf
    from pipeline.models.paths import check_model_path
    from pipeline.student.cache_paths import parse_weight

    caches = (config.cache,) if isinstance(config.cache, str) else config.cache
    paths = [parse_weight(cache)[0] for cache in caches]
    for path in (*paths, *([] if config.eval_cache is None else [config.eval_cache])):
        if "://" not in path:
            cf.open_cache(path)
    if config.student is not None:
        check_model_path(config.student)
