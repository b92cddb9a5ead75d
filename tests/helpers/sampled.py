"""Sampled targets in the tests: rules in short, random numbers as capture draws them, and what came out, flat.

found = sparse_targets(logits.expand(n, vocab), rule, numbers(rule, n))
entries(found).ids[entries(found).sample >= 0]                            # the sampled tokens of all n positions
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import cache_format as cf
from pipeline.teacher.targets.philox import uniforms
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import ChunkTargets

BELOW_ONE = 1 - 2.0**-53  # the largest number that the generator gives
ROUNDING = 3e-6  # of sums of fp32 probabilities

FALSE_ALARM = 1e-11
"""Probability that one comparison with `bernstein` fails by chance. Fewer than 50,000 are made here: 5e-7 in all."""


def threshold(tau: float, *, head: int = 1, samples: int = 1, **more: Any) -> TargetRule:
    return TargetRule(kind="threshold", tail_threshold=tau, top_k=head, samples=samples, **more)


def random(draws: int, *, samples: int = 1, **more: Any) -> TargetRule:
    return TargetRule(kind="random", draws=draws, samples=samples, **more)


def rule_name(rule: TargetRule) -> str:
    """Of a test's parameter."""
    return "-".join(str(value) for value in rule.to_json().values())


def numbers(rule: TargetRule, n: int, *, row: int = 0) -> Tensor:
    """[n, rule.uniforms] of the first n positions of a row, as capture draws them."""
    return torch.from_numpy(uniforms(rule.seed or 0, np.full(n, row), np.arange(n), rule.uniforms))


def teacher(vocab: int, *, shape: str = "softmax", seed: int = 0) -> Tensor:
    """[V] logits: of a softmax of normal numbers, or of Zipf's law in random order."""
    generator = torch.Generator().manual_seed(seed)
    if shape == "zipf":
        return -(1.0 + torch.randperm(vocab, generator=generator)).log()
    return 2.5 * torch.randn(vocab, generator=generator)


class Entries(NamedTuple):
    """All filled places of n positions, flat."""

    position: np.ndarray
    sample: np.ndarray  # -1: exact
    ids: np.ndarray
    weights: np.ndarray  # exp(logprobs), fp64
    logprobs: np.ndarray


def entries(found: ChunkTargets) -> Entries:
    ids = found.ids.numpy()
    position, place = np.nonzero(ids >= 0)
    sizes = np.concatenate([found.exact_counts.numpy()[:, None], found.sample_counts.numpy()], axis=1)  # [n, 1 + M]
    assert np.array_equal((ids >= 0).sum(axis=1), sizes.sum(axis=1))
    group = np.repeat(np.tile(np.arange(-1, sizes.shape[1] - 1), len(sizes)), sizes.ravel())
    logprobs = found.logprobs.numpy()[position, place]
    return Entries(position, group, ids[position, place].astype(np.int64), np.exp(logprobs.astype(float)), logprobs)


def sampled_by_position(found: ChunkTargets, sample: int | None = None) -> list[np.ndarray]:
    """Ids of the sampled entries of every position, ascending; all samples together if none is named."""
    e = entries(found)
    chosen = e.sample >= 0 if sample is None else e.sample == sample
    return [np.sort(e.ids[chosen & (e.position == i)]) for i in range(len(found.ids))]


def outside(logits: Tensor, found: ChunkTargets) -> np.ndarray:
    """[V] fp64 probabilities with those of the exact entries, the same at every position, taken out."""
    e = entries(found)
    p = logits.double().softmax(0).numpy().copy()
    assert len(found.exact_counts.unique()) == 1
    p[e.ids[(e.sample < 0) & (e.position == 0)]] = 0.0
    return p


def mean_weights(found: ChunkTargets, vocab: int) -> np.ndarray:
    """[V] mean over positions of the weights of the sampled entries."""
    e = entries(found)
    sampled = e.sample >= 0
    return np.bincount(e.ids[sampled], e.weights[sampled], minlength=vocab) / len(found.ids)


def sparse(found: ChunkTargets) -> cf.SparseTargets:
    """As the writer of a cache gets them."""
    e = entries(found)
    return cf.SparseTargets(
        counts=(found.ids >= 0).sum(dim=1).numpy(),
        ids=e.ids,
        logprobs=e.logprobs,
        exact_counts=found.exact_counts.numpy(),
        residual_logprob=found.residual_logprob.numpy(),
        entropy=found.entropy.numpy(),
        sample_counts=found.sample_counts.numpy() if found.sample_counts.shape[1] > 1 else None,
    )


def tokens_at(p: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The tokens of [V] p on whose stretches the points lie; V beyond the last."""
    stretches = np.flatnonzero(p > 0)
    return np.append(stretches, len(p))[np.searchsorted(p[stretches].cumsum(), points, side="right")]


def check_draws(found: np.ndarray, p: np.ndarray, points: np.ndarray, rounding: float = ROUNDING) -> float:
    """Sorted ids against sorted points; returns the share of points that leave no doubt.

    A point within rounding of the end of a stretch may belong to the next token, or to one in between.
    """
    low, high = tokens_at(p, points - rounding), tokens_at(p, points + rounding)
    assert (high < len(p)).sum() <= len(found) <= (low < len(p)).sum()
    assert (low[: len(found)] <= found).all() and (found <= high[: len(found)]).all()
    return float((low == high).mean())


def bernstein(variance: np.ndarray, largest: np.ndarray, n: int) -> np.ndarray:
    """How far the mean of n independent numbers may be from its expectation, but for `FALSE_ALARM`:

    P(|mean − μ| ≥ t) ≤ 2·exp(−n·t²/(2σ² + 2Rt/3)) for numbers of variance σ² no further than R from μ.
    """
    log = math.log(2 / FALSE_ALARM)
    return np.sqrt(2 * variance * log / n) + 2 * largest * log / (3 * n)


def systematic_moments(p: np.ndarray, tau: float, f: np.ndarray) -> tuple[float, float]:
    """Variance and largest deviation of Y(u) = τ·Σ f over the tokens at (u + j)·τ, exactly.

    As u grows from 0 to 1 the points move to the right, and Y jumps where one crosses the end of a stretch.
    """
    there = p > 0
    ends, f = p[there].cumsum(), f[there]
    first = np.arange(math.ceil(ends[-1] / tau)) * tau
    level = tau * f[np.searchsorted(ends, first[first < ends[-1]], side="right")].sum()
    crossings = ends / tau % 1.0
    order = crossings.argsort(kind="stable")
    levels = level + np.append(0.0, (tau * (np.append(f[1:], 0.0) - f))[order].cumsum())
    widths = np.diff(np.concatenate([[0.0], crossings[order], [1.0]]))
    mean = levels @ widths
    assert mean == pytest.approx(p[there] @ f, abs=1e-9)
    return float((levels - mean) ** 2 @ widths), float(np.abs(levels - mean)[widths > 0].max())


def moments(rule: TargetRule, p: np.ndarray, f: np.ndarray) -> tuple[float, float, int]:
    """Of Σ w·f at one position, where p is what the rule samples from: variance and largest deviation of one of so many
    independent numbers of which it is the mean."""
    samples = rule.samples or 1
    if rule.kind == "threshold":
        return *systematic_moments(p, rule.tail_threshold / samples, f), 1
    mean = p @ f
    return float(p @ (f - mean) ** 2), float(np.abs(f - mean)[p > 0].max()), samples * rule.draws
