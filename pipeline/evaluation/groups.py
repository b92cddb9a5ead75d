"""Metrics by the value of a column of the data that the cache keeps, such as a domain or a language.

A value belongs to a document, and packed rows hold several. So sums are over the loss tokens of one value in one row,
and the intervals of a value come from the rows that hold loss tokens of it, as those of the whole cache do from all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.evaluation import intervals
from pipeline.evaluation.evaluate_config import FEW_ROWS, FEW_TOKENS
from pipeline.evaluation.intervals import COLUMN, Metric, Supported, Table
from pipeline.student.data.cross_tokenizer import ConvertedRow


@dataclass(frozen=True, kw_only=True)
class Group:
    """A student on the loss tokens of one value; `few`: there are too few of them to rely on."""

    tokens: int
    rows: int
    few: bool
    metrics: dict[str, Metric]
    table: Table = field(repr=False, compare=False)  # sums by row, [rows, columns]

    def to_json(self) -> dict[str, Any]:
        metrics = {name: asdict(metric) for name, metric in self.metrics.items()}
        return {"tokens": self.tokens, "rows": self.rows, "few": self.few, "metrics": metrics}


@dataclass(frozen=True)
class Grouping:
    """Which value each token of a cache has.

    Raises: ConfigError for a column that the cache does not keep; FormatError if its file does not fit the rows.
    """

    cache: cf.Cache
    column: str

    def __post_init__(self) -> None:
        if self.column not in self.cache.kept:
            found = ", ".join(self.cache.kept) or "none"
            raise ConfigError(
                f"`by` {self.column}: {self.cache.path} does not keep this column of its data, found {found}. Choose "
                f"one of them, or make the cache with `keep_columns={self.column}`."
            )

    @property
    def values(self) -> tuple[str, ...]:
        return self.cache.kept[self.column].values

    def codes_of_documents(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [D] of the documents of the first rows. Args: rows: int [D], the row of each document."""
        kept = self.cache.kept[self.column]
        numbers = np.bincount(rows)
        if not np.array_equal(numbers, np.diff(kept.offsets[: len(numbers) + 1])):
            row = int((numbers != np.diff(kept.offsets[: len(numbers) + 1])).argmax())
            raise self._mismatch(row, int(numbers[row]))
        return kept.codes[: len(rows)]

    def codes(self, rows: Sequence[cf.CacheRow], length: int) -> Tensor:
        """int64 [B, T], the number of each token's value; -1 at padding."""
        found = np.full((len(rows), length), -1, np.int64)
        for i, row in enumerate(rows):
            of_documents = self.cache.kept[self.column].codes_of(row.row)
            if isinstance(row, ConvertedRow):
                documents = row.documents
            elif len(row.segment_lengths) != len(of_documents):
                raise self._mismatch(row.row, len(row.segment_lengths))
            else:
                documents = np.arange(len(of_documents))
            found[i, : len(row.input_ids)] = np.repeat(of_documents[documents], row.segment_lengths)
        return torch.from_numpy(found)

    def _mismatch(self, row: int, documents: int) -> cf.FormatError:
        found = len(self.cache.kept[self.column].codes_of(row))
        return cf.FormatError(
            f"{self.cache.path}, row {row}: {documents} documents, and {found} values of {self.column!r}, expected as "
            "many. Make the cache again."
        )


def is_few(tokens: int, rows: int) -> bool:
    """Whether a group is too small to rely on, by its numbers of loss tokens and of rows that hold them."""
    return tokens < FEW_TOKENS or rows < FEW_ROWS


def groups_of(table: Table, codes: np.ndarray, values: Sequence[str], supported: Supported) -> dict[str, Group]:
    """The groups by value, those with most loss tokens first.

    Args:
        table: sums [n, columns] over the loss tokens of one value in one row each; codes: int [n], the value of each.
    """
    found = {}
    for code in np.unique(codes):
        here = table[codes == code]
        tokens = int(here[:, COLUMN["count"]].sum())
        metrics = intervals.metrics_of(here, supported)
        few = is_few(tokens, len(here))
        found[values[code]] = Group(tokens=tokens, rows=len(here), few=few, metrics=metrics, table=here)
    return dict(sorted(found.items(), key=lambda item: -item[1].tokens))


def compare_groups(
    a: Mapping[str, Group], b: Mapping[str, Group], supported: Supported
) -> dict[str, dict[str, dict[str, Any]]]:
    """b − a by value and metric, paired over rows; without values whose loss tokens differ."""
    return {
        value: {
            name: asdict(each) for name, each in intervals.compare(a[value].table, b[value].table, supported).items()
        }
        for value in a
        if value in b and intervals.same_rows(a[value].table, b[value].table)
    }
