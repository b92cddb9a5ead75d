"""Targets of one row of text ─▶ a row of the cache: from rectangles with empty places to flat lists of entries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import cache_format as cf
from pipeline.errors import ModelError
from pipeline.teacher.targets.selection import ChunkTargets
from pipeline.teacher.text.packing import TokenRow


def cache_row(index: int, row: TokenRow | cf.CacheRow, stored: np.ndarray, targets: ChunkTargets) -> cf.CacheRow:
    """The row to write.

    Args:
        index: its number in the corpus.
        stored: [T] bool, positions that have targets.
        targets: on the host, of these positions in order.

    Raises: ModelError if the teacher's logits were not all finite.
    """
    ids, logprobs, exact_counts, sample_counts, residual, entropy = (tensor.numpy() for tensor in targets)
    _check_finite(entropy, np.flatnonzero(stored), index)
    filled = ids >= 0

    def spread(values: np.ndarray) -> np.ndarray:
        """[T, ...] with zeros where nothing is stored."""
        everywhere = np.zeros((len(stored), *values.shape[1:]), values.dtype)
        everywhere[stored] = values
        return everywhere

    return cf.CacheRow(
        row=index,
        input_ids=row.input_ids,
        loss_mask=row.loss_mask,
        segment_lengths=row.segment_lengths,
        targets=cf.SparseTargets(
            counts=spread(filled.sum(axis=1)),
            ids=ids[filled],
            logprobs=logprobs[filled],
            exact_counts=spread(exact_counts),
            residual_logprob=spread(residual),
            entropy=spread(entropy),
            sample_counts=spread(sample_counts) if sample_counts.shape[1] > 1 else None,
        ),
        labels=row.labels,
    )


def cache_rows(
    indices: Sequence[int], rows: Sequence[TokenRow | cf.CacheRow], stored: Sequence[np.ndarray], targets: ChunkTargets
) -> list[cf.CacheRow]:
    """`cache_row` for several rows.

    Args:
        targets: of the stored positions of all rows, row by row.
    """
    stops = np.cumsum([mask.sum() for mask in stored])[:-1].tolist()
    of_rows = zip(*(tensor.tensor_split(stops) for tensor in targets), strict=True)
    parts = zip(indices, rows, stored, of_rows, strict=True)
    return [cache_row(index, row, mask, ChunkTargets(*found)) for index, row, mask, found in parts]


def _check_finite(entropy: np.ndarray, positions: np.ndarray, row: int) -> None:
    """Any logit that is not a finite number leaves an entropy that is not (`sparse_targets`)."""
    bad = ~np.isfinite(entropy)
    if bad.any():
        raise ModelError(
            f"row {row}, position {positions[bad][0]}: the teacher's logits hold NaN or infinity "
            f"({bad.sum()} positions of this row): a cache of them would spoil every student. "
            "Try `dtype` float32 (or bfloat16 instead of float16); complete shards are kept."
        )
