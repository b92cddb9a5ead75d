"""The table of a report by the value of a kept column: mean KL of each student, or without students the entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.evaluate_config import FEW_NOTE
from pipeline.evaluation.groups import Grouping, is_few
from pipeline.evaluation.intervals import mean_with_error
from pipeline.evaluation.report.student_positions import StudentPositions
from pipeline.evaluation.report.teacher_positions import TeacherPositions, TextPositions


@dataclass(frozen=True, kw_only=True)
class GroupTable:
    """Attributes: by: the column of the data. rows: those with most loss tokens first."""

    by: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def group_table(
    grouping: Grouping, text: TextPositions, teacher: TeacherPositions, students: Mapping[str, StudentPositions]
) -> GroupTable:
    """Args: students: by label. Raises: FormatError if the kept columns do not fit the rows."""
    codes = grouping.codes_of_documents(text.rows)
    documents = np.searchsorted(text.documents, np.flatnonzero(text.predictions >= 0), side="right") - 1
    group, row = codes[documents].astype(np.int64), text.rows[documents]  # [L] each
    means = {f"KL {label}": each.kl for label, each in students.items()} or {teacher.entropy_name: teacher.entropy}
    found = []
    for code in np.unique(group):
        here = group == code
        rows, places = np.unique(row[here], return_inverse=True)
        counts = np.bincount(places).astype(np.float64)
        cells = []
        for values in means.values():
            sums = np.stack([np.bincount(places, values[here]), counts], axis=1)
            mean, error = mean_with_error(sums)
            cells.append(f"{mean:.4f}" + ("" if error is None else f" ± {error:.4f}"))
        tokens = int(counts.sum())
        mark = "*" if is_few(tokens, len(rows)) else ""
        found.append((tokens, [grouping.values[code], f"{mark}{tokens:,}", f"{len(rows):,}", *cells]))
    return GroupTable(
        by=grouping.column,
        note=f"Nats, with 95 % intervals over rows. {FEW_NOTE}.",
        columns=[grouping.column, "loss tokens", "rows", *means],
        rows=[cells for _, cells in sorted(found, key=lambda each: -each[0])],
    )
