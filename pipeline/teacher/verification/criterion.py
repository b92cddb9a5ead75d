"""How far a correct cache may be from its teacher, and the result of a comparison.

The teacher computes the rows of the check alone, in the dtype that the manifest records. Three distances (four with
hidden states, see `distances`) are compared with what random rounding errors of that dtype do to the same rows
(`rounding`):

    allowed = FACTORS · distance under random rounding, at least FLOORS, at most CAPS

A correct cache passes. It differs from these predictions only by the rounding of its own run: another device, another
batch size. Random rounding errors are twice as large as those of such a run, and their distances are those of full
distributions: KL over the vocabulary is at least KL over entries and tail, and no drawn token is further from its
point than the furthest part of the distribution moves. FACTORS are the margin on top, larger for a maximum than for a
mean. FLOORS is what float32 arithmetic of the targets and of this check itself amounts to.

A wrong cache is further away. Another position, row, teacher or layer, or permuted tokens, cost tenths of nats to
several. CAPS bound what any noise can excuse: beyond them no student would take the one teacher for the other. A
smaller fault (a temperature of 1.05, a dtype coarser than recorded) shows if it is larger than the rounding of the
recorded dtype: in float32 always, in bfloat16 from about 0.02 nats on. A token that is drawn from a wrong distribution
often is another one, at hardly any distance if the tokens are rare, so the share of equal entries is compared too.

The numbers cannot show that a cache was computed in more bits than recorded, because it is as close to the teacher as
any run, nor what happened to the text before it became the tokens of a row.

Rows are also computed in a batch. A teacher that predicts something else there sees the other rows or the padding, so
that no cache of it is reproducible: another failure, and no excuse for the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

FACTORS = {"divergence": 2.0, "deviation": 3.0, "draws": 2.0, "states": 4.0}
FLOORS = {"divergence": 1e-9, "deviation": 1e-5, "draws": 1e-5, "states": 1e-5}
CAPS = {"divergence": 0.25, "deviation": 0.5, "draws": 0.1, "states": 0.5}
UNKNOWN = "unknown"
"""The dtype of a teacher on a server."""

SAME_FACTOR = 0.75  # least share of entries chosen again ÷ that share under random rounding
SAME_ERRORS = 3.0  # standard errors of that share, which are subtracted


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One distance between cache and teacher.

    Attributes:
        name: divergence (nats), deviation (of √p), draws (probability) or states (relative).
        found: mean over positions of divergence and draws, the largest deviation and states.
        at: where it is largest: a row, or a row and position.
        rounding: the same for the teacher with random rounding errors; on a server see `served_teacher`.
        batch: the same for the teacher with the rows in a batch instead of alone.
    """

    name: str
    found: float
    at: str
    rounding: float
    batch: float

    @property
    def allowed(self) -> float:
        return min(max(FACTORS[self.name] * self.rounding, FLOORS[self.name]), CAPS[self.name])

    @property
    def agrees(self) -> bool:
        return self.found <= self.allowed  # not if it is NaN

    @property
    def repeatable(self) -> bool:
        return self.batch <= self.allowed


def nan_last(value: float) -> float:
    """For the largest one: NaN counts as larger than any number."""
    return math.inf if math.isnan(value) else value


def worst(comparisons: Iterable[Comparison]) -> Comparison:
    """The largest distances of several rows or layers."""
    known = list(comparisons)
    furthest = max(known, key=lambda each: nan_last(each.found))
    rounding, batch = (max((getattr(each, name) for each in known), key=nan_last) for name in ("rounding", "batch"))
    return replace(furthest, rounding=rounding, batch=batch)


def mean(comparisons: Sequence[Comparison], weights: Sequence[int]) -> Comparison:
    """The mean distances of several rows, weighted by their numbers of positions."""
    total = max(1, sum(weights))
    found, rounding, batch = (
        sum(getattr(each, name) * weight for each, weight in zip(comparisons, weights, strict=True)) / total
        for name in ("found", "rounding", "batch")
    )
    return replace(worst(comparisons), found=found, rounding=rounding, batch=batch)


@dataclass(frozen=True, kw_only=True)
class TeacherCheck:
    """The result of comparing a cache with its teacher.

    Attributes:
        entries: exact entries that were compared; for hidden targets all V of every position.
        draws: None if nothing is sampled.
        states: None if there are no hidden states.
        same_entries: share of the stored entries that the teacher, asked again, chooses; for hidden targets, share of
            the positions with the same most likely token.
        same_entries_rounding: that share for the teacher with random rounding errors.
        same_entries_of: how many these are shares of.
        same_weights: by fingerprint, which another dtype changes too; None for a teacher on a server.
        same_template: the teacher's chat template is the one that the rows were written with; True without chats.
        dtype: of the teacher in this check.
        cache_dtype: as recorded.
    """

    rows: int
    positions: int
    entries: int
    divergence: Comparison
    deviation: Comparison
    draws: Comparison | None
    states: Comparison | None
    same_entries: float
    same_entries_rounding: float
    same_entries_of: int
    same_weights: bool | None
    same_template: bool
    dtype: str
    cache_dtype: str

    @property
    def comparisons(self) -> list[Comparison]:
        return [each for each in (self.divergence, self.deviation, self.draws, self.states) if each is not None]

    @property
    def same_entries_allowed(self) -> float:
        share = self.same_entries_rounding
        error = math.sqrt(share * (1.0 - share) / max(1, self.same_entries_of))
        return max(0.0, SAME_FACTOR * share - SAME_ERRORS * error)

    @property
    def repeatable(self) -> bool:
        """Whether this teacher predicts the same alone and in a batch."""
        return all(each.repeatable for each in self.comparisons)

    @property
    def agrees(self) -> bool:
        close = all(each.agrees for each in self.comparisons)
        return close and self.same_entries >= self.same_entries_allowed and self.same_template and self.repeatable

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        compared = {
            each.name: {"found": each.found, "allowed": each.allowed, "at": each.at, "agrees": each.agrees}
            | {"rounding": each.rounding, "batch": each.batch}
            for each in self.comparisons
        }
        more = {"same_entries_allowed": self.same_entries_allowed, "repeatable": self.repeatable}
        return {**values, **compared, **more}
