"""Divergences between teacher and student over the K+1 classes of a tail policy.

Plain torch, nothing vocabulary-wide: [n, K+1] → [n], in nats. Differentiable in `log_q`; classes where the teacher has
no mass may be -inf on both sides.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) = Σ p·(log p − log q), with 0·log 0 = 0. Equals `F.kl_div(log_q, log_p, log_target=True)` per row.

    Args:
        log_p: [n, K+1] teacher log-probabilities, normalised.
        log_q: [n, K+1] student log-probabilities.
    """
    present = log_p > -torch.inf
    # Replaced before the subtraction, not after: -inf − -inf is NaN, and NaN·0 poisons the gradient.
    difference = log_p.masked_fill(~present, 0.0) - log_q.masked_fill(~present, 0.0)
    return (log_p.exp() * difference).sum(dim=1)
