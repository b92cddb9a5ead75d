"""The loss on whole distributions, a chunk of positions at a time: what the reference arm learns from.

    L = Σ_n  c_n·lse(z_n) − Σ_v t_nv·z_nv + Σ_v t_nv·log t_nv        z = hidden·Wᵀ

With t the teacher's p and c = 1 this is KL(p‖q), and its gradient softmax(z) − p. With t the weights of a sample it is
the estimate of that: c = 1 as `pipeline.losses` has it, or c = Σ_v t_v, with which the loss does not change when all
logits are shifted, and the gradient sums to zero over the vocabulary.

Shapes: N positions, n of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK_POSITIONS = 128

Distributions = Callable[[slice], Tensor]
"""Positions → [n, V] float: their targets."""


def dense_loss(
    hidden: Tensor, weight: Tensor, targets: Distributions, *, shift_invariant: bool = False, scale: float = 1.0
) -> Tensor:
    """The loss above, summed over positions, times `scale`; gradients for `hidden` [N, D] and `weight` [V, D]."""
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
