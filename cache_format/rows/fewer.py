"""Fewer entries per position, from what is stored alone: of exact targets, of several samples, of a sampled tail.

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
    """At most k entries per position; the mass of the others joins the residual."""
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
    """Of several samples the first so many, as one estimate."""
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


def thinned(batch: RowBatch, old: float, new: float, *, head: int, key: tuple[int, int]) -> RowBatch:
    """Targets of a threshold τ = `old`, made those of the larger τ = `new`: an unbiased estimate of what they were.

    Exact entries below `new` are drawn with probability p/new, but for the `head` most likely ones, and sampled
    entries are kept with probability old/new; each then counts new/M. What enters a sample is drawn systematically,
    as it was in capture: in the order of the ids, points one apart on the cumulative sum of the probabilities. The
    first point depends on `key`, row and position alone; those of the samples of a position are 1/M apart.
    """
    groups = group_counts(batch)  # [N, 1 + M]
    group, samples = entry_groups(groups), groups.shape[1] - 1
    position = batch.positions
    probability = np.exp(batch.logprobs.astype(np.float64))
    exact = group == 0
    rank = _ranks(batch, np.where(exact, batch.logprobs, -np.inf), position)
    stays = exact & ((probability >= new) | (rank < head))
    falls = np.flatnonzero(exact & ~stays)

    # What was exact is a candidate of every sample, what was sampled one of its own sample.
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
    """[C] which candidates have a point: at `first[place]` and one apart, on the cumulative chances of each place.

    Args:
        chance: [C] below 1. place: [C] ascending. first: in (0, 1], of each place.
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
    """[N] in [0, 1), of each position: a function of key, row and position."""
    found, keys = [np.zeros(0)], np.array(key, np.uint64)
    for row, tokens in zip(batch.rows.tolist(), np.diff(batch.token_offsets).tolist(), strict=True):
        bits = np.random.Philox(key=keys, counter=np.array([0, 0, 0, row], np.uint64))
        found.append(np.random.Generator(bits).random(tokens))
    return np.concatenate(found)


def _sums(position: Ints, values: Floats, positions: int) -> Floats:
    """[N] of the values at each position."""
    return np.bincount(position, values, positions).astype(np.float64)


def _ranks(batch: RowBatch, logprobs: NDArray[np.floating[Any]], position: Ints) -> Ints:
    """[E] place of each entry among those of its position, the most likely one first, then by id."""
    order = np.lexsort((batch.ids, -logprobs, position))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - batch.entry_starts[position]
    return rank


def _with_mass(residual_logprob: NDArray[np.floating[Any]], mass: Floats) -> NDArray[np.float32]:
    """[N] log of the residual and so much more."""
    with np.errstate(divide="ignore"):
        sums = np.log(np.minimum(np.exp(residual_logprob.astype(np.float64)) + mass, 1.0))
    return np.where(mass > 0, sums, residual_logprob).astype(np.float32)


def _with_entries(batch: RowBatch, kept: Ints, logprobs: NDArray[np.floating[Any]], **changes: Any) -> RowBatch:
    """With these entries alone, in this order and with these log-probabilities; `changes` has what follows from it."""
    entry_offsets = offsets(changes["counts"])[batch.token_offsets]
    return replace(batch, ids=batch.ids[kept], logprobs=logprobs, entry_offsets=entry_offsets, **changes)
