"""Columns of tokens and entries under any names: the generic format, and tools whose files are just such columns.

`column=("ids=tokens", "top_ids=top_tokens", …)` gives each role a column:

    ids            [T] tokens
    top_ids        [P][K] tokens of the entries, or flat [P·K] with `flat_k`
    values         [P][K] their values, likewise
    entry_mask     [P][K] 0 for padding of a list
    normaliser     [P] log-sum-exp of all logits
    mask           [T] whether the token is to be predicted
    labels         [T] the token, negative where it is not to be predicted
    position_mask  [T] whether the prediction made from the position is in the loss
    attention      [T] 0 for padding, else the number of a document

NAME[i] takes item i of each position, for lists that are [P][parts][K].
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ConfigError
from pipeline.importing.readers.foreign_rows import BadRow, ForeignRow, Values
from pipeline.importing.readers.format_reader import Reader
from pipeline.importing.readers.nested_values import integers, lists, numbers, plain, take_part
from pipeline.importing.readers.source_files import Record, records

REQUIRED = ("ids", "top_ids", "values")
ROLES = (*REQUIRED, "mask", "position_mask", "labels", "attention", "normaliser", "entry_mask")
_PART = re.compile(r"(.+)\[(\d+)\]")


@dataclass(frozen=True)
class Preset:
    """How one tool names its columns, and what they mean. Columns in `optional` may be absent."""

    columns: Mapping[str, str]
    values: Values
    shift: int = 0
    optional: frozenset[str] = frozenset()


PRESETS: dict[str, Preset] = {
    # What `export_cache` writes.
    "parquet": Preset(
        {
            **{"ids": "input_ids", "top_ids": "top_ids", "values": "logprobs"},
            **{"mask": "loss_mask", "attention": "segment_ids"},
        },
        "logprobs",
        optional=frozenset({"mask", "attention"}),
    ),
    # Raw lists of DistillKit; older ones hold the logits.
    "distillkit-raw": Preset(
        {"ids": "input_ids", "top_ids": "token_ids", "values": "top_values", "attention": "attention_mask"},
        "logprobs",
        optional=frozenset({"attention"}),
    ),
    "axolotl-prepared": Preset(
        {
            **{"ids": "input_ids", "top_ids": "target_token_ids", "values": "target_logprobs"},
            **{"entry_mask": "target_mask", "labels": "labels", "attention": "attention_mask"},
        },
        "logprobs",
        optional=frozenset({"entry_mask", "labels", "attention"}),
    ),
    "nemo-aligner": Preset(
        {
            **{"ids": "tokens", "top_ids": "topk_token_ids", "values": "topk_logits"},
            **{"normaliser": "log_sum_exp_logits", "position_mask": "loss_mask"},
        },
        "logits",
        optional=frozenset({"position_mask"}),
    ),
}


def parse_columns(given: Sequence[str]) -> dict[str, str]:
    """`ROLE=COLUMN` each, in one string or several. Raises: ConfigError."""
    found: dict[str, str] = {}
    for each in (word for text in given for word in text.split()):
        role, equals, name = each.partition("=")
        if role not in ROLES or not equals or not name:
            raise ConfigError(f"`column` {each}: expected ROLE=COLUMN with one of the roles {', '.join(ROLES)}.")
        if role in found:
            raise ConfigError(f"`column` {each}: found {role}={found[role]} as well, expected one. Leave one out.")
        found[role] = name
    return found


@dataclass(frozen=True, kw_only=True)
class ColumnReader(Reader):
    """Args: flat_k: entries per position where the lists of entries are flat."""

    columns: Mapping[str, str]  # role -> column
    flat_k: int | None = None
    optional: frozenset[str] = frozenset()

    @property
    def renormalised(self) -> bool:
        return super().renormalised or (self.values == "logits" and "normaliser" not in self.columns)

    @property
    def description(self) -> dict[str, Any]:
        return {"columns": dict(self.columns), "flat_k": self.flat_k}

    def records(self) -> Iterator[Record]:
        return records(self.files, [*(_PART.sub(r"\1", name) for name in self.columns.values()), *self.keep_columns])

    def decode(self, record: Record) -> ForeignRow:
        input_ids = integers(self._value(record, "ids"), self.columns["ids"])
        counts, ids = self._entries(record, "top_ids")
        value_counts, values = self._entries(record, "values")
        if len(counts) != len(value_counts) or (counts != value_counts).any():
            raise BadRow(
                f"columns {self.columns['top_ids']!r} and {self.columns['values']!r} have lists of different lengths: "
                + _first_difference(counts, value_counts)
            )
        ids, values = integers(ids, self.columns["top_ids"]), numbers(values, self.columns["values"])
        if (kept := self._kept_entries(record, counts)) is not None:
            position = np.repeat(np.arange(len(counts)), counts)
            counts = np.bincount(position[kept], minlength=len(counts)).astype(np.int64)
            ids, values = ids[kept], values[kept]
        return ForeignRow(
            input_ids=input_ids,
            counts=counts,
            ids=ids,
            values=values,
            shift=self.shift,
            log_normaliser=self._optional_numbers(record, "normaliser"),
            token_mask=self._token_mask(record),
            position_mask=_as_mask(self._optional_integers(record, "position_mask")),
            documents=self._optional_integers(record, "attention"),
        )

    def _entries(self, record: Record, role: str) -> tuple[Any, Any]:
        name, value = self.columns[role], self._value(record, role)
        if found := _PART.fullmatch(name):
            return take_part(value, int(found[2]), name)
        if self.flat_k is None:
            return lists(value, name)
        items = integers(value, name) if role == "top_ids" else numbers(value, name)
        if len(items) % self.flat_k:
            raise BadRow(f"column {name!r}: {len(items)} items, expected a multiple of `flat_k` {self.flat_k}")
        return np.full(len(items) // self.flat_k, self.flat_k, np.int64), items

    def _value(self, record: Record, role: str) -> Any:
        return record.column(_PART.sub(r"\1", self.columns[role]))

    def _optional(self, record: Record, role: str) -> Any:
        if role not in self.columns:
            return None
        return record.get(self.columns[role]) if role in self.optional else self._value(record, role)

    def _optional_integers(self, record: Record, role: str) -> Any:
        value = self._optional(record, role)
        return None if value is None else integers(value, self.columns[role])

    def _optional_numbers(self, record: Record, role: str) -> Any:
        value = self._optional(record, role)
        return None if value is None else numbers(value, self.columns[role])

    def _token_mask(self, record: Record) -> Any:
        mask, labels = (self._optional_integers(record, role) for role in ("mask", "labels"))
        if mask is None and labels is None:
            return None
        if mask is None or labels is None:
            return labels >= 0 if mask is None else mask != 0
        if len(mask) != len(labels):
            raise BadRow(f"{len(mask)} values of the mask and {len(labels)} labels, expected as many")
        return (mask != 0) & (labels >= 0)

    def _kept_entries(self, record: Record, counts: Any) -> Any:
        """[E] whether an entry is one, and not padding of its list."""
        value = self._optional(record, "entry_mask")
        if value is None:
            return None
        mask_counts, mask = lists(value, self.columns["entry_mask"])
        if len(counts) != len(mask_counts) or (counts != mask_counts).any():
            raise BadRow(f"column {self.columns['entry_mask']!r}: {_first_difference(mask_counts, counts)}")
        return integers(mask, self.columns["entry_mask"]) != 0


def _as_mask(values: Any) -> Any:
    return None if values is None else values != 0


def _first_difference(found: Any, expected: Any) -> str:
    if len(found) != len(expected):
        return f"{len(found)} and {len(expected)} positions"
    position = int((found != expected).argmax())
    return f"position {position} has {found[position]} and {expected[position]}"


def first_columns(files: Sequence[Path]) -> set[str]:
    """Names of the columns of the first record that are not null; empty if there are no records."""
    for record in records(files):
        return {name for name in record.data if plain(record.get(name)) is not None}
    return set()
