"""The K most likely tokens at some positions, as a server gives them ─▶ sparse targets.

What is not in a list is known only by its sum: the tail mass is 1 − Σp, right to about 1e-6. So the entropy is a lower
bound, that of the entries and the tail as one outcome; the manifest says so (`targets.entropy`).
Shapes: n positions, K entries of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.teacher.engines.server.http_client import UnusableAnswer
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import ChunkTargets, is_exact

ROUNDING = 2e-3
"""By which the probabilities of a list may exceed 1: log-softmax in bfloat16 of a large vocabulary."""
MINUS_INFINITY = -9999.0
"""What OpenAI-compatible servers write for a probability of 0, which JSON has no number for."""

SAME_NATS = 0.02
"""By which two statements of one log-probability may differ; servers round to bfloat16 here and there."""

Entries = Sequence[tuple[int, float]]
"""Token ids with their log-probabilities, in any order."""


@dataclass(frozen=True, eq=False)
class TopLists:
    """Lists of several positions.

    Attributes:
        ids: [n, K] int64, most likely first; of equally likely ones the smallest id first.
        logprobs: [n, K] float32, natural logs.
    """

    ids: np.ndarray
    logprobs: np.ndarray

    @classmethod
    def read(cls, lists: Sequence[Entries], k: int, vocab_size: int) -> TopLists:
        """Checks and sorts what was received.

        Raises: UnusableAnswer if a list has not K different ids below V with finite log-probabilities whose
            probabilities can belong to one distribution.
        """
        for i, entries in enumerate(lists):
            if len(entries) != k:
                raise UnusableAnswer(f"position {i}: found {len(entries)} log-probabilities, expected {k}", "cap")
        try:
            pairs = np.array(lists, np.float64).reshape(len(lists), k, 2)
        except (TypeError, ValueError) as error:
            raise UnusableAnswer(f"found entries that are not token ids with log-probabilities ({error})") from None
        ids, logprobs = pairs[:, :, 0], pairs[:, :, 1]
        order = np.lexsort((ids, -logprobs), axis=1)
        ids, logprobs = (np.take_along_axis(part, order, axis=1) for part in (ids, logprobs))
        _check(ids, logprobs, vocab_size)
        return cls(ids.astype(np.int64), logprobs.astype(np.float32))

    def check_own(self, own: Sequence[Sequence[Any]]) -> None:
        """Checks the lists against the log-probabilities of the prompt's own tokens, which are given beside them.

        Args:
            own: [n] log-probability and id of the token that follows each position.

        Raises: UnusableAnswer if a list belongs to another position.
        """
        try:
            logprobs, ids = np.array([each[:2] for each in own], np.float64).reshape(-1, 2).T
        except (TypeError, ValueError) as error:
            raise UnusableAnswer(f"found prompt tokens without a log-probability ({error})") from None
        here = self.ids == ids[:, None]
        listed = np.where(here.any(axis=1), np.where(here, self.logprobs, 0.0).sum(axis=1), logprobs)
        least = np.where(here.any(axis=1), -np.inf, logprobs) - SAME_NATS <= self.logprobs[:, -1]
        if (bad := ~(np.abs(listed - logprobs) <= SAME_NATS) | ~least).any():
            i = int(bad.argmax())
            raise UnusableAnswer(
                f"position {i}: found a log-probability of {logprobs[i]:.3f} for token {ids[i]:g} of the prompt, and a "
                "list of the most likely tokens that contradicts it: they belong to different positions"
            )

    @classmethod
    def empty(cls, k: int) -> TopLists:
        return cls(np.zeros((0, k), np.int64), np.zeros((0, k), np.float32))

    @classmethod
    def cat(cls, parts: Sequence[TopLists]) -> TopLists:
        return cls(np.concatenate([each.ids for each in parts]), np.concatenate([each.logprobs for each in parts]))

    def first(self, k: int) -> TopLists:
        """The K most likely ones."""
        return TopLists(self.ids[:, :k], self.logprobs[:, :k])

    def targets(self, rule: TargetRule, vocab_size: int) -> ChunkTargets:
        """Exact entries by a rule of kind top-k or top-p, as `sparse_targets` selects them from all V logits."""
        ids, logprobs = torch.from_numpy(self.ids), torch.from_numpy(self.logprobs).clamp(max=0.0)
        probs = logprobs.double().exp()
        keep = is_exact(probs, rule)  # [n, K]
        kept = torch.where(keep, probs, 0.0).sum(dim=1)
        residual = (1.0 - kept).clamp(min=0.0)
        surprise = torch.special.entr(torch.where(keep, probs, 0.0)).sum(dim=1) + torch.special.entr(residual)
        by_id, order = torch.where(keep, ids, vocab_size).sort(dim=1)
        return ChunkTargets(
            ids=torch.where(by_id < vocab_size, by_id, -1).to(torch.int32),
            logprobs=logprobs.gather(1, order),
            exact_counts=keep.sum(dim=1, dtype=torch.int32),
            sample_counts=torch.zeros((len(ids), 0), dtype=torch.int32),
            residual_logprob=residual.log().float(),
            entropy=surprise.float(),
        )


def _check(ids: np.ndarray, logprobs: np.ndarray, vocab_size: int) -> None:
    """Raises UnusableAnswer for numbers that cannot be one distribution for each position.

    Args:
        ids, logprobs: [n, K] float64, most likely first.
    """
    bad = ~np.isfinite(logprobs) | (logprobs <= MINUS_INFINITY)
    if bad.any():
        i = int(bad.any(axis=1).argmax())
        raise UnusableAnswer(
            f"position {i}: found a log-probability of {logprobs[i][bad[i]][0]:g}, expected finite ones"
        )
    bad = (ids < 0) | (ids >= vocab_size) | (ids != np.floor(ids))
    if bad.any():
        raise UnusableAnswer(f"found token id {ids[bad][0]:g}, expected ids below {vocab_size:,}, as in the tokenizer")
    in_order = np.sort(ids, axis=1)
    if (bad := in_order[:, 1:] == in_order[:, :-1]).any():
        raise UnusableAnswer(f"found token id {in_order[:, 1:][bad][0]:g} twice at one position")
    mass = np.exp(np.minimum(logprobs, 1.0)).sum(axis=1)
    complete = ids.shape[1] == vocab_size
    if (bad := (mass > 1 + ROUNDING) | (complete & (mass < 1 - ROUNDING))).any():
        raise UnusableAnswer(
            f"position {int(bad.argmax())}: found probabilities that sum to {mass[bad][0]:.4g}, expected "
            f"{'1' if complete else 'at most 1'}: these are not log-probabilities of the model's own distribution",
            "raw",
        )
