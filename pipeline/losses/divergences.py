"""Divergences between teacher and student, on the few numbers per position that a tail policy keeps.

Plain torch, nothing vocabulary-wide, in nats: log p, log q [n, C] → [n], differentiable in the student's log q. C is
K+1 classes, or K+2 under the policy `label` (see `tails.distributions`). log p is -inf for a class without teacher
mass; log q is at most `ABSENT` for a class that does not exist, which adds exactly zero to value and gradient.
`logit_mse` and `pairwise` compare logits of the K exact entries instead, up to a constant per position.

When to use which, ranges and sources: docs/divergences.md. `divergence_sum.py` gives them names and weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.losses.entries import TargetEntries
from pipeline.losses.tails import (
    ABSENT,
    UNBIASED,
    StudentValues,
    TailPolicy,
    student_classes,
    teacher_classes,
    weights,
)

FLOOR = math.log(torch.finfo(torch.float32).eps)
"""-15.9 nats, replaces log 0 in divergences that take the logarithm of a class without teacher mass: a cache stores 0
for a tail mass too small for its codebook. A student at or below it agrees with such a class."""


def soft_loss(
    targets: TargetEntries, student: StudentValues, tail: TailPolicy, temperature: float, vocab_size: int
) -> Tensor:
    """[n] KL(teacher_T‖student_T) under a tail policy; under an unbiased one an estimate, which may be negative.

    Args:
        targets: from `entries_of`.
        student: at temperature T.
    """
    if tail in UNBIASED:
        return estimated_forward_kl(targets, student, *weights(targets, tail))
    log_p = teacher_classes(targets, tail, temperature, vocab_size)
    return forward_kl(log_p, student_classes(student, tail))


def estimated_forward_kl(targets: TargetEntries, student: StudentValues, entries: Tensor, label: Tensor) -> Tensor:
    """[n] lse(z) − Σ w_i z_i − H(p), an unbiased estimate of KL(p‖q) = Σ p_i (log p_i − log q_i) and of its gradient.

    The coefficient of lse is 1 and not Σw, which is 1 only on average: the gradient is then softmax(z) − w, and the
    student's own term in it has no noise.

    Args:
        entries: [n, K] weights of the entries.
        label: [n] weight of the label where it is not an entry.
    """
    z_label = torch.where(student.label > ABSENT / 1e6, student.label, 0.0)  # ABSENT may have been divided by T
    return sampled_forward_kl(targets, student.entries, student.lse, entries) - label * z_label


def sampled_forward_kl(targets: TargetEntries, z: Tensor, lse: Tensor, entries: Tensor | None = None) -> Tensor:
    """[n] `estimated_forward_kl` without the label, from the student's logits at the entries and lse(z) alone.

    Args:
        z: [n, K] at the temperature of the targets; any value where padded.
        entries: [n, K] weights; default: those of the policy `sampled`.
    """
    entries = targets.logprobs.exp() if entries is None else entries
    return lse - (entries * torch.where(targets.valid, z, 0.0)).sum(dim=1) - targets.entropy


# ---- between distributions over classes


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) = Σ p·(log p − log q), with 0·log 0 = 0. Equals `F.kl_div(log_q, log_p, log_target=True)` per row.

    Range [0, ∞). Hinton et al., 2015, https://arxiv.org/abs/1503.02531.

    Args:
        log_p: [n, K+1] teacher log-probabilities, normalised.
        log_q: [n, K+1] student log-probabilities.
    """
    present = log_p > -torch.inf
    # Replaced before the subtraction, not after: -inf − -inf is NaN, and NaN·0 poisons the gradient.
    difference = log_p.masked_fill(~present, 0.0) - log_q.masked_fill(~present, 0.0)
    return (log_p.exp() * difference).sum(dim=1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q‖p) = Σ q·(log q − log p), with `FLOOR` for log 0.

    Range [0, ∞). Seeks modes: q leaves where p is small. Gu et al., 2024 (MiniLLM), https://arxiv.org/abs/2306.08543.
    """
    log_p, log_q = floored(log_p, log_q)
    return forward_kl(log_q, log_p)


def js(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """β·KL(p‖m) + (1 − β)·KL(q‖m) with m = β·p + (1 − β)·q: generalised Jensen–Shannon.

    Range [0, H(β)], H(β) = −β·log β − (1 − β)·log(1 − β) ≤ log 2. Divided by β it tends to KL(p‖q) as β → 0, divided
    by 1 − β to KL(q‖p) as β → 1; near agreement it is β·(1 − β) of either.
    Agarwal et al., 2024 (GKD), https://arxiv.org/abs/2306.13649.
    """
    log_q = log_q.clamp(min=ABSENT)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * forward_kl(log_p, log_m) + (1.0 - beta) * forward_kl(log_q, log_m)


def skew_forward_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """KL(p ‖ λ·p + (1 − λ)·q): forward KL whose gradient stays bounded where q is far too small.

    Range [0, −log λ]. Ko et al., 2024 (DistiLLM), https://arxiv.org/abs/2402.03898.
    """
    log_q = log_q.clamp(min=ABSENT)
    return forward_kl(log_p, torch.logaddexp(log_p + math.log(skew), log_q + math.log1p(-skew)))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """KL(q ‖ λ·q + (1 − λ)·p): reverse KL that is finite where the teacher has no mass.

    Range [0, −log λ]. Ko et al., 2024 (DistiLLM), https://arxiv.org/abs/2402.03898.
    """
    log_q = log_q.clamp(min=ABSENT)
    return forward_kl(log_q, torch.logaddexp(log_q + math.log(skew), log_p + math.log1p(-skew)))


def tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """½·Σ|p − q|: total variation, the smallest possible share of draws in which teacher and student differ.

    Range [0, 1]. Wen et al., 2023 (f-distill), https://arxiv.org/abs/2307.15190.
    """
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=1)


def alpha_beta(log_p: Tensor, log_q: Tensor, alpha: float = 0.5, beta: float = 0.5) -> Tensor:
    """−1/(αβ)·Σ (p^α·q^β − α/(α+β)·p^(α+β) − β/(α+β)·q^(α+β)), its limits at α = 0 and β = 0, `FLOOR` for log 0.

    (1, 0) is the forward KL, (0, 1) the reverse, (½, ½) four times Σ(√p − √q)²/2, (0, 0) ½·Σ(log p − log q)². A larger
    α gives more weight to classes where p is large, a larger α + β to classes where both are. Range [0, ∞).
    Wang et al., 2025 (ABKD), https://arxiv.org/abs/2505.04560; Cichocki et al., 2011, https://doi.org/10.3390/e13010134.

    Computed as p^s/α·[φ_s(d) − φ_β(d)], φ_c(d) = (e^(cd) − 1)/c, d = log q − log p, s = α + β, with p the side of the
    larger power: the same sum without a difference of large terms, and with the limits included.
    """
    log_p, log_q = floored(log_p, log_q)
    if alpha == 0.0 == beta:
        return 0.5 * (log_p - log_q).square().sum(dim=1)
    a, b = log_p, log_q
    if alpha < beta:
        a, b, alpha, beta = log_q, log_p, beta, alpha
    s = alpha + beta
    whole = _exp_step(s * a, s * (b - a)) / s
    part = (s * a).exp() * (b - a) if beta == 0.0 else _exp_step(s * a, beta * (b - a)) / beta
    return (whole - part).sum(dim=1) / alpha


def floored(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """log p with `FLOOR` for log 0, and log q at least `FLOOR` in the same classes.

    A class that does not exist is then equal on both sides, and adds nothing to a sum of differences.
    """
    nothing = log_p == -torch.inf
    return log_p.masked_fill(nothing, FLOOR), torch.where(nothing, log_q.clamp(min=FLOOR), log_q)


def _exp_step(x: Tensor, step: Tensor) -> Tensor:
    """exp(x + step) − exp(x), accurate for the smallest step; x and x + step must not overflow."""
    small = step.abs() < 1.0
    return torch.where(small, x.exp() * torch.expm1(torch.where(small, step, 0.0)), (x + step).exp() - x.exp())


# ---- between logits of the exact entries


def logit_mse(log_p: Tensor, z: Tensor) -> Tensor:
    """Mean over the entries of (e − ē)², e = z − log p: squared error of logits, both centred over the entries.

    Centred because a constant per position does not change a distribution. Range [0, ∞); T²·D is the same for every
    temperature T. Kim et al., 2021, https://arxiv.org/abs/2105.08919.

    Args:
        log_p: [n, K] teacher log-probabilities of the exact entries, up to a constant; -inf for padding.
        z: [n, K] student logits of the same tokens.
    """
    there = log_p > -torch.inf
    count = there.sum(dim=1, keepdim=True).clamp(min=1)
    error = _errors(log_p, z, there)
    centred = (error - error.sum(dim=1, keepdim=True) / count).masked_fill(~there, 0.0)
    return centred.square().sum(dim=1) / count[:, 0]


def pairwise(log_p: Tensor, z: Tensor) -> Tensor:
    """Σ_{i<j} p_i·p_j·((z_i − z_j) − (log p_i − log p_j))², p rescaled to sum to one over the entries.

    Differences of logits, weighted towards likely pairs. Equals the variance of e = z − log p under p, so it costs K
    operations, not K²; with all p equal it is `logit_mse`. Range [0, ∞); near agreement twice the KL over the entries.
    After Li et al., 2024 (BiLD), https://arxiv.org/abs/2406.13555, who compare the softmax of all pairs' differences.

    Args: as for `logit_mse`.
    """
    there = log_p > -torch.inf
    p = (log_p - torch.logsumexp(log_p, dim=1, keepdim=True).clamp(min=ABSENT)).exp()
    error = _errors(log_p, z, there)
    return (p * (error - (p * error).sum(dim=1, keepdim=True)).square()).sum(dim=1)


def _errors(log_p: Tensor, z: Tensor, there: Tensor) -> Tensor:
    return z.masked_fill(~there, 0.0) - log_p.masked_fill(~there, 0.0)
