"""Targets from hidden states: the head of a cache applied to its states, with numpy alone.

    top-K      the targets that conversion writes and `distill inspect` shows
    entropy    compared with the stored one, to detect a wrong head or a state of another position

Cost: a product with [V, D] per position, some thousand positions per second and core at 49,152 × 576.

Shapes: N positions of a batch, n of a chunk, V vocabulary, D width, K entries.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cache_format.manifest.metadata import CacheMetadata
from cache_format.manifest.stored_head import VOCAB_BLOCK, StoredHead
from cache_format.rows.hidden import HiddenStates
from cache_format.rows.invariants import describe_position
from cache_format.rows.row_batch import RowBatch
from cache_format.rows.types import CacheRow, FloatArray, SparseTargets

CHUNK_POSITIONS = 64
CHECKED_POSITIONS = 8  # per record batch
STANDARD_DEVIATIONS = 8.0
SLACK = 2e-3  # nats: float32 sums over a large vocabulary
LOGIT_EPS = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # by the dtype of the teacher's logits


def top_k_targets(targets: SparseTargets, hidden: HiddenStates, head: StoredHead, k: int) -> SparseTargets:
    """The K most likely tokens of every position that has a state, as exact entries; other positions get no entries.

    Args:
        targets: of the same positions; their entropy is kept.
        k: at most V.
    """
    ids, logprobs, residual = [], [], np.zeros(len(targets.entropy), np.float32)
    states, where = hidden.values(head.spec.layer), np.flatnonzero(hidden.mask)
    for start in range(0, len(states), CHUNK_POSITIONS):
        here = slice(start, start + CHUNK_POSITIONS)
        found = head.logprobs(states[here])  # [n, V]
        best = np.sort(np.argpartition(found, -k, axis=1)[:, -k:], axis=1)  # [n, K], by ascending id
        ids.append(best)
        logprobs.append(np.minimum(np.take_along_axis(found, best, 1), 0.0))
        np.put_along_axis(found, best, -np.inf, 1)
        with np.errstate(divide="ignore"):
            residual[where[here]] = np.log(np.exp(found).sum(axis=1, dtype=np.float64))
    counts = np.where(hidden.mask, k, 0)
    return replace(
        targets,
        counts=counts,
        exact_counts=counts,
        ids=np.concatenate([np.zeros(0, np.int64), *map(np.ravel, ids)]),
        logprobs=np.concatenate([np.zeros(0, np.float32), *map(np.ravel, logprobs)]).astype(np.float32),
        residual_logprob=np.minimum(residual, 0.0),
        sample_counts=None,
    )


def rebuilt_targets(row: CacheRow, head: StoredHead, k: int, positions: slice) -> SparseTargets:
    """Top-K targets at some positions of a row of hidden targets; the other positions have no entries.

    Raises: ValueError if the row was read without its states.
    """
    hidden = row.hidden
    if hidden is None or head.spec.layer not in hidden.states:
        raise ValueError(f"row {row.row} was read without its states of layer {head.spec.layer}")
    chosen = np.zeros_like(hidden.mask)
    chosen[positions] = hidden.mask[positions]
    kept = chosen[hidden.mask]
    layer = head.spec.layer
    scales = {layer: hidden.scales[layer][kept]} if layer in hidden.scales else {}
    return top_k_targets(row.targets, HiddenStates(chosen, {layer: hidden.states[layer][kept]}, scales), head, k)


def find_entropy_mismatch(batch: RowBatch, rows: range, metadata: CacheMetadata, head: StoredHead) -> str | None:
    """The first position where head and state do not give the stored entropy, as "where: found, expected", or None.
    Checks a few evenly spaced positions.

    Rounding a state changes each logit by a random amount with standard deviation σ = √(Σ W² · variance of the
    rounding). This changes the entropy −Σ p log p by at most about σ · (standard deviation of log p); eight times that
    is allowed.
    """
    assert batch.hidden is not None
    stored = np.flatnonzero(batch.hidden.mask)
    if not len(stored):
        return None
    chosen = np.unique(np.linspace(0, len(stored) - 1, CHECKED_POSITIONS).round().astype(int))
    layer = head.spec.layer
    states: FloatArray = batch.hidden.values(layer)[chosen]
    logprobs = head.logprobs(states)
    probs = np.exp(logprobs, dtype=np.float64)
    entropy = -(probs * logprobs).sum(axis=1)
    spread = np.sqrt(np.maximum((probs * logprobs.astype(np.float64) ** 2).sum(axis=1) - entropy**2, 0.0))
    variances = _rounding_variance(batch.hidden, layer, chosen, states)
    deviation = np.sqrt(_largest_variance(head, variances))
    eps = LOGIT_EPS.get(str(metadata.teacher.get("dtype")), 2.0**-20)
    deviation += eps * np.abs(head.logits(states)).max(axis=1)
    slack = SLACK + STANDARD_DEVIATIONS * deviation * spread
    low, high = metadata.codebooks["entropy"].rounded_from(batch.entropy[stored[chosen]])
    if (bad := (entropy < low - slack) | (entropy > high + slack)).any():
        i = int(bad.argmax())
        return (
            f"{describe_position(batch, rows, int(stored[chosen[i]]))}: its state and the head have an entropy of "
            f"{entropy[i]:.2f} nats, stored is {batch.entropy[stored[chosen[i]]]:.2f}"
        )
    return None


def _rounding_variance(
    hidden: HiddenStates, layer: int, chosen: NDArray[np.int64], states: FloatArray
) -> NDArray[np.float64]:
    """[n, D] variance of the rounding error of each stored number."""
    if layer in hidden.scales:
        steps = np.broadcast_to(hidden.scales[layer][chosen, None], states.shape).astype(np.float64)
    else:
        steps = np.abs(states.astype(np.float64)) * (2.0**-10 if hidden.states[layer].dtype == np.float16 else 2.0**-23)
    return steps**2 / 12


def _largest_variance(head: StoredHead, variances: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n] largest variance of a logit. A soft-cap only makes it smaller."""
    largest: NDArray[np.float64] = np.zeros(len(variances))
    for start in range(0, len(head.weight), VOCAB_BLOCK):
        squares = np.square(head.rows(slice(start, start + VOCAB_BLOCK)))
        np.maximum(largest, (variances.astype(np.float32) @ squares.T).max(axis=1), out=largest)
    return largest * head.spec.logit_scale**2
