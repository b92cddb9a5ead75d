"""The figures of a report: a chart, a sentence that says how to read it, and the same numbers as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from pipeline.evaluation.report.bins import Bins, by_confidence, by_entropy, by_frequency
from pipeline.evaluation.report.charts import Series, category_chart, line_chart, reliability_chart
from pipeline.evaluation.report.report_sources import Student
from pipeline.evaluation.report.student_positions import StudentPositions
from pipeline.evaluation.report.teacher_positions import TeacherPositions

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
    teacher: TeacherPositions, students: Mapping[str, StudentPositions], *, calibrates: bool
) -> list[Figure]:
    """Where students differ from the teacher; without students, where the teacher is uncertain and how often right.

    Args:
        students: by label, in the order of their colours.
        calibrates: the teacher's probabilities are its own at temperature 1, so its calibration can be judged.
    """
    entropy, labels = teacher.entropy, teacher.labels
    mean = f", mean {entropy.mean():.3f}" if len(entropy) else ""
    by_nats = {"x_label": f"{teacher.entropy_name} (nats{mean})"}
    by_count = {"x_label": "occurrences of the true token"}
    if students:
        kl = {label: each.kl for label, each in students.items()}
        colours = range(TEACHER + 1, TEACHER + 1 + len(kl))
        by_nats |= {"title": "KL by teacher entropy", "y_label": "mean KL (nats)"}
        by_count |= {"title": "KL by token frequency", "y_label": "mean KL (nats)"}
        figures = [
            _binned(by_entropy(entropy, kl), colours, **by_nats),
            _binned(by_frequency(labels, kl), colours, **by_count),
        ]
    else:
        by_nats |= {"title": "Teacher accuracy by its entropy", "y_label": "share of tokens"}
        by_count |= {"title": "Teacher entropy by token frequency", "y_label": "mean entropy (nats)"}
        right = {} if np.isnan(teacher.confidence).all() else {"teacher right": teacher.right}
        figures = [
            _binned(by_entropy(entropy, right), [TEACHER], **by_nats),
            _binned(by_frequency(labels, {teacher.entropy_name: entropy}), [TEACHER], **by_count),
        ]
    sides = {label: by_confidence(each.confidence, each.right) for label, each in students.items()}
    if calibrates:
        sides = {"teacher": by_confidence(teacher.confidence, teacher.right), **sides}
    if any(bins.counts.any() for bins in sides.values()):
        figures.append(_reliability(sides, first=TEACHER if calibrates else TEACHER + 1))
    return figures


def _binned(bins: Bins, colours: Sequence[int], *, title: str, x_label: str, y_label: str) -> Figure:
    series = [
        Series(name, [(i, float(value)) for i, value in enumerate(values) if math.isfinite(value)], colour)
        for (name, values), colour in zip(bins.means.items(), colours, strict=False)
    ]
    total, most = max(1, int(bins.counts.sum())), int(bins.counts.max(initial=0))
    return Figure(
        title=title,
        note=f"Grey bars: number of loss tokens, at most {most:,}.",
        chart=category_chart(
            bins.edges, bins.counts.tolist(), series, title=f"{title}. See the table.", x_label=x_label, y_label=y_label
        ),
        columns=["bin", "loss tokens", "share", *bins.means],
        rows=[
            [name, f"{count:,}", f"{count / total:.1%}", *(_number(values[i]) for values in bins.means.values())]
            for i, (name, count) in enumerate(zip(bins.names, bins.counts.tolist(), strict=True))
        ],
    )


def _reliability(sides: Mapping[str, Bins], first: int) -> Figure:
    title, series = "Reliability", []
    columns, rows = ["confidence"], [[name] for name in next(iter(sides.values())).names]
    for k, (name, bins) in enumerate(sides.items()):
        confidence, right = bins.means["confidence"].tolist(), bins.means["right"].tolist()
        points = [pair for pair, count in zip(zip(confidence, right, strict=True), bins.counts, strict=True) if count]
        series.append(Series(name, points, first + k))
        columns += [f"{name}: loss tokens", f"{name}: mean confidence", f"{name}: share right"]
        for row, count, mean, share in zip(rows, bins.counts.tolist(), confidence, right, strict=True):
            row += [f"{count:,}", _number(mean), _number(share)]
    return Figure(
        title=title,
        note="How often the most likely token is the true one, by the probability that the model gives it. Above the "
        "diagonal, a model is right more often than it predicts.",
        chart=reliability_chart(
            series,
            title=f"{title} diagram. See the table.",
            x_label="confidence (probability of the top token)",
            y_label="share that is true",
        ),
        columns=columns,
        rows=rows,
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
            learning = metric == "learning_rate"
            for name, what, faint in ((metric, "training", not learning), (f"eval_{metric}", "held out", False)):
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
                    else "Lines with markers: held-out cache. Thin lines: training batches since the last log.",
                    chart=line_chart(
                        series,
                        title=f"{title} over training steps. See the table.",
                        x_label="optimizer step",
                        y_label=unit,
                        always_linear=metric == "learning_rate",
                    ),
                    columns=["step", "student", "text", title],
                    rows=rows,
                )
            )
    return figures


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "—"
