"""Plots beside a student's README: SVG files, drawn as in a report, each only if there is something to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from pipeline.evaluation.report.charts import Points, Series, as_file, line_chart, reliability_chart

CURVE, RELIABILITY = "held-out.svg", "reliability.svg"
STUDENT = 1
"""Colour of the first student in a report."""


def plot_curve(directory: Path, evaluations: Sequence[Mapping[str, float]]) -> str | None:
    """Writes the held-out KL over the steps of a run; returns the Markdown that shows it, None for fewer than two."""
    points = [(each["step"], each["kl"]) for each in evaluations if math.isfinite(each["kl"])]
    if len(points) < 2:
        return None
    title = "KL to the teacher on held-out text, over training steps"
    chart = line_chart([Series("KL", points, STUDENT)], title=title, x_label="optimizer step", y_label="KL (nats)")
    return _write(directory / CURVE, chart, title)


def plot_reliability(directory: Path, points: Points) -> str | None:
    """Writes the reliability diagram; returns the Markdown that shows it, None without points.

    Args:
        points: mean confidence and share of correct predictions, by bin of confidence.
    """
    if not points:
        return None
    title = "Reliability on held-out text: above the diagonal, the student is right more often than it says"
    labels = {"x_label": "confidence (probability of the top token)", "y_label": "share that is true"}
    chart = reliability_chart([Series("student", points, STUDENT)], title=title, **labels)
    return _write(directory / RELIABILITY, chart, title)


def _write(file: Path, chart: Markup, title: str) -> str:
    file.write_text(as_file(chart), encoding="utf-8")
    return f"![{title}]({file.name})"
