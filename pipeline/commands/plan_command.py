"""`distill plan`: what a cache will cost, before days of work."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from pipeline.commands.cache_teacher_command import check_inputs
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.generation.generation_config import GENERATION
from pipeline.teacher.writing.worker_config import PROCESSES
from pipeline.terminal.click_options import build_config, config_options, distill_command, json_option

# What only the writing of a cache needs.
_WITHOUT_GROUPS = (GENERATION, PROCESSES)


def _without() -> tuple[str, ...]:
    from pipeline.options import options_of

    declared = options_of(CacheTeacherConfig).values()
    return ("overwrite", *(each.name for each in declared if each.metadata.group in _WITHOUT_GROUPS))


@distill_command(
    "plan",
    "distill plan --teacher models/teacher --data data/train.jsonl --output caches/train",
    "distill plan --teacher models/teacher --data data/train.jsonl --output caches/train \\",
    "    --targets threshold --tail-threshold 0.02 --cost-per-hour 2.5",
    config=CacheTeacherConfig,
)
@config_options(CacheTeacherConfig, without=_without())
@click.option(
    "--rows",
    type=click.IntRange(1),
    help="Number of rows to run, spread over the text. [default: about 32,768 tokens]",
)
@click.option("--cost-per-hour", type=float, help="Price of this machine, in any currency.")
@json_option()
def command(
    config_file: str | None, rows: int | None, cost_per_hour: float | None, json_file: str | None, **given: Any
) -> None:
    """Predict size and time of a cache.

    Takes the options of cache-teacher, runs the teacher on a few rows, and compares several kinds of targets. Writes
    nothing to the output directory.
    """
    config = build_config(CacheTeacherConfig, given, config_file)
    check_inputs(config)
    from pipeline.terminal.console import Status, quiet_libraries, show_result

    quiet_libraries()
    from pipeline.teacher.plan import plan_cache
    from pipeline.teacher.text.reading.data_paths import data_name
    from pipeline.terminal.capture_views import plan_view
    from pipeline.terminal.tables import size

    with Status() as status:
        plan = plan_cache(
            config,
            sample_rows=rows,
            cost_per_hour=cost_per_hour,
            on_stage=status.stage,
            on_progress=lambda done, total: status.step(done, total, "rows"),
            on_warning=status.warn,
        )
        if status.silent:
            return
        show_result(lambda: plan_view(plan), lambda: {**asdict(plan), "fits": plan.fits}, json_file)
        if plan.position_loss is not None and (worse := plan.position_loss.worse):
            status.warn(
                f"{data_name(config.data.data)}: the teacher predicts later windows of long documents worse than first "
                f"ones at the same positions: {worse[1].nats:.2f} instead of {worse[0].nats:.2f} nats per token, and a "
                "student would learn that. Give them more context: use a larger `seq_len` or `overlap`."
            )
        if not plan.fits:
            status.warn(
                f"{config.output}: {size(plan.free_bytes or 0)} are free there, but the cache will take about "
                f"{size(plan.chosen.bytes[plan.encoding])}. Choose another place, or fewer bytes per token."
            )
