"""The teacher's own cross-entropy by position: whether later windows of long documents are predicted as well as first
ones.

A later window begins in the middle of a text, with little context. If the teacher is worse there than at the same
positions of first windows, its targets there are worse too, and a student learns that. Cost: one logsumexp for each
loss token of the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.teacher.engines.interface import RowRequest
from pipeline.teacher.text.packing import TokenCorpus

BEGINNING = 32  # positions of a window
_LEAST_DIFFERENCE = 0.1  # nats per token; less is no reason to change anything
_STANDARD_ERRORS = 3


@dataclass(frozen=True, kw_only=True)
class MeanLoss:
    """The mean cross-entropy of some tokens."""

    nats: float  # per token
    standard_error: float  # as if tokens were independent
    tokens: int

    def exceeds(self, other: MeanLoss) -> bool:
        """Whether it is greater by more than chance and more than a trifle."""
        noise = _STANDARD_ERRORS * float(np.hypot(self.standard_error, other.standard_error))
        return self.nats - other.nats > max(_LEAST_DIFFERENCE, noise)


@dataclass(frozen=True, kw_only=True)
class WindowLoss:
    """The cross-entropy of windows at their first positions and at the others; None without loss tokens."""

    beginning: MeanLoss | None
    rest: MeanLoss | None


@dataclass(frozen=True, kw_only=True)
class PositionLoss:
    """The teacher's cross-entropy at loss tokens, in windows that begin a document and in later ones."""

    boundary: int  # positions before it are the beginning of a window
    first: WindowLoss
    later: WindowLoss

    @property
    def worse(self) -> tuple[MeanLoss, MeanLoss] | None:
        """The losses of first and later windows at the same positions, where later ones are worse."""
        for first, later in ((self.first.beginning, self.later.beginning), (self.first.rest, self.later.rest)):
            if first is not None and later is not None and later.exceeds(first):
                return first, later
        return None


class PositionLossMeter:
    """Measures batches of rows of a corpus."""

    def __init__(self, corpus: TokenCorpus) -> None:
        self._corpus = corpus
        self._losses: list[np.ndarray] = [np.zeros(0)]
        self._positions: list[np.ndarray] = [np.zeros(0, np.int64)]  # in their windows
        self._later: list[np.ndarray] = [np.zeros(0, bool)]

    def add(self, batch: Sequence[RowRequest], label_logprobs: np.ndarray) -> None:
        """Adds the loss tokens of a batch.

        Args:
            label_logprobs: [n] float32, log-probability of the token that follows each stored position.
        """
        in_loss, positions, later = (np.concatenate(parts) for parts in zip(*map(self._facts, batch), strict=True))
        self._losses.append(-label_logprobs[in_loss].astype(np.float64))
        self._positions.append(positions[in_loss])
        self._later.append(later[in_loss])

    def _facts(self, request: RowRequest) -> tuple[np.ndarray, ...]:
        """For each stored position: whether it is in the loss, its place in its window, whether that is a later one."""
        row, stored = request.row, np.flatnonzero(request.stored)
        lengths = np.asarray(row.segment_lengths, np.int64)
        begins = np.repeat(np.cumsum(lengths) - lengths, lengths)
        later = np.repeat(self._corpus.continues(request.index), lengths)
        every = (np.asarray(row.loss_mask, bool), np.arange(len(begins)) - begins, later)
        return tuple(each[stored] for each in every)

    def result(self) -> PositionLoss:
        losses, positions, later = map(np.concatenate, (self._losses, self._positions, self._later))
        beginning = positions < BEGINNING
        return PositionLoss(
            boundary=BEGINNING,
            first=WindowLoss(beginning=_mean(losses[~later & beginning]), rest=_mean(losses[~later & ~beginning])),
            later=WindowLoss(beginning=_mean(losses[later & beginning]), rest=_mean(losses[later & ~beginning])),
        )


def _mean(losses: np.ndarray) -> MeanLoss | None:
    if not len(losses):
        return None
    error = float(losses.std(ddof=1) / np.sqrt(len(losses))) if len(losses) > 1 else float("inf")
    return MeanLoss(nats=float(losses.mean()), standard_error=error, tokens=len(losses))
