"""How much a position counts in the loss: all the same, or by how uncertain the teacher or the student is there.

    w = 1                        uniform
    w = H(teacher) / log V       teacher-entropy: of the full distribution, at the temperature of the cache
    w = H(student) / log V       student-entropy: at temperature 1, no gradient through it

Both parts of a position's loss are multiplied by w, so α keeps its meaning. The sum is still divided by the number of
counted positions, not by Σw: a weight is then a function of its position alone, and gradient accumulation and several
processes give what one batch gives, exactly. The loss gets smaller by the mean of w, which Adam divides out again; with
plain SGD raise the learning rate by as much.

Costs nothing for the teacher's entropy, which is in the cache, and one more pass over the V logits for the student's.
Su et al., 2023, weight by the entropy of both: https://arxiv.org/abs/2311.13621.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

PositionWeighting = Literal["uniform", "teacher-entropy", "student-entropy"]
POSITION_WEIGHTINGS: tuple[PositionWeighting, ...] = get_args(PositionWeighting)


def check_weighting(weighting: str) -> None:
    """Raises: ValueError if there is no such weighting."""
    if weighting not in POSITION_WEIGHTINGS:
        raise ValueError(f"position_weighting {weighting}: expected one of {', '.join(POSITION_WEIGHTINGS)}")


def position_weight(entropy: Tensor, vocab_size: int) -> Tensor:
    """[n] H / log V of entropies [n] in nats, from 0 to 1; a teacher without a known entropy stays NaN."""
    return (entropy.detach() / math.log(max(2, vocab_size))).clamp(0.0, 1.0)


@torch.no_grad()
def entropy_of_parts(others: Tensor, taken: Tensor) -> Tensor:
    """[n] entropy of the softmax whose unnormalised probabilities are exp(z − max z) [n, V] and more of them [n, k]."""
    total = others.sum(dim=1) + taken.sum(dim=1)
    # entr(e) = −e·log e = −e·(z − max z), and 0 where e has underflowed, as it should be.
    return total.log() + (torch.special.entr(others).sum(dim=1) + torch.special.entr(taken).sum(dim=1)) / total
