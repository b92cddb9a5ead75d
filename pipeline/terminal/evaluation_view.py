"""What `evaluate` prints: a column per student, a row per metric, and their paired comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.evaluation.evaluate_config import FEW_NOTE, shown_number, shown_perplexity
from pipeline.terminal.tables import Unbroken, titled
from pipeline.terminal.training_views import KL_NOTES

Values = Mapping[str, Any]
COLUMNS = 4  # that fit 80 characters

# Metric, title, format. Metrics that a cache cannot give have no row.
NATS, SHARE, COUNT = "{:.4f}", "{:.1%}", "{:,.2f}"
AGREEMENT = ("agreement", "agreement", SHARE)
ROWS = (
    ("kl", "KL to teacher", NATS),
    ("ce", "CE (nats)", NATS),
    ("perplexity", "perplexity", COUNT),
    AGREEMENT,
    ("top5_agreement", "agreement, top 5", SHARE),
    ("ece", "calibration error", SHARE),
    ("ece_teacher", "calibration, teacher", SHARE),
    ("acceptance", "acceptance", SHARE),
    *((f"tokens_{k}", f"tokens/pass, γ = {k}", COUNT) for k in (1, 2, 4, 8)),
)


def evaluation_view(
    title: str,
    students: Mapping[str, Values],
    comparisons: Mapping[str, Values] | None = None,
    teacher_tasks: Values | None = None,
    by: str | None = None,
) -> RenderableType:
    """Students side by side; up to two with the half width of each 95 % confidence interval.

    Args:
        comparisons: with the first student, by the name of each other one.
        teacher_tasks: the teacher's scores on the tasks; it has no column without them.
        by: the column of the data that the groups of the students are the values of.
    """
    letters = [f"student {chr(65 + i)}" if len(students) > 1 else "student" for i in range(len(students))]
    columns = list(zip(letters, students.values(), strict=True))
    if teacher_tasks:
        columns.append(("teacher", {"metrics": {}, "tasks": teacher_tasks}))
    crossed = any(values.get("compared") is not None for values in students.values())
    with_error = len(students) <= 2
    tables = [
        _table(columns[i : i + COLUMNS], crossed=crossed, with_error=with_error)
        for i in range(0, len(columns), COLUMNS)
    ]
    if by is not None:
        tables += [
            _groups(by, columns[i : i + COLUMNS], with_error=with_error) for i in range(0, len(students), COLUMNS)
        ]
    lines = [f"{letter}: {student}" for letter, student in zip(letters, students, strict=True)]
    for letter, student in zip(letters, students, strict=True):
        line = comparison_line(letters[0], letter, (comparisons or {}).get(student, {}))
        lines += [] if line is None else [line]
    kinds = {values.get("kl_estimate_kind") for values in students.values()}
    lines += [f"KL: {note}" for kind, note in KL_NOTES.items() if kind in kinds]
    if any(metric.endswith("_high") for values in students.values() for metric in values["metrics"]):
        lines.append("low–high: bounds, because the cache does not have the full distribution")
    if any(metric["error"] is not None for values in students.values() for metric in values["metrics"].values()):
        lines.append(
            "±: 95 % confidence interval over rows" + ("" if with_error else "; --json has that of each value")
        )
    if any(part.get("few") for values in students.values() for part in (values, *values.get("groups", {}).values())):
        lines.append(FEW_NOTE)
    if any(values.get("tasks") for values in students.values()):
        lines.append("tasks: ± is the standard error of lm-eval")
    if crossed:
        lines.append("KL and agreement are 0 where there is no teacher. Compare only students that share a tokenizer.")
    return Group(titled(title, tables[0]), *map(Unbroken, tables[1:]), *map(Text, lines))


def _table(columns: Sequence[tuple[str, Values]], *, crossed: bool, with_error: bool) -> Table:
    table = Table(header_style="bold", box=SIMPLE_HEAD, show_edge=False)
    table.add_column("")
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    students = [values for _, values in columns]
    for metric, label, form in ROWS:
        if crossed and metric == "perplexity":  # not comparable across tokenizers
            continue
        cells = [_cell(values, metric, form, with_error) for values in students]
        if any(cells):
            table.add_row(label, *cells)
    if crossed:
        table.add_row("compared", *(f"{values['compared']:.1%}" if "compared" in values else "" for values in students))
    table.add_row("loss tokens", *map(_tokens, students))
    for task in dict.fromkeys(task for values in students for task in values.get("tasks", {})):
        table.add_row(task, *(_task(values.get("tasks", {}).get(task), with_error) for values in students))
    return table


def _groups(by: str, columns: Sequence[tuple[str, Values]], *, with_error: bool) -> Table:
    """A row for each value of the column `by`, those with most loss tokens first."""
    students = [(name, values) for name, values in columns if "groups" in values]
    table = Table(header_style="bold", box=SIMPLE_HEAD, show_edge=False)
    table.add_column(by, overflow="ellipsis", no_wrap=True, max_width=24)
    table.add_column("loss tokens", justify="right", no_wrap=True)
    shown = [("kl", "KL", NATS)] if len(students) > 1 else [("kl", "KL", NATS), ("ce", "CE", NATS), AGREEMENT]
    for name, _ in students:
        for _, title, _ in shown:
            table.add_column(f"{title} {name[-1]}" if len(students) > 1 else title, justify="right", no_wrap=True)
    for value, group in students[0][1]["groups"].items():
        cells = [
            _cell(values["groups"].get(value, {"metrics": {}}), metric, form, with_error)
            for _, values in students
            for metric, _, form in shown
        ]
        table.add_row(Text(value), f"{'*' if group['few'] else ''}{group['tokens']:,}", *cells)
    return table


KL_NAMES = {"lower bound": "the lower bound on KL", "entries only": "KL over the cached entries"}
"""By relation; a student may be nearer to the teacher in one of these and farther in KL."""


def comparison_line(first: str, second: str, differences: Values) -> str | None:
    """Which of two students is nearer to the teacher, and by how much; None if that is not known."""
    kl = differences.get("kl")
    if kl is None or kl["error"] is None:
        return None
    by = f"{abs(kl['value']):.4f} ± {kl['error']:.4f} nats of {KL_NAMES.get(kl['relation'], 'KL')}"
    if abs(kl["value"]) <= kl["error"]:
        return f"no difference between {first} and {second} beyond the error: {by}"
    if not kl["better"]:
        lower, higher = (second, first) if kl["value"] < 0 else (first, second)
        return f"{lower} is below {higher} by {by}; this does not say which is better"
    better, worse = (second, first) if kl["better"] == "b" else (first, second)
    return f"{better} is better than {worse} by {by}"


def _cell(student: Values, name: str, form: str, with_error: bool) -> str:
    metrics = student["metrics"]
    if name == "perplexity" and (nats := metrics["ce"]["value"] if "ce" in metrics else student.get("ce")) is not None:
        error = metrics.get(name, {}).get("error")
        return shown_perplexity(nats) + (f" ± {shown_number(error)}" if with_error and error is not None else "")
    if name not in metrics:  # as in a report, which has means alone
        return form.format(student[name]) if name in student else ""
    value, error = metrics[name]["value"], metrics[name]["error"]
    high = metrics.get(f"{name}_high")
    if high is not None:
        return f"{form.format(value).rstrip('%')}–{form.format(high['value'])}"
    return form.format(value) + (f" ± {form.format(error).rstrip('%')}" if with_error and error is not None else "")


def _tokens(student: Values) -> str:
    return f"{'*' if student.get('few') else ''}{student['tokens']:,}" if "tokens" in student else ""


def _task(score: Values | None, with_error: bool) -> str:
    if score is None:
        return ""
    return f"{score['value']:.4f}" + (f" ± {score['error']:.4f}" if with_error and score["error"] is not None else "")
