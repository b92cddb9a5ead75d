"""The figures of a report: a chart, a sentence that says how to read it, and the same numbers as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from pipeline.report.bins import Bins, by_confidence, by_entropy, by_frequency
from pipeline.report.charts import Series, category_chart, line_chart, reliability_chart
from pipeline.report.sources import Student
from pipeline.report.student_positions import StudentPositions
from pipeline.report.teacher_positions import TeacherPositions

TEACHER = 0
"""Colour of the teacher; students follow in their order."""

MOST_ROWS = 200
"""Of a table of training logs; of more, every n-th is shown."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Attributes: columns, rows: the table; its first column names the row."""

    title: str
    note: str
    chart: Markup
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def difference_figures(
    teacher: TeacherPositions, students: Mapping[str, StudentPositions], *, at_one: bool
) -> list[Figure]:
    """Where students differ from the teacher; without students where the teacher is uncertain.

    Args:
        students: by label, in the order of their colours.
        at_one: the teacher's probabilities are at temperature 1, so its calibration can be judged.
    """
    kl = {label: each.kl for label, each in students.items()}
    entropies = f"nats, mean {teacher.entropy.mean():.3f}" if len(teacher.entropy) else "nats"
    figures = [
        _binned(
            by_entropy(teacher.entropy, kl),
            title="KL by teacher entropy" if kl else "Teacher entropy",
            note="Where the teacher is certain (left), a student can be right or wrong; where it is not, only near or far."
            if kl
            else "How uncertain the teacher is about the next token.",
            x_label=f"teacher entropy ({entropies})",
            y_label="mean KL (nats)" if kl else "share of loss tokens",
        ),
        _binned(
            by_frequency(teacher.labels, kl or {"teacher entropy": teacher.entropy}),
            title="KL by token frequency" if kl else "Teacher entropy by token frequency",
            note="Frequency of the true token in the text that was read.",
            x_label="occurrences of the true token",
            y_label="mean KL (nats)" if kl else "mean entropy (nats)",
        ),
    ]
    sides = {label: by_confidence(each.confidence, each.right) for label, each in students.items()}
    if at_one:
        sides = {"teacher": by_confidence(teacher.confidence, teacher.right), **sides}
    if any(bins.occupied.any() for bins in sides.values()):
        figures.append(_reliability(sides, first=TEACHER if at_one else TEACHER + 1))
    return figures


def _binned(bins: Bins, *, title: str, note: str, x_label: str, y_label: str) -> Figure:
    total = max(1, int(bins.counts.sum()))
    shares = bins.counts / total
    curves = bins.means or {"": np.where(bins.occupied, shares, np.nan)}
    first = TEACHER if len(curves) == 1 and not bins.means else TEACHER + 1
    series = [
        Series(name, [(i, float(v)) for i, v in enumerate(values) if math.isfinite(v)], first + k)
        for k, (name, values) in enumerate(curves.items())
    ]
    return Figure(
        title=title,
        note=f"{note} Grey bars: number of loss tokens.",
        chart=category_chart(
            bins.names, bins.counts.tolist(), series, title=f"{title}. See the table.", x_label=x_label, y_label=y_label
        ),
        columns=["bin", "loss tokens", "share", *bins.means],
        rows=[
            [name, f"{bins.counts[i]:,}", f"{shares[i]:.1%}", *(_number(values[i]) for values in bins.means.values())]
            for i, name in enumerate(bins.names)
        ],
    )


def _reliability(sides: Mapping[str, Bins], first: int) -> Figure:
    title = "Reliability"
    series = []
    for k, (name, bins) in enumerate(sides.items()):
        points = zip(bins.means["confidence"][bins.occupied], bins.means["right"][bins.occupied], strict=True)
        series.append(Series(name, [(float(a), float(b)) for a, b in points], first + k))
    columns = ["confidence"]
    for name in sides:
        columns += [f"{name}: loss tokens", f"{name}: mean confidence", f"{name}: share right"]
    return Figure(
        title=title,
        note="Predictions by confidence, against the text. Above the diagonal a model is right more often than it says.",
        chart=reliability_chart(
            series,
            title=f"{title} diagram. See the table.",
            x_label="confidence (probability of the top token)",
            y_label="share of top tokens that are true",
        ),
        columns=columns,
        rows=[
            [
                name,
                *(
                    cell
                    for bins in sides.values()
                    for cell in (
                        f"{bins.counts[i]:,}",
                        _number(bins.means["confidence"][i]),
                        _number(bins.means["right"][i]),
                    )
                ),
            ]
            for i, name in enumerate(next(iter(sides.values())).names)
        ],
    )


METRICS = {
    "kl": ("KL to the teacher", "nats"),
    "ce": ("Cross-entropy", "nats"),
    "agreement": ("Agreement", "share of loss tokens"),
    "learning_rate": ("Learning rate", ""),
}


def training_figures(students: Sequence[Student]) -> list[Figure]:
    """Curves of the runs among `students`: on training batches, and held out."""
    figures = []
    for metric, (title, unit) in METRICS.items():
        series, rows = [], []
        for i, student in enumerate(students):
            history = () if student.run is None else student.run.history
            for name, what, faint in (
                (metric, "training", metric != "learning_rate"),
                (f"eval_{metric}", "held out", False),
            ):
                points = [(each["step"], each[name]) for each in history if name in each]
                if points:
                    series.append(Series(student.label, points, TEACHER + 1 + i, faint))
                    every = math.ceil(len(points) / MOST_ROWS)
                    rows += [[f"{step:,.0f}", student.label, what, f"{value:.4g}"] for step, value in points[::every]]
        if series:
            figures.append(
                Figure(
                    title=title,
                    note=""
                    if metric == "learning_rate"
                    else "Marked: on the held-out cache. Thin: on the batches since the last log.",
                    chart=line_chart(
                        series,
                        title=f"{title} over training steps. See the table.",
                        x_label="optimizer step",
                        y_label=f"{title} ({unit})" if unit else title,
                    ),
                    columns=["step", "student", "text", title],
                    rows=rows,
                )
            )
    return figures


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "—"
