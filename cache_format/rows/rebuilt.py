"""Whole distributions again, of the states and the head that a cache holds: what can be asked of them without torch.

    logits     head · state of each position
    top-K      the ordinary targets that conversion writes and `distill inspect` shows
    entropy    beside the stored one: a head that is not of these states, or a state of another position, has another

A product with [V, D] for every position: some thousand positions a second and core at 49,152 × 576.

Shapes: N positions of a batch, n of a chunk, V vocabulary, D width, K entries.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cache_format.manifest.metadata import CacheMetadata
from cache_format.manifest.stored_head import VOCAB_BLOCK, StoredHead
from cache_format.rows.hidden import HiddenStates
from cache_format.rows.invariants import of_position
from cache_format.rows.row_batch import RowBatch
from cache_format.rows.types import CacheRow, FloatArray, SparseTargets

CHUNK_POSITIONS = 64
CHECKED_POSITIONS = 8  # of a record batch
STANDARD_DEVIATIONS = 8.0
SLACK = 2e-3  # nats: float32 sums over a large vocabulary
LOGIT_EPS = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # of the dtype that the teacher computed its logits in


def sparse(targets: SparseTargets, hidden: HiddenStates, head: StoredHead, k: int) -> SparseTargets:
    """The K most likely tokens of every position that has a state, as exact entries; the others get none.

    Args:
        targets: of the same positions, whose entropy stays.
        k: at most the vocabulary.
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
    """Of a row of hidden targets the K most likely tokens at some of its positions, as exact entries; the others have
    none.

    Raises: ValueError if the row was read without the states.
    """
    hidden = row.hidden
    if hidden is None or head.spec.layer not in hidden.states:
        raise ValueError(f"row {row.row} was read without its states of layer {head.spec.layer}")
    chosen = np.zeros_like(hidden.mask)
    chosen[positions] = hidden.mask[positions]
    kept = chosen[hidden.mask]
    layer = head.spec.layer
    scales = {layer: hidden.scales[layer][kept]} if layer in hidden.scales else {}
    return sparse(row.targets, HiddenStates(chosen, {layer: hidden.states[layer][kept]}, scales), head, k)


def find_other_entropy(batch: RowBatch, rows: range, metadata: CacheMetadata, head: StoredHead) -> str | None:
    """A position at which head and state have another entropy than the one stored, as "where: found, expected", or
    None. Asked of a few positions, evenly spaced.

    Rounding a state moves each logit at random: by σ, the root of Σ W² times the variance of the rounding. That moves
    the entropy −Σ p log p by σ·(the standard deviation of log p) or less; of that, eight times is allowed.
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
            f"{of_position(batch, rows, int(stored[chosen[i]]))}: its state and the head have an entropy of "
            f"{entropy[i]:.2f} nats, stored is {batch.entropy[stored[chosen[i]]]:.2f}"
        )
    return None


def _rounding_variance(
    hidden: HiddenStates, layer: int, chosen: NDArray[np.int64], states: FloatArray
) -> NDArray[np.float64]:
    """[n, D] variance of what storing a state has changed in each of its numbers."""
    if layer in hidden.scales:
        steps = np.broadcast_to(hidden.scales[layer][chosen, None], states.shape).astype(np.float64)
    else:
        steps = np.abs(states.astype(np.float64)) * (2.0**-10 if hidden.states[layer].dtype == np.float16 else 2.0**-23)
    return steps**2 / 12


def _largest_variance(head: StoredHead, variances: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n] of any logit, before scale and soft-cap, neither of which makes it much larger than the scale."""
    largest: NDArray[np.float64] = np.zeros(len(variances))
    for start in range(0, len(head.weight), VOCAB_BLOCK):
        squares = np.square(head.rows(slice(start, start + VOCAB_BLOCK)))
        np.maximum(largest, (variances.astype(np.float32) @ squares.T).max(axis=1), out=largest)
    return largest * head.spec.logit_scale**2
