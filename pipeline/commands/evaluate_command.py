"""`distill evaluate`: students next to each other on a held-out cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.options import build
from pipeline.terminal.click_options import config_options, distill_command, json_option, read_values

if TYPE_CHECKING:
    from pipeline.evaluation.metrics import Evaluation


@distill_command(
    "evaluate",
    "distill evaluate --cache caches/heldout --student students/first --student models/student",
    config=EvaluateConfig,
)
@config_options(EvaluateConfig, multiple=("student",))
@json_option()
def command(config_file: str | None, json_file: str | None, **given: Any) -> None:
    """Compare students with their teacher on a held-out cache.

    Repeat --student to compare further students with the first one, row by row.
    """
    values = read_values(EvaluateConfig, given, config_file)
    students = values.pop("student")
    _check_distinct((students,) if isinstance(students, str) else students)
    configs = [
        build(EvaluateConfig, {**values, "student": student})
        for student in ((students,) if isinstance(students, str) else students)
    ]
    configs[1:] = [replace(config, teacher=None) for config in configs[1:]]  # it is scored once
    import cache_format as cf
    from pipeline.models.paths import check_model_path

    if "://" not in configs[0].cache:
        cf.open_cache(configs[0].cache)
    for model in (*(config.student for config in configs), *filter(None, [configs[0].teacher])):
        check_model_path(model)
    from pipeline.terminal.console import Status, quiet_libraries, show_result

    quiet_libraries()
    from pipeline.evaluation.held_out import evaluate
    from pipeline.evaluation.metrics import compare, compare_by_value
    from pipeline.terminal.evaluation_view import evaluation_view

    found: dict[str, Evaluation] = {}
    with Status() as status:
        for config in configs:
            found[config.student] = evaluate(
                config,
                on_stage=lambda text, student=config.student: status.stage(f"{student}: {text}"),  # type: ignore[misc]
                on_warning=status.warn,
                on_progress=lambda done, total: status.step(done, total, "rows"),
            )
    results = {student: evaluation.to_json() for student, evaluation in found.items()}
    scores = [values.pop("teacher_tasks") for values in results.values()][0]
    first, *others = found
    comparisons = {other: compare(found[first], found[other]) for other in others}
    by_value = {other: compare_by_value(found[first], found[other]) for other in others}
    cache, by = configs[0].cache, configs[0].by
    show_result(
        lambda: evaluation_view(f"Held out: {cache}", results, comparisons, scores, by=by),
        lambda: {
            "cache": cache,
            "students": results,
            "compared_with_first": comparisons,
            "teacher_tasks": scores,
            **({} if by is None else {"by": by, "groups_compared_with_first": by_value}),
        },
        json_file,
    )


def _check_distinct(students: Sequence[str]) -> None:
    """Raises: ConfigError for a student that is named twice: results are by name."""
    for i, student in enumerate(students):
        if student in students[:i]:
            raise ConfigError(f"`student` {student}: is named twice. Name each student once.")
