"""Consecutive rows as flat arrays, the form that encodings read and write.

Each field is one array over all rows, with offsets that cut it into rows. Rows are views, not copies. Nothing here
loops over positions.

Shapes: R rows, N positions of all rows, E entries of all positions, S segments of all rows, M samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache_format.rows.hidden import HiddenStates, joined
from cache_format.rows.types import CacheRow, FloatArray, IntArray, SparseTargets

Offsets = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RowBatch:
    """Consecutive rows as flat arrays."""

    rows: NDArray[np.uint64]  # [R]
    token_offsets: Offsets  # [R + 1] into every per-position array
    segment_offsets: Offsets  # [R + 1] into segment_lengths
    entry_offsets: Offsets  # [R + 1] into ids and logprobs
    input_ids: IntArray  # [N]
    loss_mask: NDArray[np.bool_]  # [N]
    segment_lengths: IntArray  # [S]
    counts: IntArray  # [N]
    ids: IntArray  # [E]
    logprobs: FloatArray  # [E]
    exact_counts: IntArray  # [N]
    residual_logprob: FloatArray  # [N]
    entropy: FloatArray  # [N]
    labels: IntArray | None  # [N] only with alignment "same"
    sample_counts: IntArray | None = None  # [N, M] only if M > 1
    hidden: HiddenStates | None = None  # of the decoded layers

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_loss_tokens(self) -> int:
        return int(np.count_nonzero(self.loss_mask))

    @property
    def num_entries(self) -> int:
        return len(self.ids)

    @property
    def entry_starts(self) -> Offsets:
        """[N + 1] index of the first entry of each position, and E."""
        return offsets(self.counts)

    @property
    def positions(self) -> Offsets:
        """[E] position of each entry."""
        return np.repeat(np.arange(self.num_tokens), self.counts)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> CacheRow:
        tokens = slice(self.token_offsets[index], self.token_offsets[index + 1])
        segments = slice(self.segment_offsets[index], self.segment_offsets[index + 1])
        entries = slice(self.entry_offsets[index], self.entry_offsets[index + 1])
        return CacheRow(
            row=int(self.rows[index]),
            input_ids=self.input_ids[tokens],
            loss_mask=self.loss_mask[tokens],
            segment_lengths=self.segment_lengths[segments],
            targets=SparseTargets(
                counts=self.counts[tokens],
                ids=self.ids[entries],
                logprobs=self.logprobs[entries],
                exact_counts=self.exact_counts[tokens],
                residual_logprob=self.residual_logprob[tokens],
                entropy=self.entropy[tokens],
                sample_counts=None if self.sample_counts is None else self.sample_counts[tokens],
            ),
            labels=None if self.labels is None else self.labels[tokens],
            hidden=None if self.hidden is None else self.hidden.cut(tokens),
        )


def concatenate(rows: Sequence[CacheRow]) -> RowBatch:
    """Inverse of `RowBatch.row`. Raises: ValueError if the arrays of a row disagree in length."""
    for row in rows:
        _check_lengths(row)
    targets = [row.targets for row in rows]
    labels = [row.labels for row in rows if row.labels is not None]
    if len(labels) not in (0, len(rows)):
        raise ValueError("some rows have labels and some have none")
    samples = [t.sample_counts for t in targets if t.sample_counts is not None]
    if len(samples) not in (0, len(rows)) or len({each.shape[1:] for each in samples}) > 1:
        raise ValueError("rows have different numbers of samples")
    hidden = [row.hidden for row in rows if row.hidden is not None]
    if len(hidden) not in (0, len(rows)) or len({tuple(each.states) for each in hidden}) > 1:
        raise ValueError("rows have hidden states of different layers")
    return RowBatch(
        rows=np.array([row.row for row in rows], np.uint64),
        token_offsets=offsets([len(row.input_ids) for row in rows]),
        segment_offsets=offsets([len(row.segment_lengths) for row in rows]),
        entry_offsets=offsets([len(t.ids) for t in targets]),
        input_ids=np.concatenate([row.input_ids for row in rows]),
        loss_mask=np.concatenate([row.loss_mask for row in rows]).astype(np.bool_),
        segment_lengths=np.concatenate([row.segment_lengths for row in rows]),
        counts=np.concatenate([t.counts for t in targets]),
        ids=np.concatenate([t.ids for t in targets]),
        logprobs=np.concatenate([t.logprobs for t in targets]).astype(np.float32),
        exact_counts=np.concatenate([t.exact_counts for t in targets]),
        residual_logprob=np.concatenate([t.residual_logprob for t in targets]).astype(np.float32),
        entropy=np.concatenate([t.entropy for t in targets]).astype(np.float32),
        labels=np.concatenate(labels) if labels else None,
        sample_counts=np.concatenate(samples) if samples else None,
        hidden=joined(hidden) if hidden else None,
    )


def offsets(lengths: Sequence[int] | IntArray) -> Offsets:
    """[n + 1] start of each of n consecutive pieces, and the end of the last."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _check_lengths(row: CacheRow) -> None:
    targets, num_tokens = row.targets, len(row.input_ids)
    lengths = {
        "loss_mask": len(row.loss_mask),
        "counts": len(targets.counts),
        "exact_counts": len(targets.exact_counts),
        "residual_logprob": len(targets.residual_logprob),
        "entropy": len(targets.entropy),
        "labels": num_tokens if row.labels is None else len(row.labels),
        "sample_counts": num_tokens if targets.sample_counts is None else len(targets.sample_counts),
    }
    for name, length in lengths.items():
        if length != num_tokens:
            raise ValueError(f"row {row.row}: {name} has {length} positions, expected {num_tokens}")
    if row.hidden is not None and (problem := row.hidden.problem(num_tokens, f"row {row.row}")):
        raise ValueError(problem)
    if len(targets.logprobs) != len(targets.ids):
        raise ValueError(f"row {row.row}: {len(targets.logprobs)} logprobs for {len(targets.ids)} ids")
