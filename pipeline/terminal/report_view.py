"""What `report` prints when the page is written."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from pipeline.terminal.evaluation_view import evaluation_view
from pipeline.terminal.tables import pairs, size

if TYPE_CHECKING:
    from pipeline.evaluation.report.report import ReportSummary


def report_view(summary: ReportSummary) -> RenderableType:
    """A report that was written, and the students' numbers in it."""
    written = pairs(
        f"Wrote {summary.output}",
        [
            ("cache", summary.cache),
            ("rows", f"{summary.rows:,}"),
            ("tokens", f"{summary.tokens:,}, {summary.loss_tokens:,} of them loss tokens"),
            ("passages", f"{summary.passages_shown:,} of {summary.passages:,} shown"),
            ("size", size(summary.bytes)),
        ],
    )
    if not summary.students:
        return written
    students = {name: asdict(found) for name, found in summary.students.items()}
    return Group(written, Text(), evaluation_view("Students", students))
