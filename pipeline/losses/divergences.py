"""Divergences between teacher and student, from the few numbers per position that a tail policy leaves.

Plain torch, nothing vocabulary-wide, in nats. Over the K+1 classes of a policy: [n, K+1] → [n], differentiable in
`log_q`; classes where the teacher has no mass may be -inf on both sides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.losses.tails import (
    ABSENT,
    UNBIASED,
    StudentValues,
    TailPolicy,
    student_classes,
    teacher_classes,
    weights,
)
from pipeline.losses.targets import TargetBatch


def soft_loss(
    targets: TargetBatch, student: StudentValues, tail: TailPolicy, temperature: float, vocab_size: int
) -> Tensor:
    """[n] KL(teacher_T‖student_T) under a tail policy; of unbiased ones an estimate, below zero now and then.

    Args:
        targets: as `entries_of` gives them.
        student: at temperature T.
    """
    if tail in UNBIASED:
        return estimated_forward_kl(targets, student, *weights(targets, tail))
    log_p = teacher_classes(targets, tail, temperature, vocab_size)
    return forward_kl(log_p, student_classes(student, tail))


def estimated_forward_kl(targets: TargetBatch, student: StudentValues, entries: Tensor, label: Tensor) -> Tensor:
    """lse(z) − Σ w_i z_i − H(p): on average over the samples KL(p‖q) = Σ p_i (log p_i − log q_i), and so its gradient.

    The coefficient of lse is 1 and not Σw, which is 1 only on average: then the gradient is softmax(z) − w, in which
    the student's own part carries no noise.

    Args:
        entries: [n, K] weights of the entries.
        label: [n] weight of the label where it is none of the entries.
    """
    z_label = torch.where(student.label > ABSENT / 1e6, student.label, 0.0)  # a T divides ABSENT too
    z_entries = torch.where(targets.valid, student.entries, 0.0)
    return student.lse - (entries * z_entries).sum(dim=1) - label * z_label - targets.entropy


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
