"""Whether lists of entries are at the right positions, judged by how well they predict the text.

A list predicts the token it is about far better than its neighbours. Over the loss tokens, the mean log-probability of
the token after the position is compared with that of the token at the position and of the one after next. A token that
is not listed counts with the most it can have: the least likely entry, or the tail mass if that is smaller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.importing.readers.foreign_rows import Floats, Ints

OFFSETS = (-1, 0, 1)  # of the token, relative to the one that the list is to predict
FLOOR = -20.0  # nats; -inf of an empty tail would decide everything
LEAST_POSITIONS = 64
CLEARLY = 0.5  # nats, and five standard errors
LEAST_LISTED = 0.2  # a teacher's list holds most of the text


@dataclass
class ShiftEvidence:
    """Sums over positions; `added` accumulates them."""

    positions: int = 0
    listed: int = 0  # positions whose token is among the entries
    logprob: Floats = field(default_factory=lambda: np.zeros(3))  # Σ at each of OFFSETS
    gain: Floats = field(default_factory=lambda: np.zeros(3))  # Σ (at the offset − at 0)
    squares: Floats = field(default_factory=lambda: np.zeros(3))  # Σ (at the offset − at 0)²

    @classmethod
    def of(
        cls, input_ids: Ints, loss: NDArray[np.bool_], position: Ints, ids: Ints, logprobs: Floats, tail: Floats
    ) -> ShiftEvidence:
        """Args: position, ids, logprobs: [E], sorted by position and token. tail: [T]."""
        size = int(max(input_ids.max(initial=0), ids.max(initial=0))) + 1
        keys = position * size + ids
        least = np.zeros(len(input_ids))
        np.minimum.at(least, position, logprobs)
        bound = np.maximum(np.minimum(least, tail), FLOOR)
        where = np.flatnonzero(loss)
        where = where[(where + 2 < len(input_ids))]  # all three offsets exist
        found = np.empty((3, len(where)))
        listed = 0
        for i, offset in enumerate(OFFSETS):
            wanted = where * size + input_ids[where + 1 + offset]
            place = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
            there = keys[place] == wanted
            found[i] = np.where(there, logprobs[place], bound[where])
            listed += int(there.sum()) if offset == 0 else 0
        gain = found - found[1]
        return cls(len(where), listed, found.sum(axis=1), gain.sum(axis=1), np.square(gain).sum(axis=1))

    def add(self, other: ShiftEvidence) -> None:
        self.positions += other.positions
        self.listed += other.listed
        self.logprob = self.logprob + other.logprob
        self.gain = self.gain + other.gain
        self.squares = self.squares + other.squares

    @property
    def mean_logprob(self) -> Floats | None:
        """Mean at each of OFFSETS, nats; None without positions."""
        return self.logprob / self.positions if self.positions else None

    @property
    def better_offset(self) -> int | None:
        """The other offset that fits clearly better, if one does."""
        if self.positions < LEAST_POSITIONS:
            return None
        mean = self.gain / self.positions
        error = np.sqrt(np.maximum(self.squares / self.positions - mean**2, 0) / self.positions)
        clear = (mean > CLEARLY) & (mean > 5 * error)
        return OFFSETS[int(np.where(clear, mean, -math.inf).argmax())] if clear.any() else None

    @property
    def unrelated(self) -> bool:
        """Whether so few tokens of the text are listed that the lists seem to belong to another text or tokenizer."""
        return self.positions >= LEAST_POSITIONS and self.listed < LEAST_LISTED * self.positions
