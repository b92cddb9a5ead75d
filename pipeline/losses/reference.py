"""The sparse distillation loss, written plainly: the definition that the fused head must reproduce.

    L = w·[(1 − α)·CE(label) + α·T²·D(teacher_T ‖ student_T)]      Hinton et al., 2015, https://arxiv.org/abs/1503.02531

D is the forward KL unless another divergence is named; w is 1 unless positions are weighted. T² keeps the soft gradient
from shrinking as 1/T²; it is part of the loss, hence of the gradient.

Takes full student logits, computes in fp32 (fp64 for fp64 logits), and leaves the gradient to autograd. Memory: several
[N, V] tensors. For training use `pipeline.losses.fused_head_loss`, which equals this on `hidden @ weight.T + bias`.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.special import entr

from cache_format import SparseTargets
from pipeline.losses.divergence_sum import FORWARD_KL, DivergenceSum, soft_losses
from pipeline.losses.entries import TargetEntries
from pipeline.losses.sparse_targets import SparseTargetBatch, batch_of
from pipeline.losses.spec import DistillLoss
from pipeline.losses.tails import ABSENT, UNDERFLOW_NATS, StudentValues, TailPolicy, entries_of
from pipeline.losses.weighting import PositionWeighting, position_weight

Reduction = Literal["mean", "sum", "none"]


def sparse_kl(
    student_logits: Tensor,
    targets: SparseTargetBatch | SparseTargets,
    *,
    labels: Tensor | np.ndarray | None = None,
    loss_mask: Tensor | np.ndarray | None = None,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    tail: TailPolicy = "bucket",
    divergence: str | DivergenceSum = FORWARD_KL,
    position_weighting: PositionWeighting = "uniform",
    capture_temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """w·[(1 − kd_weight)·CE + kd_weight·T²·D(teacher‖student)]; with the defaults exactly KL(teacher‖student) in nats.

    With K = V and the defaults it equals
    `F.kl_div(log_softmax(student_logits), teacher_logprobs, log_target=True, reduction="batchmean")`.

    Args:
        student_logits: [N, V] or [B, T, V], any float dtype, cut to the teacher's vocabulary.
        targets: a `SparseTargetBatch` of N positions, or one row's `SparseTargets` straight from a cache.
        labels: [N] int64 true tokens, -100 outside the loss mask; replaces those of a `SparseTargetBatch`.
        loss_mask: [N] bool, further restricts the loss tokens. That of the row belongs with its `SparseTargets`, which
            have no entries elsewhere.
        temperature: T, divides both sides' logits in the divergence (not in the CE).
        kd_weight: α.
        tail: treatment of the tail mass, see `pipeline.losses.tails`.
        divergence: D: a name, a weighted sum, or a function of your own, see `pipeline.losses.divergence_sum`.
        position_weighting: w, see `pipeline.losses.weighting`. "mean" still divides by the number of loss tokens.
        capture_temperature: of `SparseTargets`, from the cache's metadata; a `SparseTargetBatch` has its own.
        reduction: "mean" over loss tokens (0 if there are none), "sum", or "none" for [N].

    Raises:
        ValueError: shapes that do not match; a loss token without entries; a loss that needs labels without any; an
            unknown divergence, or one that cannot use this tail policy; an option out of range.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"sparse_kl: `reduction` {reduction}: expected {', '.join(get_args(Reduction))}.")
    loss = DistillLoss(
        kd_weight=kd_weight,
        temperature=temperature,
        tail=tail,
        divergence=divergence,  # type: ignore[arg-type]
        position_weighting=position_weighting,
    )
    logits = student_logits.reshape(-1, student_logits.shape[-1])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = batch_of(targets, labels, loss_mask, capture_temperature)
    targets.check_labels(loss)
    if len(targets) != len(logits):
        raise ValueError(f"sparse_kl: found {len(logits)} positions in the logits and {len(targets)} in the targets.")
    targets = entries_of(targets, tail, temperature).to(logits.device, logits.dtype)

    student = student_values(logits / temperature, targets)
    _, soft = soft_losses(targets, student, tail, temperature, logits.shape[-1], loss.divergence)
    label = targets.labels.clamp(min=0)
    log_q = logits.log_softmax(dim=-1)
    ce = -log_q.gather(1, label[:, None]).squeeze(1)
    losses = loss.weighted(ce, soft)
    if position_weighting != "uniform":
        entropy = targets.entropy if position_weighting == "teacher-entropy" else entr(log_q.exp()).sum(dim=1)
        # Outside the loss mask the entropy may be NaN, and NaN·0 would poison the gradient.
        losses = losses * position_weight(torch.where(targets.loss_mask, entropy, 0.0), logits.shape[-1])

    losses = torch.where(targets.loss_mask, losses, 0.0)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / targets.loss_mask.sum().clamp(min=1)


def student_values(logits: Tensor, targets: TargetEntries) -> StudentValues:
    """Splits [N, V] logits (already divided by T) into the entries', the label's and everything else's."""
    label = targets.labels.clamp(min=0)[:, None]  # [N, 1]
    label_is_entry = ((targets.ids == label) & targets.valid).any(dim=1)

    taken = torch.zeros_like(logits, dtype=torch.bool).scatter(1, label, True)
    taken = taken.scatter(1, torch.where(targets.valid, targets.ids, label), True)
    rest = torch.logsumexp(logits.masked_fill(taken, ABSENT), dim=1)
    floor = logits.detach().amax(dim=1) - UNDERFLOW_NATS
    return StudentValues(
        entries=logits.gather(1, targets.ids).masked_fill(~targets.valid, ABSENT),
        label=logits.gather(1, label).squeeze(1).masked_fill(label_is_entry, ABSENT),
        rest=torch.maximum(rest, floor),
    )
