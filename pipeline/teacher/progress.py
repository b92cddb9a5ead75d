"""Progress and summary of a stage-one run, as reported to its caller."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CaptureProgress:
    """Progress of the run, reported after every batch."""

    rows: int
    total_rows: int
    tokens: int  # in those rows, which this or an earlier run cached
    total_tokens: int
    tokens_per_s: float  # of this run
    bytes_per_token: float  # on disk; nan before the first record batch is written
    exact_mass: float  # mean probability mass of the exact entries over loss tokens
    seconds_left: float
    batch_size: int
    batch_tokens: int | None  # limit of a forward pass, where it is not a number of rows


@dataclass(frozen=True, kw_only=True)
class CaptureSummary:
    """The cache at the end of a run: complete, unless the run was to write only some of the shards."""

    output: str
    rows: int
    tokens: int
    counted_tokens: int
    bytes: int
    head_bytes: int = 0  # of these, the teacher's head, which is stored once
    exact_mass: float | None  # mean probability mass of the exact entries; None if others wrote part of the rows
    seconds: float
    tokens_per_s: float
    resumed_rows: int  # found complete from an earlier run
    corpus_report: dict[str, float]
    wrote_manifest: bool = True  # if so, follow-up work is up to this run
    finished: bool = True  # whether the manifest exists; if not, rows, tokens and bytes cover the complete shards
