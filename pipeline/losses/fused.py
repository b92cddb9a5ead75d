"""Vocabulary head, softmax, divergence and both gradients in one walk over chunks of positions.

The plain way to a loss holds logits, their log-softmax and their gradient: three tensors of N·V floats. Here nothing
larger than chunk·V ever exists. Each chunk's logits go to `Targets.loss_and_dlogits`, which returns the sums and the
gradient; from dlogits come dHidden = dlogits·W and dWeight += dlogitsᵀ·h. The backward pass only scales them.

Cost per position, forward and backward: 6·D·V FLOPs in three matrix products, as in plain cross-entropy. Nothing in it
waits for a GPU if the targets know their `loss_tokens`.
Sources: Liger Kernel's fused linear cross-entropy (https://arxiv.org/abs/2410.10989) and Cut Cross-Entropy
(https://arxiv.org/abs/2411.09009) compute the gradient of head and loss in chunks.

Shapes: N positions, n positions of one chunk, D hidden width, V vocabulary, K entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cache_format import SparseTargets
from pipeline.losses.divergence_sum import FORWARD_KL, DivergenceSum
from pipeline.losses.sparse_targets import batch_of
from pipeline.losses.spec import DistillLoss
from pipeline.losses.tails import TailPolicy
from pipeline.losses.targets import Targets
from pipeline.losses.weighting import PositionWeighting
from pipeline.models.devices.buffers import empty_rows
from pipeline.models.devices.products import add_product, product

GENERAL_GPU_CHUNK_POSITIONS = 1024
"""For heads that are not linear, whose own code keeps several tensors of chunk·V."""


class HeadOutput(NamedTuple):
    """Sums over loss tokens, all float32 scalars (float64 for float64 input). Only `loss` carries a gradient.

    loss:      w·[(1 − α)·CE + α·T²·D], times `scale`; D is the KL unless another divergence is trained.
    kl:        KL(teacher‖student) under `kl_tail`, nats, whatever D and its tail policy are: it compares runs. At T; a
               sample cannot be tempered, so its KL is at the temperature of the targets.
    ce:        cross-entropy with the label, nats.
    agreement: positions where the student's most likely token is the teacher's; 1/m each where it is one of m that the
               teacher's rounded targets have as equally likely. With a gradient, any of several equal logits counts.
    count:     loss tokens.
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
    targets: Targets | SparseTargets,
    *,
    labels: Tensor | np.ndarray | None = None,
    loss_mask: Tensor | np.ndarray | None = None,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    tail: TailPolicy = "bucket",
    divergence: str | DivergenceSum = FORWARD_KL,
    position_weighting: PositionWeighting = "uniform",
    capture_temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Equals `sparse_kl(hidden @ weight.T + bias, targets, …)`, the mean over loss tokens, without the logits.

    Args:
        hidden: [N, D] or [B, T, D]. weight: [≥V, D]. bias: [≥V] or None.
        targets: a `SparseTargetBatch`; one row's `SparseTargets` straight from a cache; or `FullTargets`, whose loss is
            on the full distribution.
        vocab_size: V, that of the teacher. Default: the rows of `weight`; further ones are padding and are ignored.
        chunk_size: positions at a time; the result depends on it only by rounding.
        Others: as in `sparse_kl`.

    Raises: ValueError as `sparse_kl`.
    """
    loss = DistillLoss(
        kd_weight=kd_weight,
        temperature=temperature,
        tail=tail,
        divergence=divergence,  # type: ignore[arg-type]
        position_weighting=position_weighting,
    )
    targets = batch_of(targets, labels, loss_mask, capture_temperature).to(hidden.device)
    scale = 1.0 / max(1, int(targets.loss_mask.sum()))
    sums = fused_head(hidden, weight, bias, targets, loss, scale=scale, vocab_size=vocab_size, chunk_size=chunk_size)
    return sums.loss


def fused_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Targets,
    loss: DistillLoss,
    *,
    scale: float | Tensor = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> HeadOutput:
    """The sums of a loss for a linear head; see the module docstring for how.

    Args:
        hidden: [N, D] or [B, T, D] states that the head is applied to.
        weight: [≥V, D]; rows from `vocab_size` on are padding and are ignored.
        targets: N positions; those outside the loss mask cost nothing.
        scale: multiplies `loss`, typically one over the loss tokens of the whole optimizer step. If it is given here
            and not multiplied afterwards, the backward pass has nothing left to do.
        chunk_size: positions at a time; the result depends on it only by rounding.

    Raises: ValueError if there is not one state for each position, or as `Targets.prepare`.
    """
    vocab_size = vocab_size or weight.shape[0]
    hidden, targets = _loss_tokens(hidden, targets, loss)
    device_type = hidden.device.type
    matmul_dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
    sums = _FusedHead.apply(
        hidden,
        weight,
        bias,
        targets,
        loss,
        scale,
        vocab_size,
        chunk_size or chunk_positions(targets, hidden.device, vocab_size),
        matmul_dtype,
        torch.is_grad_enabled(),
    )
    return HeadOutput(*sums)


def general_head(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Targets,
    loss: DistillLoss,
    *,
    scale: float | Tensor = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> HeadOutput:
    """`fused_head` for a head that is not linear (soft-capping, scaling, a transform): any [n, D] → [n, V] module.

    The head's logits and their gradient are recomputed chunk by chunk in the backward pass (activation
    checkpointing), so here too nothing larger than chunk·V is kept. Costs one more matrix product than `fused_head`.
    """
    hidden, targets = _loss_tokens(hidden, targets, loss)
    chunk_size = chunk_size or min(GENERAL_GPU_CHUNK_POSITIONS, chunk_positions(targets, hidden.device))

    def chunk_sums(states: Tensor, chunk: Targets) -> tuple[Tensor, Tensor]:
        logits = head(states)[:, :vocab_size]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return _LossOfLogits.apply(logits, chunk.to(dtype=logits.dtype), loss, torch.is_grad_enabled())

    losses, sums = [], []
    # At least one chunk, even an empty one: data-parallel training waits for a gradient of every parameter of the head.
    for here in _chunks(max(1, len(hidden)), chunk_size):
        chunk_loss, chunk_terms = checkpoint(chunk_sums, hidden[here], targets[here], use_reentrant=False)
        losses.append(chunk_loss)
        sums.append(chunk_terms)
    total = torch.stack(sums).sum(dim=0)
    return HeadOutput(torch.stack(losses).sum() * scale, *total[1:].unbind())


def chunk_positions(targets: Targets, device: torch.device, vocab_size: int = 2**17) -> int:
    """Number of positions in a chunk. On a GPU about 1 GiB of float32 logits, but at least 2,048 positions, so that the
    passes over the head's gradient, one per chunk, stay few."""
    if device.type == "cpu":
        return targets.CHUNK_POSITIONS
    return min(targets.GPU_CHUNK_POSITIONS, max(2048, 2**28 // vocab_size))


def _loss_tokens(hidden: Tensor, targets: Targets, loss: DistillLoss) -> tuple[Tensor, Targets]:
    """States [n, D] and targets of the loss tokens alone. Raises: ValueError as `fused_head`."""
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if len(hidden) != len(targets):
        raise ValueError(f"found {len(hidden)} hidden states for {len(targets)} positions of targets, one state each.")
    kept = targets.loss_tokens
    if kept is None:
        kept = targets.loss_mask.nonzero().squeeze(1)
    if len(kept) < len(targets):
        # Unlike that of hidden[kept], the gradient of index_select needs no sorting.
        hidden, targets = hidden.index_select(0, kept), targets[kept]
    return hidden, targets.prepare(loss)


def _chunks(positions: int, chunk_size: int) -> Iterator[slice]:
    for start in range(0, positions, chunk_size):
        yield slice(start, start + chunk_size)


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Targets,
        loss: DistillLoss,
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
        targets = targets.to(hidden.device, accumulate)

        d_hidden = torch.zeros_like(hidden) if want_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=accumulate, device=weight.device) if want_weight else None
        d_bias = torch.zeros(bias.shape, dtype=accumulate, device=weight.device) if want_bias else None  # type: ignore[union-attr]
        sums = torch.zeros(len(HeadOutput._fields), dtype=accumulate, device=hidden.device)
        d_dtype = matmul_dtype if d_bias is None else accumulate  # a bias sums its gradient before it is rounded

        # One buffer for all chunks: on a CPU, fresh memory of this size costs more in page faults than its arithmetic.
        buffer = empty_rows(min(chunk_size, len(hidden)), vocab_size, accumulate, hidden.device)
        for here in _chunks(len(hidden), chunk_size):
            states = hidden[here].to(matmul_dtype)  # [n, D]
            logits = product(states, head.T, buffer[: len(states)])  # [n, V]
            if head_bias is not None:
                logits += head_bias
            chunk_sums, d_logits = targets[here].loss_and_dlogits(logits, loss, scale if want_any else None, d_dtype)
            sums += chunk_sums
            if d_logits is None:
                continue
            if d_bias is not None:
                d_bias[:vocab_size] += d_logits.sum(dim=0)
            d_logits = d_logits.to(matmul_dtype)
            if d_hidden is not None:
                d_hidden[here] = d_logits @ head
            if d_weight is not None:
                add_product(d_weight[:vocab_size], d_logits.T, states)

        ctx.save_for_backward(
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),  # type: ignore[union-attr]
        )
        total, *rest = sums.unbind()
        ctx.mark_non_differentiable(*rest)
        return total * scale, *rest

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients = ctx.saved_tensors
        # Usually it is 1, and a [V, D] product is saved. On a GPU asking for it would wait for the whole forward pass,
        # longer than the product takes.
        if grad_loss.device.type != "cpu" or grad_loss != 1.0:
            gradients = [None if g is None else g * grad_loss.to(g.dtype) for g in gradients]
        return (*gradients, *[None] * 7)


class _LossOfLogits(torch.autograd.Function):
    """Sum of the loss over one chunk of logits [n, V]; the gradient is computed with it."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Targets, loss: DistillLoss, needs_grad: bool):  # type: ignore[override]
        sums, d_logits = targets.loss_and_dlogits(logits.clone(), loss, 1.0 if needs_grad else None)
        ctx.save_for_backward(d_logits)
        ctx.mark_non_differentiable(sums)
        return sums[0].clone(), sums

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _: Tensor):  # type: ignore[override]
        (d_logits,) = ctx.saved_tensors
        return d_logits * grad_loss, None, None, None
