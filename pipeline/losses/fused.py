"""Vocabulary head, softmax, divergence and both gradients in one walk over chunks of positions.

The plain way to a loss holds logits, their log-softmax and their gradient: three tensors of N·V floats. Here nothing
larger than chunk·V ever exists, because a sparse loss sees the V logits of a position through K+2 numbers only
(`StudentValues`): the entries' logits z_S, the label's, and the log-sum-exp r of everything else. So

    ∂L/∂z_j = ∂L/∂z_j                     for j in S or the label     (a scatter of K+1 numbers)
    ∂L/∂z_j = ∂L/∂r · exp(z_j − r)        for every other j           (a scalar per row times what softmax left)

The divergence and its K+2 derivatives are plain autograd on [n, K+2] tensors: a new divergence needs no new gradient.
Where the teacher's whole distribution is there (`full`), it is autograd on [n, V].
From dlogits come dHidden = dlogits·W and dWeight += dlogitsᵀ·h, in the forward pass; the backward pass only scales.

Per position, forward and backward: 6·D·V FLOPs in three matrix products, the same as plain cross-entropy, and five
passes over the V logits while the chunk is in cache, where plain cross-entropy makes as many over main memory.
The idea of computing the gradient of head and loss in chunks is that of Liger Kernel's fused linear cross-entropy
(https://arxiv.org/abs/2410.10989) and Cut Cross-Entropy (https://arxiv.org/abs/2411.09009).

Shapes: N positions, n positions of one chunk, D hidden width, V vocabulary, K entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.losses import full_targets as full
from pipeline.losses.divergence_sum import FORWARD_KL, Mixture, soft_losses
from pipeline.losses.divergences import sampled_forward_kl, soft_loss
from pipeline.losses.full_targets import FullTargets
from pipeline.losses.sparse_targets import TargetBatch
from pipeline.losses.tails import ABSENT, UNDERFLOW_NATS, StudentValues, TailPolicy, entries_of
from pipeline.losses.weighting import PositionWeighting, check_weighting, entropy_of_parts, position_weight

Targets = TargetBatch | FullTargets

CHUNK_POSITIONS = 512
"""Positions per chunk: enough rows for the matrix product to run at speed (measured in `benchmarks/`)."""


class Objective(NamedTuple):
    """What is minimised at a position: w·[(1 − kd_weight)·CE + kd_weight·T²·D], as in `sparse_kl`."""

    temperature: float
    kd_weight: float
    tail: TailPolicy
    mixture: Mixture
    weighting: PositionWeighting
    kl_tail: TailPolicy  # of what is measured beside it

    @classmethod
    def checked(
        cls,
        temperature: float,
        kd_weight: float,
        tail: TailPolicy,
        divergence: str | Mixture,
        weighting: PositionWeighting,
        kl_tail: TailPolicy | None,
    ) -> Objective:
        """Raises: ValueError for a divergence or weighting that is not known, or a divergence without this policy."""
        check_weighting(weighting)
        mixture = Mixture.parse(divergence)
        mixture.check_tail(tail)
        kl_tail = kl_tail or tail
        if kl_tail != tail and (kl_tail not in ("sampled", "bucket") or tail == "sampled"):
            raise ValueError(
                f"kl_tail {kl_tail} with tail {tail}: expected the same, or sampled, or bucket for entries"
            )
        return cls(temperature, kd_weight, tail, mixture, weighting, kl_tail)


class HeadOutput(NamedTuple):
    """Sums over counted positions, all float32 scalars (float64 for float64 input). Only `loss` carries a gradient.

    loss:      w·[(1 − α)·CE + α·T²·D], times `scale`; D is the KL unless another divergence is trained.
    kl:        KL(teacher‖student) under `kl_tail`, nats, whatever D and its policy are: runs can be compared by it. At
               T; of a sample, which cannot be tempered, at the temperature of the targets.
    ce:        cross-entropy with the hard label, nats.
    agreement: positions where the student's most likely token is (one of) the teacher's.
    count:     counted positions.
    """

    loss: Tensor
    kl: Tensor
    ce: Tensor
    agreement: Tensor
    count: Tensor


def fused_head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Targets,
    *,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    tail: TailPolicy = "bucket",
    divergence: str | Mixture = FORWARD_KL,
    position_weighting: PositionWeighting = "uniform",
    chunk_size: int | None = None,
) -> Tensor:
    """Equals `sparse_kl(hidden @ weight.T + bias, targets, …)`, mean over counted positions, without the logits.

    Args:
        hidden: [N, D] or [B, T, D]. weight: [V, D]. bias: [V] or None. The rest as in `sparse_kl`.
    """
    count = max(1, int(targets.counted.sum()))
    output = fused_head(
        hidden,
        weight,
        bias,
        targets,
        temperature=temperature,
        kd_weight=kd_weight,
        tail=tail,
        divergence=divergence,
        position_weighting=position_weighting,
        scale=1.0 / count,
        chunk_size=chunk_size,
    )
    return output.loss


def fused_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Targets,
    *,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    tail: TailPolicy = "bucket",
    divergence: str | Mixture = FORWARD_KL,
    position_weighting: PositionWeighting = "uniform",
    kl_tail: TailPolicy | None = None,
    scale: float | Tensor = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> HeadOutput:
    """The sums of the distillation loss for a linear head; see the module docstring for how.

    Args:
        hidden: [N, D] or [B, T, D] states that the head is applied to.
        weight: [≥V, D]; rows from `vocab_size` on are padding and take no part.
        targets: N positions; those that do not count cost nothing. Of `FullTargets` every token is an entry, and `tail`
            means nothing.
        temperature, kd_weight, tail, divergence, position_weighting: as in `sparse_kl`.
        kl_tail: the policy that `kl` is measured by, "sampled" or "bucket"; default: `tail`. Costs K more logits a
            position if it is another: they come from the same walk over the vocabulary.
        scale: multiplies `loss`, typically one over the counted positions of the whole optimizer step. Given here
            rather than multiplied afterwards, the backward pass has nothing left to do.
        chunk_size: positions at a time, by default as suits the targets; the result does not depend on it beyond
            rounding.
    """
    objective = Objective.checked(temperature, kd_weight, tail, divergence, position_weighting, kl_tail)
    vocab_size = vocab_size or weight.shape[0]
    hidden = hidden.reshape(-1, hidden.shape[-1])
    targets, chunk_size = _prepared(targets, objective, chunk_size)
    kept = targets.counted.nonzero().squeeze(1)
    if len(kept) < len(targets):
        hidden, targets = hidden[kept], targets[kept]
    needs_grad = torch.is_grad_enabled()
    device_type = hidden.device.type
    matmul_dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
    sums = _FusedHead.apply(
        hidden,
        weight,
        bias,
        targets,
        objective,
        scale,
        vocab_size,
        chunk_size,
        matmul_dtype,
        needs_grad,
    )
    return HeadOutput(*sums)


def _prepared(targets: Targets, objective: Objective, chunk_size: int | None) -> tuple[Targets, int]:
    """Targets with the entries that the loss, or what is measured, looks at, and how many positions at a time."""
    if isinstance(targets, FullTargets):
        return targets, chunk_size or full.CHUNK_POSITIONS
    of_loss = entries_of(targets, objective.tail, objective.temperature)  # refuses what cannot be tempered
    return targets if objective.kl_tail == "sampled" else of_loss, chunk_size or CHUNK_POSITIONS


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Targets,
        objective: Objective,
        scale: float | Tensor,
        vocab_size: int,
        chunk_size: int,
        matmul_dtype: torch.dtype,
        needs_grad: bool,
    ) -> tuple[Tensor, ...]:
        want_hidden, want_weight, want_bias = (needs_grad and need for need in ctx.needs_input_grad[:3])
        want_any = want_hidden or want_weight or want_bias
        accumulate = torch.promote_types(weight.dtype, torch.float32)  # softmax, sums and dWeight, whatever the input
        head = weight[:vocab_size].to(matmul_dtype)
        head_bias = None if bias is None else bias[:vocab_size].to(accumulate)
        targets = targets.to(device=hidden.device, dtype=accumulate)

        d_hidden = torch.zeros_like(hidden) if want_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=accumulate, device=weight.device) if want_weight else None
        d_bias = torch.zeros(bias.shape, dtype=accumulate, device=weight.device) if want_bias else None  # type: ignore[union-attr]
        sums = torch.zeros(5, dtype=accumulate, device=hidden.device)

        # One buffer for all chunks: on a CPU, fresh memory of this size costs more in page faults than its arithmetic.
        buffer = torch.empty((min(chunk_size, len(hidden)), vocab_size), dtype=matmul_dtype, device=hidden.device)
        for start in range(0, len(hidden), chunk_size):
            here = slice(start, start + chunk_size)
            states = hidden[here].to(matmul_dtype)  # [n, D]
            logits = torch.mm(states, head.T, out=buffer[: len(states)]).to(accumulate)  # [n, V]
            if head_bias is not None:
                logits += head_bias
            terms, d_logits = _loss_and_dlogits(logits, targets[here], objective, scale if want_any else None)
            sums += terms
            if d_logits is None:
                continue
            if d_bias is not None:
                d_bias[:vocab_size] += d_logits.sum(dim=0)
            d_logits = d_logits.to(matmul_dtype)
            if d_hidden is not None:
                d_hidden[here] = d_logits @ head
            if d_weight is not None:
                if matmul_dtype == accumulate:
                    d_weight[:vocab_size].addmm_(d_logits.T, states)
                else:
                    d_weight[:vocab_size] += d_logits.T @ states

        ctx.save_for_backward(
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),  # type: ignore[union-attr]
        )
        loss, *rest = sums.unbind()
        ctx.mark_non_differentiable(*rest)
        return loss * scale, *rest

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients = ctx.saved_tensors
        if grad_loss != 1.0:  # usually it is 1, and a [V, D] product is saved
            gradients = [None if g is None else g * grad_loss.to(g.dtype) for g in gradients]
        return (*gradients, *[None] * 7)


def _loss_and_dlogits(
    logits: Tensor,
    targets: Targets,
    objective: Objective,
    scale: float | Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Sums [loss, kl, ce, agreement, count] of one chunk, and d(scale·loss)/dlogits [n, V] in the logits' place.

    All positions count. `scale` None: no gradient. Everything vocabulary-wide is here and in `_exp_rest`, and of whole
    distributions in `full`.
    """
    if isinstance(targets, FullTargets):
        return full.full_loss_and_dlogits(logits, targets, objective, scale)
    temperature, kd_weight, tail, mixture, weighting, kl_tail = objective
    want_grad = scale is not None
    label = targets.labels[:, None]  # [n, 1]
    everything = targets
    # Where an entry is padding, look at the label instead: a token that is taken out of the rest anyway.
    taken = looked_at = torch.cat([torch.where(targets.valid, targets.ids, label), label], dim=1)  # [n, K+1]
    if kl_tail == "sampled" != tail:  # to the loss, sampled entries are part of the rest
        targets = entries_of(targets, tail, temperature)
        taken = torch.cat([torch.where(targets.valid, targets.ids, label), label], dim=1)
    is_label = (targets.ids == label) & targets.valid  # [n, K]
    label_is_entry = is_label.any(dim=1)
    z = logits.gather(1, looked_at)  # [n, K+1]
    entries = z[:, :-1].masked_fill(~targets.valid, ABSENT).requires_grad_(want_grad)
    label_alone = z[:, -1].masked_fill(label_is_entry, ABSENT).requires_grad_(want_grad)
    largest = logits.amax(dim=1)

    # The rest at T = 1 for the label, at T for the divergence; `logits` is overwritten by the last of them.
    others, total, rest = _exp_rest(logits if temperature == 1.0 else logits.clone(), largest, taken)
    if weighting == "student-entropy":
        own = entropy_of_parts(others, (torch.cat([entries, label_alone[:, None]], dim=1) - largest[:, None]).exp())
    others_t, total_t, rest_t = others, total, rest
    if temperature != 1.0:
        others_t, total_t, rest_t = _exp_rest(logits.div_(temperature), largest / temperature, taken)
    leaves = [entries, label_alone, rest.requires_grad_(want_grad), rest_t.requires_grad_(want_grad)]

    with torch.set_grad_enabled(want_grad):
        at_1 = StudentValues(entries, label_alone, rest)
        at_t = at_1
        if temperature != 1.0:
            at_t = StudentValues(entries / temperature, label_alone / temperature, rest_t)
        measured = None
        if kl_tail == "sampled" != tail:  # at the temperature of the sample, which is 1 if it is not this one
            at_its = at_t if temperature == everything.temperature else at_1
            measured = sampled_forward_kl(everything, z[:, :-1] / everything.temperature, at_its.lse.detach())
        elif kl_tail != tail:
            with torch.no_grad():
                measured = soft_loss(targets, at_t, kl_tail, temperature, logits.shape[1])
        kl, soft = soft_losses(
            targets, at_t, tail, temperature, logits.shape[1], mixture, measured
        )  # [n], usually same
        z_label = torch.where(label_is_entry, torch.where(is_label, entries, 0.0).sum(dim=1), label_alone)
        ce = at_1.lse - z_label  # [n]
        loss = (1.0 - kd_weight) * ce + kd_weight * temperature**2 * soft
        if weighting != "uniform":
            loss = loss * position_weight(targets.entropy if weighting == "teacher-entropy" else own, logits.shape[1])
        total_loss = loss.sum() * scale if want_grad else None

    # The weights of a sample say nothing about which token is likeliest; they are all there is where no entry is exact.
    some_exact = everything.exact_counts > 0
    known = torch.where(some_exact[:, None], everything.exact.logprobs, everything.logprobs)
    likeliest = known >= known.amax(dim=1, keepdim=True)
    agrees = (likeliest & (known > -torch.inf) & (z[:, :-1] >= largest[:, None])).any(dim=1)
    count = torch.full((), len(loss), dtype=loss.dtype, device=loss.device)
    terms = torch.stack([loss.sum(), kl.sum(), ce.sum(), agrees.sum(dtype=loss.dtype), count]).detach()
    if not want_grad:
        return terms, None

    d_entries, d_label, d_rest, d_rest_t = torch.autograd.grad(
        total_loss, leaves, allow_unused=True, materialize_grads=True
    )
    d_logits = others.mul_((d_rest / total)[:, None])
    if temperature != 1.0:
        d_logits.addcmul_(others_t, (d_rest_t / (temperature * total_t))[:, None])
    # `taken` may name the label several times; all but one of those carry zero, so adding is exact.
    d_entries = d_entries.masked_fill(~targets.valid, 0.0)
    d_label = d_label.masked_fill(label_is_entry, 0.0)
    return terms, d_logits.scatter_add_(1, taken, torch.cat([d_entries, d_label[:, None]], dim=1))


