"""The sparse distillation loss, written plainly: the definition that the fused head must reproduce.

Takes full student logits, works in fp32 (fp64 for fp64 logits), lets autograd do the rest. Memory: several
[N, V] tensors. For training use `pipeline.losses.fused_head_loss`, which equals this on `hidden @ weight.T + bias`.

    L = w·[(1 − α)·CE(label) + α·T²·D(teacher_T ‖ student_T)]      Hinton et al., 2015, https://arxiv.org/abs/1503.02531

D is the forward KL unless another divergence is named, w is 1 unless positions are weighted. T² keeps the size of the
soft gradient from falling as 1/T²; it is part of the loss, hence of the gradient.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from cache_format import SparseTargets
from pipeline.losses.divergence_sum import FORWARD_KL, Mixture, soft_losses
from pipeline.losses.sparse_targets import TargetBatch
from pipeline.losses.tails import ABSENT, UNDERFLOW_NATS, StudentValues, TailPolicy, entries_of
from pipeline.losses.weighting import PositionWeighting, check_weighting, position_weight

Reduction = Literal["mean", "sum", "none"]


def sparse_kl(
    student_logits: Tensor,
    targets: TargetBatch | SparseTargets,
    *,
    labels: Tensor | None = None,
    loss_mask: Tensor | None = None,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    tail: TailPolicy = "bucket",
    divergence: str | Mixture = FORWARD_KL,
    position_weighting: PositionWeighting = "uniform",
    capture_temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """w·[(1 − kd_weight)·CE + kd_weight·T²·D(teacher‖student)]; with the defaults exactly KL(teacher‖student) in nats.

    With K = V and the defaults it equals
    `F.kl_div(log_softmax(student_logits), teacher_logprobs, log_target=True, reduction="batchmean")`.

    Args:
        student_logits: [N, V] or [B, T, V], any float dtype. Cut to the teacher's vocabulary by the caller.
        targets: a `TargetBatch` of N positions, or one row's `SparseTargets` straight from a cache.
        labels: [N] int64 true tokens with -100 where a position does not count; overrides those of a `TargetBatch`.
        loss_mask: [N] bool, further positions that do not count.
        temperature: T, divides both sides' logits in the divergence (not in the CE).
        kd_weight: α.
        tail: what becomes of the mass outside the entries, see `pipeline.losses.tails`.
        divergence: D: a name, a weighted sum, or a function of your own, see `pipeline.losses.divergence_sum`.
        position_weighting: w, see `pipeline.losses.weighting`. Of "mean" the divisor stays the number of positions.
        capture_temperature: of `SparseTargets`, as in the cache's metadata; a `TargetBatch` knows its own.
        reduction: "mean" over counted positions (0 if there are none), "sum", or "none" for [N].

    Raises:
        ValueError: shapes that do not match, a loss that needs labels without any, a divergence that is not known or
            means nothing under this policy.
    """
    check_weighting(position_weighting)
    mixture = Mixture.parse(divergence)
    mixture.check_tail(tail)
    logits = student_logits.reshape(-1, student_logits.shape[-1])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if isinstance(targets, SparseTargets):
        if labels is None and (kd_weight != 1.0 or tail in ("label", "realized")):
            raise ValueError(f"labels are needed for kd_weight={kd_weight}, tail={tail!r}: pass labels=row.label_ids")
        targets = TargetBatch.from_sparse(targets, temperature=capture_temperature)
    if labels is not None or loss_mask is not None:
        new = targets.labels if labels is None else torch.as_tensor(labels).reshape(-1)
        if loss_mask is not None:
            new = new.masked_fill(~torch.as_tensor(loss_mask, dtype=torch.bool).reshape(-1), -100)
        targets = replace(targets, labels=new)
    if len(targets) != len(logits):
        raise ValueError(f"student_logits have {len(logits)} positions, targets {len(targets)}")
    targets = entries_of(targets, tail, temperature).to(device=logits.device, dtype=logits.dtype)

    student = student_values(logits / temperature, targets)
    _, soft = soft_losses(targets, student, tail, temperature, logits.shape[-1], mixture)
    label = targets.labels.clamp(min=0)
    log_q = logits.log_softmax(dim=-1)
    ce = -log_q.gather(1, label[:, None]).squeeze(1)
    loss = (1.0 - kd_weight) * ce + kd_weight * temperature**2 * soft
    if position_weighting != "uniform":
        entropy = targets.entropy if position_weighting == "teacher-entropy" else -(log_q.exp() * log_q).sum(dim=1)
        # Of a position that does not count the entropy may be NaN, and NaN·0 is no gradient.
        loss = loss * position_weight(torch.where(targets.counted, entropy, 0.0), logits.shape[-1])

    loss = torch.where(targets.counted, loss, 0.0)
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / targets.counted.sum().clamp(min=1)


def student_values(logits: Tensor, targets: TargetBatch) -> StudentValues:
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
