"""The first of two passes over a source: everything is decoded and checked, and nothing is written.

A cache's manifest says in advance how many rows, tokens and entries there are, and a source is refused before a part of
it has been written. Cost: the source is decoded twice.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.importing.readers.foreign_rows import BadRow, UnusableRow
from pipeline.importing.readers.format_reader import Reader
from pipeline.importing.readers.nested_values import plain
from pipeline.importing.readers.source_files import Record
from pipeline.importing.row_digest import RowDigest
from pipeline.importing.row_mapping import MappedRow, RowMapper
from pipeline.importing.shift_evidence import ShiftEvidence
from pipeline.teacher.text.formats.kept_columns import kept_texts

PROBED_POSITIONS = 20_000  # after as many, a wrong shift is reported without reading the rest
NAMED = 3  # unusable rows that are named for each reason
REPORT_EVERY = 16  # records


@dataclass
class Survey:
    """What a source holds.

    Attributes:
        unusable: reason -> number of records; `examples`: reason -> the first of them.
        skipped: numbers of those records.
        rows_sha256: of everything that is stored of the rows, see `RowDigest`.
        changed: what was adjusted or left out -> how often.
        kept: column to keep -> its value of each row; `documents`: the number of documents of each row.
    """

    rows: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    longest: int = 0
    most_entries: int = 0
    fewest_entries: int = 2**31
    packed: bool = False
    token_stream_sha256: str = ""
    rows_sha256: str = ""
    unusable: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    skipped: set[int] = field(default_factory=set)
    changed: Counter[str] = field(default_factory=Counter)
    kept: dict[str, list[str]] = field(default_factory=dict)
    documents: list[int] = field(default_factory=list)
    evidence: ShiftEvidence = field(default_factory=ShiftEvidence)


def survey_source(
    reader: Reader, mapper: RowMapper, source: str, on_record: Callable[[int, int], None] = lambda done, total: None
) -> Survey:
    """Decodes and checks all records.

    Raises: DataError for an invalid record, with its place; if the lists fit another shift clearly better;
        or if no row can be used.
    """
    found, digest, rows = Survey(), hashlib.sha256(), RowDigest(mapper.vocab_size)
    total, number, probed = reader.total, -1, False
    for number, record in enumerate(reader.records()):
        try:
            row = mapped(reader, mapper, record)
        except UnusableRow as reason:
            found.skipped.add(number)
            found.unusable[str(reason)] += 1
            if len(names := found.examples.setdefault(str(reason), [])) < NAMED:
                names.append(record.where)
            continue
        _count(found, row)
        if reader.keep_columns:
            _keep(found, reader.keep_columns, record, len(row.segment_lengths))
        digest.update(row.input_ids.astype("<i8").tobytes())
        rows.add(row)
        if not probed and found.evidence.positions >= PROBED_POSITIONS:
            probed = True
            check_shift(found.evidence, source)
        if total and (number + 1) % REPORT_EVERY == 0:
            on_record(number + 1, total)
    check_shift(found.evidence, source)
    if not found.rows:
        reasons = "; ".join(f"{count} {reason}" for reason, count in found.unusable.items()) or "no records"
        raise DataError(f"{source}: no row can be used ({reasons}). Check the source and the `format`.")
    found.token_stream_sha256, found.rows_sha256 = digest.hexdigest(), rows.hexdigest()
    return found


def usable_rows(reader: Reader, mapper: RowMapper, survey: Survey, first: int) -> Iterator[tuple[int, MappedRow]]:
    """Row numbers and rows of the cache from row `first` on; earlier ones are read and not decoded.

    Raises: DataError.
    """
    row = 0
    for number, record in enumerate(reader.records()):
        if number in survey.skipped:
            continue
        if row >= first:
            yield row, mapped(reader, mapper, record)
        row += 1


def mapped(reader: Reader, mapper: RowMapper, record: Any) -> MappedRow:
    """Raises: DataError with the record's place, UnusableRow."""
    try:
        return mapper.map(reader.decode(record))
    except BadRow as error:
        raise DataError(f"{record.where}: {error}. Correct the source, or the options that describe it.") from error


def check_shift(evidence: ShiftEvidence, source: str) -> None:
    """Raises: DataError if another shift fits the text clearly better."""
    offset, means = evidence.better_offset, evidence.mean_logprob
    if offset is None or means is None:
        return
    about = "the token at their own position" if offset < 0 else "the token after the next"
    remedy = {-1: "Use `shift=1` if you gave 0", 1: "Use `shift=0` if you gave 1"}[offset]
    raise DataError(
        f"{source}: the lists are off by one: over {evidence.positions:,} loss tokens they give the next token a mean "
        f"log-probability of {means[1]:.2f}, and {about} {means[1 + offset]:.2f} nats. {remedy}."
    )


def _keep(found: Survey, names: Sequence[str], record: Record, documents: int) -> None:
    values = {name: plain(record.get(name)) for name in names}
    for name, texts in kept_texts([values], [record.where], names).items():
        found.kept.setdefault(name, []).extend(texts)
    found.documents.append(documents)


def _count(found: Survey, row: MappedRow) -> None:
    counts = np.asarray(row.targets.counts)[row.loss_mask]
    found.rows += 1
    found.tokens += len(row.input_ids)
    found.loss_tokens += int(row.loss_mask.sum())
    found.longest = max(found.longest, len(row.input_ids))
    found.most_entries = max(found.most_entries, int(counts.max()))
    found.fewest_entries = min(found.fewest_entries, int(counts.min()))
    found.packed |= len(row.segment_lengths) > 1
    found.changed += row.changed
    found.evidence.add(row.evidence)