def _exp_rest(logits: Tensor, largest: Tensor, taken: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(z − largest) with zeros at `taken`, in the place of the logits [n, V]; its sum [n]; r = log Σ exp(z) [n]."""
    others = logits.sub_(largest[:, None]).exp_().scatter_(1, taken, 0.0)
    total = others.sum(dim=1).clamp_(min=math.exp(-UNDERFLOW_NATS))
    return others, total, total.log() + largest


def general_head(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Targets,
    *,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    tail: TailPolicy = "bucket",
    divergence: str | Mixture = FORWARD_KL,
    position_weighting: PositionWeighting = "uniform",
    kl_tail: TailPolicy | None = None,
    scale: float | Tensor = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> HeadOutput:
    """`fused_head` for a head that is not linear (soft-capping, scaling, a transform): any [n, D] → [n, V] module.

    The head's logits and their gradient are recomputed chunk by chunk in the backward pass (activation
    checkpointing), so here too nothing larger than chunk·V is kept. Costs one more matrix product than `fused_head`.
    """
    objective = Objective.checked(temperature, kd_weight, tail, divergence, position_weighting, kl_tail)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    targets, chunk_size = _prepared(targets, objective, chunk_size)
    kept = targets.counted.nonzero().squeeze(1)
    hidden, targets = hidden[kept], targets[kept]

    def chunk_terms(states: Tensor, chunk: Targets) -> tuple[Tensor, Tensor]:
        logits = head(states)[:, :vocab_size]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return _LossOfLogits.apply(logits, chunk.to(dtype=logits.dtype), objective, torch.is_grad_enabled())

    losses, sums = [], []
    # Once at least, though nothing counts: data-parallel training waits for a gradient of every parameter of the head.
    for start in range(0, max(1, len(hidden)), chunk_size):
        here = slice(start, start + chunk_size)
        loss, terms = checkpoint(chunk_terms, hidden[here], targets[here], use_reentrant=False)
        losses.append(loss)
        sums.append(terms)
    total = torch.stack(sums).sum(dim=0)
    return HeadOutput(torch.stack(losses).sum() * scale, *total[1:].unbind())


class _LossOfLogits(torch.autograd.Function):
    """Sum of the loss over one chunk of logits [n, V]; the gradient is computed with it."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Targets, objective: Objective, needs_grad: bool):  # type: ignore[override]
        terms, d_logits = _loss_and_dlogits(logits.clone(), targets, objective, 1.0 if needs_grad else None)
        ctx.save_for_backward(d_logits)
        ctx.mark_non_differentiable(terms)
        return terms[0].clone(), terms

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _: Tensor):  # type: ignore[override]
        (d_logits,) = ctx.saved_tensors
        return d_logits * grad_loss, None, None, None
