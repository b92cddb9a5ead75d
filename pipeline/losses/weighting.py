"""Weights of positions in the loss: uniform, or by the entropy of the teacher or the student.

    w = 1                        uniform
    w = H(teacher) / log V       teacher-entropy: of the full distribution, at the temperature of the cache
    w = H(student) / log V       student-entropy: at temperature 1, no gradient through it

w multiplies both parts of a position's loss, so α keeps its meaning. The sum is divided by the number of loss tokens,
not by Σw: a weight then depends on its position alone, and gradient accumulation and several processes give exactly
what one batch gives. The loss is smaller by the mean of w, which Adam cancels; with plain SGD raise the learning rate.

Cost: none for the teacher's entropy, which is in the cache; one more pass over the V logits for the student's.
Source: Su et al., 2023, weight by the entropy of both, https://arxiv.org/abs/2311.13621.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

PositionWeighting = Literal["uniform", "teacher-entropy", "student-entropy"]
POSITION_WEIGHTINGS: tuple[PositionWeighting, ...] = get_args(PositionWeighting)


def check_weighting(weighting: str) -> None:
    """Raises: ValueError for an unknown weighting."""
    if weighting not in POSITION_WEIGHTINGS:
        raise ValueError(f"`position_weighting` {weighting}: expected one of {', '.join(POSITION_WEIGHTINGS)}.")


def position_weight(entropy: Tensor, vocab_size: int) -> Tensor:
    """[n] H / log V from entropies H [n] in nats, between 0 and 1; NaN where the entropy is unknown."""
    return (entropy.detach() / math.log(max(2, vocab_size))).clamp(0.0, 1.0)


@torch.no_grad()
def entropy_of_parts(total: Tensor, surprise: Tensor, taken: Tensor) -> Tensor:
    """[n] entropy of the softmax with unnormalised probabilities e = exp(z − max z).

    Args:
        total, surprise: [n] Σ e and −Σ e·log e over the tokens that are not among `taken`.
        taken: [n, k] e of the others.
    """
    total = total + taken.sum(dim=1)
    return total.log() + (surprise + torch.special.entr(taken).sum(dim=1)) / total
