"""One row of a cache against three runs of the teacher: alone, with rounding errors, and in a batch.

The run alone is what the others are measured from. Shapes: n positions that have targets, m that have states, V
vocabulary, D width of a state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

import cache_format as cf
from cache_format.rows.types import entry_groups, group_counts
from pipeline.models.teacher_head import TeacherHead
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.verification.criterion import Comparison, worst
from pipeline.teacher.verification.distances import (
    Distances,
    StoredTargets,
    distances_of_run,
    exactly,
    state_bounds,
    state_distances,
)

CHUNK_POSITIONS = 64  # of [n, V] in float64, several of which are there at a time


class TeacherRun(Protocol):
    """What the teacher says about a row, once."""

    @property
    def row(self) -> cf.CacheRow:
        """What capture would write, with states in float32."""
        ...

    def logprobs(self, here: slice) -> Tensor:
        """[n, V] float64 on the CPU, of these of the positions that have targets."""
        ...


@dataclass(frozen=True, kw_only=True)
class RowCheck:
    """The result for one row; `TeacherCheck` has it for all.

    Attributes:
        same: how many entries (for hidden targets: most likely tokens) are the teacher's, and of how many.
        same_rounding: the same for the teacher with rounding errors.
    """

    positions: int
    entries: int
    divergence: Comparison
    deviation: Comparison
    draws: Comparison | None
    states: Comparison | None
    same: np.ndarray  # [2]
    same_rounding: np.ndarray  # [2]


class RowChecker:
    """Checks the rows of one cache.

    Args:
        stored_head: the head in the cache, for hidden targets.
    """

    def __init__(self, metadata: cf.CacheMetadata, rule: TargetRule, stored_head: TeacherHead | None = None) -> None:
        self.metadata, self.rule, self.stored_head = metadata, rule, stored_head

    def stored(self, row: cf.CacheRow) -> np.ndarray:
        """[T] bool: positions that have targets."""
        everywhere = self.metadata.targets.get("positions") == "all"
        return np.ones(len(row.loss_mask), bool) if everywhere else np.array(row.loss_mask, bool)

    @torch.inference_mode()
    def check(
        self, row: cf.CacheRow, place: int, alone: TeacherRun, rounded: TeacherRun, in_batch: TeacherRun
    ) -> RowCheck:
        """Compares a row of the cache with three runs of the teacher.

        Args:
            place: key of the row's random numbers.
        """
        mask, vocab_size = self.stored(row), self.metadata.vocab_size
        targets = StoredTargets(row, mask, self.metadata, self.rule, place)
        nearest = None if self.stored_head is None else self._nearest(row, alone, self.stored_head.spec.layer)
        found: tuple[list[Distances], ...] = ([], [], [])
        same, same_rounding = np.zeros(2, int), np.zeros(2, int)
        for start in range(0, max(1, int(mask.sum())), CHUNK_POSITIONS):
            here = slice(start, start + CHUNK_POSITIONS)
            logprobs, other, together = (run.logprobs(here) for run in (alone, rounded, in_batch))
            exact = targets.exact(here, vocab_size)
            distances = targets.distances(logprobs, here)
            if self.stored_head is not None and nearest is not None:
                rebuilt = self.stored_head(nearest[here]).double().log_softmax(dim=1)
                distances = distances.of_states(distances_of_run(rebuilt, logprobs, exact), self.stored_head.spec.layer)
                likeliest = logprobs.argmax(dim=1)
                same += _equal(rebuilt.argmax(dim=1), likeliest)
                same_rounding += _equal(other.argmax(dim=1), likeliest)
            for parts, part in zip(
                found,
                (distances, distances_of_run(other, logprobs, exact), distances_of_run(together, logprobs, exact)),
                strict=True,
            ):
                parts.append(part)
        if self.stored_head is None:
            same += _common(row, alone.row, vocab_size)
            same_rounding += _common(rounded.row, alone.row, vocab_size)
        entries = mask.sum() * vocab_size if self.stored_head is not None else (targets.ids >= 0).sum()
        cached, *others = (Distances.cat(parts) for parts in found)
        means = {
            name: _means(name, row.row, *(getattr(each, name) for each in (cached, *others)))
            for name in ("divergence", "draws")
        }
        position = np.flatnonzero(mask)
        return RowCheck(
            positions=len(position),
            entries=int(entries),
            divergence=means["divergence"],
            deviation=_deviation(row.row, position, cached, *others),
            draws=means["draws"] if self.rule.sampled else None,
            states=None if row.hidden is None else self._states(row, alone, rounded, in_batch),
            same=same,
            same_rounding=same_rounding,
        )

    def _nearest(self, row: cf.CacheRow, alone: TeacherRun, layer: int) -> Tensor:
        """[n, D] float32: of all states that round to the stored ones, the nearest to the teacher's."""
        assert row.hidden is not None
        place = np.cumsum(row.hidden.mask)[self.stored(row)] - 1
        return state_bounds(row.hidden, layer).nearest(_states(alone, layer).double())[place].float()

    def _states(
        self, row: cf.CacheRow, alone: TeacherRun, rounded: TeacherRun, in_batch: TeacherRun
    ) -> Comparison | None:
        hidden = row.hidden
        assert hidden is not None and self.metadata.hidden is not None
        position, found = np.flatnonzero(hidden.mask), []
        for layer in self.metadata.hidden.layers if len(position) else ():
            teacher = _states(alone, layer).double()
            off, *others = (
                state_distances(stored, teacher)
                for stored in (
                    state_bounds(hidden, layer),
                    *(exactly(_states(run, layer)) for run in (rounded, in_batch)),
                )
            )
            found.append(
                Comparison(
                    name="states",
                    found=float(off.max()),
                    at=f"hidden_{layer} of row {row.row}, position {position[int(off.argmax())]}",
                    rounding=float(others[0].max()),
                    batch=float(others[1].max()),
                )
            )
        return worst(found) if found else None


def _states(run: TeacherRun, layer: int) -> Tensor:
    """[m, D]"""
    assert run.row.hidden is not None
    return torch.from_numpy(run.row.hidden.values(layer))


def _means(name: str, row: int, *distances: Tensor) -> Comparison:
    """Means of three [n] distances: of the cache, of the pass with rounding errors, and of the pass in a batch."""
    found, rounding, batch = (float(each.mean()) if len(each) else 0.0 for each in distances)
    return Comparison(name=name, found=found, at=f"row {row}", rounding=rounding, batch=batch)


def _deviation(row: int, position: np.ndarray, *distances: Distances) -> Comparison:
    (name, place, found), rounding, batch = (each.worst() for each in distances)
    at = f"{name} of row {row}, position {position[place]}" if len(position) else f"row {row}"
    return Comparison(name="deviation", found=found, at=at, rounding=rounding.value, batch=batch.value)


def _equal(tokens: Tensor, teacher: Tensor) -> np.ndarray:
    """How many are equal, of how many."""
    return np.array([int((tokens == teacher).sum()), len(teacher)])


def _common(row: cf.CacheRow, teacher: cf.CacheRow, vocab_size: int) -> np.ndarray:
    """Number of entries that both have (the same token, position and sample), of how many the longer list has."""

    def keys(row: cf.CacheRow) -> np.ndarray:
        counts = group_counts(row.targets)
        position = np.repeat(np.arange(len(counts)), row.targets.counts)
        return (position * counts.shape[1] + entry_groups(counts)) * vocab_size + row.targets.ids

    first, second = keys(row), keys(teacher)
    return np.array([len(np.intersect1d(first, second, assume_unique=True)), max(len(first), len(second))])
