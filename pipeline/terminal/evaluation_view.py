"""What `evaluate` prints: a column per student, a row per metric, and their paired comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.terminal.tables import titled
from pipeline.terminal.training_views import LOWER_BOUND

Values = Mapping[str, Any]

# Metric, title, format. Metrics that a cache cannot give have no row.
NATS, SHARE, COUNT = "{:.4f}", "{:.1%}", "{:,.2f}"
ROWS = (
    ("kl", "KL to teacher", NATS),
    ("ce", "CE (nats)", NATS),
    ("perplexity", "perplexity", COUNT),
    ("agreement", "agreement", SHARE),
    ("top5_agreement", "agreement, top 5", SHARE),
    ("ece", "calibration error", SHARE),
    ("ece_teacher", "… to teacher", SHARE),
    ("acceptance", "acceptance", SHARE),
    *((f"tokens_{k}", f"tokens per run, {k} drafted", COUNT) for k in (1, 2, 4, 8)),
)


def evaluation_view(
    title: str, students: Mapping[str, Values], comparisons: Mapping[str, Values], teacher_tasks: Values
) -> RenderableType:
    """Students side by side, each value with the half width of its 95 % confidence interval.

    Args:
        comparisons: with the first student, by the name of each other one.
        teacher_tasks: the teacher's scores on the tasks; it has no column without them.
    """
    crossed = any(values.get("compared") is not None for values in students.values())
    names = [f"student {chr(65 + i)}" if len(students) > 1 else "student" for i in range(len(students))]
    table = Table(header_style="bold", box=SIMPLE_HEAD, show_edge=False)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    if teacher_tasks:
        table.add_column("teacher", justify="right")
    for metric, label, form in ROWS:
        if crossed and metric == "perplexity":  # not comparable across tokenizers
            continue
        cells = [_cell(values["metrics"], metric, form) for values in students.values()]
        if any(cells):
            table.add_row(label, *cells)
    if crossed:
        table.add_row("compared", *(f"{values['compared']:.1%}" for values in students.values()))
    for task in dict.fromkeys(task for values in students.values() for task in values.get("tasks", {})):
        scores = [values.get("tasks", {}).get(task) for values in students.values()]
        table.add_row(task, *map(_task, [*scores, *([teacher_tasks.get(task)] if teacher_tasks else [])]))
    table.add_row("loss tokens", *(f"{values['tokens']:,}" for values in students.values()))
    lines = [f"{name}: {student}" for name, student in zip(names, students, strict=True)]
    lines += [
        line
        for name, compared in zip(names[1:], comparisons.values(), strict=True)
        if (line := comparison_line(names[0], name, compared)) is not None
    ]
    if any(values["kl_estimate_kind"] == "lower bound" for values in students.values()):
        lines.append(f"KL: {LOWER_BOUND}")
    if any(metric.endswith("_high") for values in students.values() for metric in values["metrics"]):
        lines.append("low – high: bounds, because the cache does not have the full distribution")
    lines.append("±: 95 % confidence over rows")
    if crossed:
        lines.append("KL and agreement are 0 where there is no teacher. Compare only students that share a tokenizer.")
    return Group(titled(title, table), *map(Text, lines))


def comparison_line(first: str, second: str, differences: Values) -> str | None:
    """Which of two students is nearer to the teacher, and by how much; None if that is not known."""
    kl = differences.get("kl")
    if kl is None or kl["error"] is None:
        return None
    by = f"{abs(kl['value']):.4f} ± {kl['error']:.4f} nats of KL"
    if not kl["better"]:
        return f"{first} and {second} do not differ: {by}"
    better, worse = (second, first) if kl["better"] == "b" else (first, second)
    return f"{better} is better than {worse} by {by}"


def _cell(metrics: Values, name: str, form: str) -> str:
    if name not in metrics:
        return ""
    show: Callable[[float], str] = form.format
    low, high = metrics[name], metrics.get(f"{name}_high")
    if high is not None:
        return f"{show(low['value'])} – {show(high['value'])}"
    return show(low["value"]) + ("" if low["error"] is None else f" ± {show(low['error']).rstrip('%')}")


def _task(score: Values | None) -> str:
    if score is None:
        return ""
    return f"{score['value']:.4f}" + ("" if score["error"] is None else f" ± {score['error']:.4f}")
