"""Where a run of stage one stands, and what is there when it ends: what its caller is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CaptureProgress:
    """Where the run stands, after every batch."""

    rows: int
    total_rows: int
    tokens: int  # of those rows, cached by this or an earlier run
    total_tokens: int
    tokens_per_s: float  # of this run
    bytes_per_token: float  # on disk; nan before the first record batch is written
    exact_mass: float  # mean probability mass of the exact entries at counted positions
    seconds_left: float
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class CaptureSummary:
    """What is there when a run ends: the whole cache, but for a run that was to write some shards only."""

    output: str
    rows: int
    tokens: int
    counted_tokens: int
    bytes: int
    exact_mass: float | None  # mean probability mass of the exact entries; None if others wrote part of the rows
    seconds: float
    tokens_per_s: float
    resumed_rows: int  # found complete from an earlier run
    corpus_report: dict[str, float]
    wrote_manifest: bool = True  # it ended with this run, whose part it is to do what comes after
    finished: bool = True  # whether the manifest is there; else rows, tokens and bytes are of the complete shards
