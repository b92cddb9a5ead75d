"""How far what a cache stores is from the teacher's distributions, position by position.

    divergence   KL(stored ‖ teacher) in nats. Of entries and tail mass it is the KL over these classes, which is at
                 most that over the vocabulary; of a stored state it is over the vocabulary.
    deviation    the largest difference of √p, between 0 and 1: of an exact entry, of the tail mass, of the probability
                 that decides which tokens are exact entries; or of entropy / log V. Noise of the logits changes a
                 rare token's log-probability by nats, but hardly its √p, which is the scale of the codebooks, too.
    draws        a sampled token belongs to a point of the teacher's cumulative distribution, given by the seed, the
                 row and the position. The distance between the point and the token's stretch, mean over the points.
                 In a wrong distribution the point lies elsewhere; rounding moves a stretch only a little, even where
                 it is so short that the next token is drawn.
    states       ‖stored - teacher's‖ / ‖teacher's‖ of a hidden state

A stored number stands for the interval of numbers that are rounded to it. Its distance is that of the nearest number
of the interval: 0 if the teacher's own is rounded to the stored one.

Shapes: n positions, V vocabulary, W exact entries of a position at most, P points, D width of a state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import cache_format as cf
from cache_format.rows.types import entry_groups, group_counts
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import draws
from pipeline.teacher.verification.criterion import nan_last

TINY = 1e-30


@dataclass(frozen=True)
class Distances:
    """[n] each, of n positions."""

    divergence: Tensor
    deviations: dict[str, Tensor]  # by what deviates
    draws: Tensor

    @classmethod
    def cat(cls, chunks: list[Distances]) -> Distances:
        names = chunks[0].deviations
        return cls(
            torch.cat([each.divergence for each in chunks]),
            {name: torch.cat([each.deviations[name] for each in chunks]) for name in names},
            torch.cat([each.draws for each in chunks]),
        )

    def worst(self) -> Worst:
        """The largest deviation."""
        each = [Worst(name, int(off.argmax()), float(off.max())) for name, off in self.deviations.items() if len(off)]
        return max(each, key=lambda found: nan_last(found.value), default=Worst("", 0, 0.0))

    def of_states(self, rebuilt: Distances, layer: int) -> Distances:
        """These distances for positions that have a state and no entries.

        Args:
            rebuilt: distances of the distribution that the state gives.
        """
        deviations = {f"hidden_{layer}": rebuilt.deviations["probabilities"], "entropy": self.deviations["entropy"]}
        return replace(rebuilt, deviations=deviations)


class Worst(NamedTuple):
    name: str
    place: int
    value: float


@dataclass(frozen=True)
class Bounds:
    """What a stored number may have been before rounding; float64."""

    low: Tensor
    high: Tensor

    def nearest(self, values: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(values, self.low), self.high)

    def __getitem__(self, here: slice) -> Bounds:
        return Bounds(self.low[here], self.high[here])


class StoredTargets:
    """The targets of a cached row at the n positions that have some, as rectangles.

    Args:
        stored: [T] bool, these positions.
        place: key of the row's random numbers.
    """

    def __init__(
        self, row: cf.CacheRow, stored: np.ndarray, metadata: cf.CacheMetadata, rule: TargetRule, place: int
    ) -> None:
        targets, self.rule = row.targets, rule
        counts = group_counts(targets)[stored]  # [n, 1 + M]
        groups = np.where(np.repeat(stored, targets.counts), entry_groups(group_counts(targets)), -1)
        exact = groups == 0
        low, high = metadata.codebooks["target_logprobs"].rounded_from(targets.logprobs[exact])
        width = int(counts[:, 0].max(initial=0))
        self.ids = _rectangle(targets.ids[exact].astype(np.int64), counts[:, 0], width, -1)  # [n, W]
        self.logprobs = Bounds(*(_rectangle(bound, counts[:, 0], width, -np.inf) for bound in (low, high)))
        self.tail = _bounds(metadata, "residual_logprob", targets.residual_logprob[stored])
        self.entropy = _bounds(metadata, "entropy", targets.entropy[stored])
        if not metadata.entropy_known:
            self.entropy = Bounds(self.entropy.low, torch.full_like(self.entropy.high, torch.inf))
        self.drawn = torch.cat(  # [n, P], the token of each point, -1: none
            [_drawn(targets, groups, sample, counts, rule) for sample in range(1, counts.shape[1])], dim=1
        )
        self.points = _points(rule, place, np.flatnonzero(stored))  # [n, P]

    def distances(self, logprobs: Tensor, here: slice) -> Distances:
        """Against the teacher's [n, V] at these of the positions."""
        kept, ids = self.exact(here, logprobs.shape[1]), self.ids[here]
        there = ids >= 0
        found = torch.where(there, logprobs.gather(1, ids.clamp(min=0)), -torch.inf)
        claimed = torch.where(there, self.logprobs[here].nearest(found), -torch.inf)
        outside = logprobs.exp().masked_fill_(kept, 0.0)
        tail = outside.sum(dim=1)
        claimed_tail = self.tail[here].nearest(tail.log())
        entropy = entropy_of(logprobs)
        return Distances(
            divergence=_divergence(claimed, found).sum(dim=1) + _divergence(claimed_tail, tail.log()),
            deviations={
                "target_logprobs": _most(_root_difference(claimed, found)),
                "residual_logprob": _root_difference(claimed_tail, tail.log()),
                "exact entries": self._choice(found, there, outside, tail),
                "entropy": (self.entropy[here].nearest(entropy) - entropy).abs() / math.log(logprobs.shape[1]),
            },
            draws=self._draws(outside, tail, here),
        )

    def exact(self, here: slice, vocab_size: int) -> Tensor:
        """[n, V] bool: which tokens are stored exact entries."""
        ids = torch.where(self.ids[here] >= 0, self.ids[here], vocab_size)
        mask = torch.zeros((len(ids), vocab_size + 1), dtype=torch.bool)
        return mask.scatter_(1, ids, True)[:, :vocab_size]

    def _choice(self, found: Tensor, there: Tensor, outside: Tensor, tail: Tensor) -> Tensor:
        """[n] by how much √p would have to differ for the rule to choose just these tokens as exact entries."""
        rule, counts = self.rule, there.sum(dim=1)
        if rule.kind in ("random", "hidden"):
            return torch.zeros_like(tail)
        probs = torch.where(there, found.exp(), torch.inf)
        least = probs.amin(dim=1) if probs.shape[1] else torch.full_like(tail, torch.inf)
        most = outside.amax(dim=1)
        off = most.sqrt() - least.sqrt()  # every exact entry is as likely as any other token
        wrong = torch.zeros_like(counts, dtype=torch.bool)
        if rule.kind == "top-p":
            mass, limit = 1.0 - tail, float(rule.top_p or 0)
            off = torch.maximum(off, (mass - least).clamp(min=0.0).sqrt() - limit**0.5)  # one fewer does not reach it
            short = limit**0.5 - mass.clamp(min=0.0).sqrt()
            off = torch.where(counts < (rule.max_entries or 0), torch.maximum(off, short), off)
            wrong = (counts == 0) | (counts > (rule.max_entries or 0))
        else:
            head = min(rule.top_k or 0, outside.shape[1])
            wrong = counts < head
            if rule.tail_threshold is None:
                wrong |= counts > head
            else:
                limit = rule.tail_threshold**0.5
                off = torch.maximum(off, most.sqrt() - limit)
                off = torch.where(counts > head, torch.maximum(off, limit - least.sqrt()), off)
        return torch.where(wrong, torch.inf, off.clamp(min=0.0))

    def _draws(self, outside: Tensor, tail: Tensor, here: slice) -> Tensor:
        """[n] mean over the points that hit a token here or in the cache."""
        points, drawn = self.points[here], self.drawn[here]
        if not points.shape[1]:
            return torch.zeros_like(tail)
        stops = outside.cumsum(dim=1)
        ids = drawn.clamp(min=0)
        stop = stops.gather(1, ids)
        start = stop - outside.gather(1, ids)
        hit = (start - points).clamp(min=0.0) + (points - stop).clamp(min=0.0)
        missed = (tail[:, None] - points).clamp(min=0.0)
        off = torch.where(drawn >= 0, hit, missed)
        counted = (drawn >= 0) | (points < tail[:, None])
        return (off * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def distances_of_run(other: Tensor, logprobs: Tensor, exact: Tensor) -> Distances:
    """Another run's [n, V] log-probabilities against the teacher's: at least what a correct cache of it would show.

    Args:
        exact: [n, V] bool, the stored exact entries.
    """
    theirs, ours = other.exp(), logprobs.exp()
    rest = (theirs - ours).masked_fill(exact, 0.0)
    tails = ((each.masked_fill(exact, 0.0)).sum(dim=1).sqrt() for each in (theirs, ours))
    return Distances(
        divergence=(theirs * (other - logprobs)).sum(dim=1).clamp(min=0.0),
        deviations={
            "probabilities": (theirs.sqrt() - ours.sqrt()).abs().amax(dim=1),
            "tail mass": (next(tails) - next(tails)).abs(),
            "entropy": (entropy_of(other) - entropy_of(logprobs)).abs() / math.log(logprobs.shape[1]),
        },
        # No stretch of the vocabulary moves further, so no point is further away from its token.
        draws=rest.cumsum(dim=1).abs().amax(dim=1),
    )


def state_distances(stored: Bounds, found: Tensor) -> Tensor:
    """[n] relative difference of the stored states from the teacher's [n, D]."""
    found = found.double()
    return (stored.nearest(found) - found).norm(dim=1) / found.norm(dim=1).clamp(min=TINY)


def state_bounds(hidden: cf.HiddenStates, layer: int) -> Bounds:
    """[n, D] between which numbers each of the stored ones lay."""
    values = hidden.values(layer)
    if layer in hidden.scales:
        half = np.broadcast_to(hidden.scales[layer][:, None] * np.float32(0.5001), values.shape)
    else:
        # By magnitude: at a negative power of two np.spacing(float16) is that towards zero, half of the other one.
        half = np.spacing(np.abs(hidden.states[layer])).astype(np.float32) * np.float32(0.5001)
    return Bounds(*(torch.from_numpy(each).double() for each in (values - half, values + half)))


def exactly(values: Tensor) -> Bounds:
    """Bounds of numbers that are not rounded."""
    return Bounds(values.double(), values.double())


def entropy_of(logprobs: Tensor) -> Tensor:
    """[n, V] → [n] nats."""
    return -(logprobs.exp() * logprobs).sum(dim=1).clamp(max=0.0)


def _divergence(claimed: Tensor, found: Tensor) -> Tensor:
    """q·log(q/p) - q + p of log q and log p, element by element: ≥ 0 even where Σq is not 1 to the last digit."""
    q, p = claimed.exp(), found.exp()
    return torch.where(q > 0, q * (claimed - found), 0.0) - q + p


def _root_difference(claimed: Tensor, found: Tensor) -> Tensor:
    return ((claimed / 2).exp() - (found / 2).exp()).abs()


def _most(values: Tensor) -> Tensor:
    """[n] the largest of [n, W], 0 of none."""
    return nn.functional.pad(values, (0, 1)).amax(dim=1)


def _rectangle(values: np.ndarray, counts: np.ndarray, width: int, empty: float) -> Tensor:
    """[n, W] from values of n positions one after the other."""
    filled = np.full((len(counts), width), empty, values.dtype)
    filled[np.arange(width) < counts[:, None]] = values
    return torch.from_numpy(filled)


def _bounds(metadata: cf.CacheMetadata, column: str, values: np.ndarray) -> Bounds:
    return Bounds(*(torch.from_numpy(bound) for bound in metadata.codebooks[column].rounded_from(values)))


def _drawn(targets: cf.SparseTargets, groups: np.ndarray, sample: int, counts: np.ndarray, rule: TargetRule) -> Tensor:
    """[n, P] the tokens of one sample, ascending, as often as they were drawn."""
    ids, here = targets.ids[groups == sample].astype(np.int64), counts[:, sample]
    if rule.kind == "random":
        weights = np.exp(targets.logprobs[groups == sample].astype(np.float64))
        times = np.rint(weights * rule.points * (rule.samples or 1)).astype(np.int64)
        position = np.repeat(np.arange(len(here)), here)
        ids, here = np.repeat(ids, times), np.bincount(np.repeat(position, times), minlength=len(here))
    drawn = _rectangle(ids, here, max(rule.points, int(here.max(initial=0))), -1)
    return drawn[:, : rule.points]


def _points(rule: TargetRule, place: int, positions: np.ndarray) -> Tensor:
    """[n, P] float64: the points of `selection.sample`, those of each sample ascending."""
    uniforms = draws(rule, np.full(len(positions), place), positions)
    if uniforms is None:
        return torch.zeros((len(positions), 0), dtype=torch.float64)
    count = rule.samples or 1
    if rule.kind == "random":
        return torch.cat([each.sort(dim=1).values for each in uniforms.split(rule.points, dim=1)], dim=1)
    starts = [(uniforms + i / count).frac() for i in range(count)]
    steps = torch.arange(rule.points, dtype=torch.float64)
    return torch.cat([(start + steps) * (rule.tail_threshold or 0.0) for start in starts], dim=1)
