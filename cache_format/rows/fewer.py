"""Fewer entries per position, computed from the stored targets: exact entries, samples, or a sampled tail.

Shapes: N positions, E entries, M samples of each position, C candidates for a new sample.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_format.rows.row_batch import RowBatch, offsets
from cache_format.rows.types import entry_groups, group_counts, joint_index

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def most_likely(batch: RowBatch, k: int) -> RowBatch:
    """The k most likely entries of each position; the mass of the others joins the tail mass."""
    position = batch.positions
    keep = _ranks(batch, batch.logprobs, position) < k
    dropped = _sums(position[~keep], np.exp(batch.logprobs[~keep].astype(np.float64)), batch.num_tokens)
    counts = np.minimum(batch.counts, k)
    return _with_entries(
        batch,
        np.flatnonzero(keep),
        batch.logprobs[keep],
        counts=counts,
        exact_counts=counts,
        residual_logprob=_with_mass(batch.residual_logprob, dropped),
    )


def first_samples(batch: RowBatch, samples: int) -> RowBatch:
    """The first `samples` samples of each position, reweighted to one unbiased estimate."""
    groups = group_counts(batch)  # [N, 1 + M]
    group = entry_groups(groups)  # [E]
    factor = (groups.shape[1] - 1) / samples
    logprobs = np.where(group > 0, np.minimum(batch.logprobs + np.float32(np.log(factor)), 0), batch.logprobs)
    kept, keep = groups[:, : 1 + samples], group <= samples
    return _with_entries(
        batch,
        np.flatnonzero(keep),
        logprobs[keep].astype(np.float32),
        counts=kept.sum(axis=1),
        sample_counts=kept[:, 1:] if samples > 1 else None,
    )


def thinned(batch: RowBatch, old: float, new: float, *, always_exact: int, key: tuple[int, int]) -> RowBatch:
    """Threshold targets with τ = `old` as targets with the larger τ = `new`: an unbiased estimate of the old ones.

    Exact entries with p < `new`, except for the `always_exact` most likely ones, are drawn with probability p/new;
    sampled entries are kept with probability old/new. Each drawn entry has weight new/M. Sampling is systematic, as in
    capture: points at distance one on the cumulative probabilities in order of the ids. The first point depends only on
    `key`, row and position; the first points of the M samples are 1/M apart.
    """
    groups = group_counts(batch)  # [N, 1 + M]
    group, samples = entry_groups(groups), groups.shape[1] - 1
    position = batch.positions
    probability = np.exp(batch.logprobs.astype(np.float64))
    exact = group == 0
    rank = _ranks(batch, np.where(exact, batch.logprobs, -np.inf), position)
    stays = exact & ((probability >= new) | (rank < always_exact))
    falls = np.flatnonzero(exact & ~stays)

    # An exact entry is a candidate for every sample, a sampled entry only for its own.
    candidates = np.concatenate([np.flatnonzero(~exact), np.repeat(falls, samples)])
    sample = np.concatenate([group[~exact] - 1, np.tile(np.arange(samples), len(falls))])
    order = np.lexsort((batch.ids[candidates], sample, position[candidates]))
    candidates, sample = candidates[order], sample[order]
    chance = np.where(exact[candidates], probability[candidates] / new, old / new)
    first = (_uniforms(batch, key)[:, None] + np.arange(samples) / samples) % 1.0  # [N, M]
    place = joint_index(position[candidates], sample, samples)
    drawn = _systematic(chance, place, 1.0 - first.ravel())

    kept = np.concatenate([np.flatnonzero(stays), candidates[drawn]])
    group = np.concatenate([np.zeros(np.count_nonzero(stays), np.int64), 1 + sample[drawn]])
    order = np.lexsort((batch.ids[kept], group, position[kept]))
    kept, group = kept[order], group[order]
    size = batch.num_tokens * (1 + samples)
    of_group = joint_index(position[kept], group, 1 + samples)
    counts = np.bincount(of_group, minlength=size).reshape(-1, 1 + samples)
    fallen = _sums(position[falls], probability[falls], batch.num_tokens)
    return _with_entries(
        batch,
        kept,
        np.where(group > 0, np.float32(np.log(new / samples)), batch.logprobs[kept]),
        counts=counts.sum(axis=1),
        exact_counts=counts[:, 0],
        sample_counts=counts[:, 1:] if samples > 1 else None,
        residual_logprob=_with_mass(batch.residual_logprob, fallen),
    )


def _systematic(chance: Floats, place: Ints, first: Floats) -> Flags:
    """[C] whether a candidate contains a point: `first[place]`, `first[place]` + 1, ... on the cumulative chances.

    Args:
        chance: [C] below 1. place: [C] position and sample, ascending. first: first point of each place, in (0, 1].
    """
    if not len(chance):
        return np.zeros(0, np.bool_)
    total = np.cumsum(chance)
    begins = np.concatenate([[True], place[1:] != place[:-1]])
    before = (total - chance)[begins][np.cumsum(begins) - 1]
    upper = np.floor(total - before - first[place] + 1.0)  # points up to here
    lower = np.where(begins, 0.0, np.concatenate([[0.0], upper[:-1]]))
    drawn: Flags = upper > lower
    return drawn


def _uniforms(batch: RowBatch, key: tuple[int, int]) -> Floats:
    """[N] numbers in [0, 1), functions of key, row and position."""
    found, keys = [np.zeros(0)], np.array(key, np.uint64)
    for row, tokens in zip(batch.rows.tolist(), np.diff(batch.token_offsets).tolist(), strict=True):
        bits = np.random.Philox(key=keys, counter=np.array([0, 0, 0, row], np.uint64))
        found.append(np.random.Generator(bits).random(tokens))
    return np.concatenate(found)


def _sums(position: Ints, values: Floats, positions: int) -> Floats:
    """[N] sum of the values of each position."""
    return np.bincount(position, values, positions).astype(np.float64)


def _ranks(batch: RowBatch, logprobs: NDArray[np.floating[Any]], position: Ints) -> Ints:
    """[E] rank of each entry within its position, most likely first, then by id."""
    order = np.lexsort((batch.ids, -logprobs, position))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - batch.entry_starts[position]
    return rank


def _with_mass(residual_logprob: NDArray[np.floating[Any]], mass: Floats) -> NDArray[np.float32]:
    """[N] log of the tail mass plus `mass`."""
    with np.errstate(divide="ignore"):
        sums = np.log(np.minimum(np.exp(residual_logprob.astype(np.float64)) + mass, 1.0))
    return np.where(mass > 0, sums, residual_logprob).astype(np.float32)


def _with_entries(batch: RowBatch, kept: Ints, logprobs: NDArray[np.floating[Any]], **changes: Any) -> RowBatch:
    """The batch with entries `kept`, in this order; `changes` holds the new counts."""
    entry_offsets = offsets(changes["counts"])[batch.token_offsets]
    return replace(batch, ids=batch.ids[kept], logprobs=logprobs, entry_offsets=entry_offsets, **changes)
