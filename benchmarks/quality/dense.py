"""The loss on full distributions, a chunk of positions at a time: the objective of the reference arm.

    L = Σ_n  c_n·lse(z_n) − Σ_v t_nv·z_nv + Σ_v t_nv·log t_nv        z = hidden·Wᵀ

With t = p of the teacher and c = 1, this is KL(p‖q), with gradient softmax(z) − p. With t the weights of a sample, it
is an estimate of the KL: c = 1 as in `pipeline.losses`, or c = Σ_v t_v, which makes the loss invariant to a shift of
all logits and its gradient sum to zero over the vocabulary.

Shapes: N positions, n positions of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK_POSITIONS = 128

Distributions = Callable[[slice], Tensor]
"""Positions → their targets, [n, V] float."""


def dense_loss(
    hidden: Tensor, weight: Tensor, targets: Distributions, *, shift_invariant: bool = False, scale: float = 1.0
) -> Tensor:
    """The loss above, summed over positions, times `scale`; differentiable in `hidden` [N, D] and `weight` [V, D]."""
    return _Dense.apply(hidden, weight, targets, shift_invariant, scale)  # type: ignore[no-any-return]


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, hidden: Tensor, weight: Tensor, targets: Distributions, shift_invariant: bool, scale: float
    ) -> Tensor:
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(hidden), CHUNK_POSITIONS):
            here = slice(start, min(start + CHUNK_POSITIONS, len(hidden)))
            t = targets(here)  # [n, V]
            logits = hidden[here] @ weight.T
            lse = torch.logsumexp(logits, dim=1, keepdim=True)
            logprobs = logits.sub_(lse)
            mass = t.sum(dim=1, keepdim=True)
            coefficient = mass if shift_invariant else torch.ones_like(mass)
            terms = torch.xlogy(t, t).sum() - (t * logprobs).sum() + ((coefficient - mass) * lse).sum()
            total += terms.double()
            d_logits = logprobs.exp_().mul_(coefficient).sub_(t).mul_(scale)
            d_hidden[here] = d_logits @ weight
            d_weight.addmm_(d_logits.T, hidden[here])
        ctx.save_for_backward(d_hidden, d_weight)
        return (total * scale).to(hidden.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad, d_weight * grad, None, None, None
