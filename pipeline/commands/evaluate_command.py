"""`distill evaluate`: students next to each other on a held-out cache."""

from __future__ import annotations

from typing import Any

import click

from pipeline.commands.click_options import (
    DistillCommand,
    config_options,
    examples,
    here_with_flags,
    json_option,
    read_values,
)
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.options import build


@click.command(
    "evaluate",
    cls=DistillCommand,
    config=EvaluateConfig,
    epilog=examples("distill evaluate --cache caches/heldout --student students/first --student models/student"),
)
@config_options(EvaluateConfig, multiple=("student",))
@json_option()
def command(config_file: str | None, json_file: str | None, **given: Any) -> None:
    """Compare students with their teacher on a held-out cache.

    Give --student several times to compare several.
    """
    values = read_values(EvaluateConfig, given, config_file)
    students = values.pop("student")
    configs = [
        build(EvaluateConfig, {**values, "student": student})
        for student in ((students,) if isinstance(students, str) else students)
    ]
    import cache_format as cf
    from pipeline.models.paths import check_model_path

    if "://" not in configs[0].cache:
        cf.open_cache(configs[0].cache)
    for config in configs:
        check_model_path(config.student)
    from pipeline.terminal.console import Status, quiet_libraries, show_result

    quiet_libraries()
    from pipeline.evaluation.held_out import evaluate
    from pipeline.terminal.training_views import evaluation_view

    results: dict[str, dict[str, Any]] = {}
    with Status(here_with_flags) as status:
        for config in configs:
            result = evaluate(
                config,
                on_stage=lambda text, student=config.student: status.stage(f"{student}: {text}"),  # type: ignore[misc]
                on_progress=lambda done, total: status.step(done, total, "rows"),
            )
            results[config.student] = result.to_json()
    cache = configs[0].cache
    show_result(
        lambda: evaluation_view(f"Held out: {cache}", results),
        lambda: {"cache": cache, "students": results},
        json_file,
    )
