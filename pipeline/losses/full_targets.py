"""The loss against the teacher's full distribution, which the teacher's head computes from stored states.

    p = softmax(head(h_t) / T)        q = softmax(z / T)        L = w·[(1 − α)·CE(label) + α·T²·D(p ‖ q)]

The same divergences as on entries, with all V tokens as entries: no tail, no tail policy, no estimate, any temperature.
One chunk of positions at a time, forward and backward, so V-wide memory is about a dozen tensors of chunk·V for any N.
Cost on top of a sparse loss: the teacher's matrix product, a third of the student's three, and the passes over memory.

Shapes: N positions, n of a chunk, m stored states, D the teacher's width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.special import entr

from pipeline.losses.divergence_sum import full_soft_losses
from pipeline.losses.entries import PositionTensors
from pipeline.losses.spec import DistillLoss
from pipeline.losses.weighting import position_weight


@dataclass(frozen=True, kw_only=True)
class FullTargets(PositionTensors):
    """Targets of N positions, as states of the teacher.

    Attributes:
        states: [m, D], as stored: float, or int8 with `scales`.
        scales: [m] float32, or None.
        place: [N] int64, row of `states` for each position; any value outside the loss mask.
        labels: [N] int64, `IGNORE_INDEX` outside the loss mask.
        entropy: [N] float, nats, of the teacher's distribution.
        head: [n, D] → [n, V] logits of the teacher, in the dtype of its argument. Default: that of the loss.
        layer: number under which a cache stores the states.
    """

    CHUNK_POSITIONS: ClassVar[int] = 128
    """The tensors of that many rows that autograd keeps take 300 MB at V = 49,152."""
    GPU_CHUNK_POSITIONS: ClassVar[int] = 1024
    """Fewer would not fill a GPU; these take 2.4 GB at V = 49,152."""

    PER_POSITION: ClassVar = ("place", "labels", "entropy")
    COMPUTED_WITH: ClassVar = ("entropy",)  # states stay as narrow as they are stored

    states: Tensor
    scales: Tensor | None
    place: Tensor
    labels: Tensor
    entropy: Tensor
    head: Callable[[Tensor], Tensor] | None = None
    layer: int = -1

    def logits(self, dtype: torch.dtype) -> Tensor:
        """[N, V] of the teacher."""
        assert self.head is not None, "call prepare() first, which attaches the head to the targets of a batch"
        states = self.states[self.place].to(dtype)
        return self.head(states if self.scales is None else states * self.scales[self.place].to(dtype)[:, None])

    def prepare(self, loss: DistillLoss) -> FullTargets:
        """With the teacher's head: batches come from data loader workers, which do not hold it."""
        return self if self.head is not None else replace(self, head=loss.teacher_head)

    def loss_and_dlogits(
        self, logits: Tensor, loss: DistillLoss, scale: float | Tensor | None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Targets`. Every position must be a loss token."""
        temperature, vocab_size = loss.temperature, logits.shape[1]
        want_grad = scale is not None
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
            teacher = self.logits(logits.dtype)
            agrees = logits.argmax(dim=1) == teacher.argmax(dim=1)
            log_p = (teacher if temperature == 1.0 else teacher.div_(temperature)).log_softmax(dim=1)
            del teacher
        z = logits.detach().requires_grad_(want_grad)
        with torch.set_grad_enabled(want_grad), torch.autocast(logits.device.type, enabled=False):
            log_q = z.log_softmax(dim=1)
            z_t, log_q_t = z, log_q
            if temperature != 1.0:
                z_t = z / temperature
                log_q_t = z_t.log_softmax(dim=1)
            kl, soft = full_soft_losses(log_p, log_q_t, z_t, temperature, loss.divergence)
            ce = -log_q.gather(1, self.labels[:, None]).squeeze(1)
            losses = loss.weighted(ce, soft)
            if loss.position_weighting == "teacher-entropy":
                losses = losses * position_weight(self.entropy, vocab_size)
            elif loss.position_weighting == "student-entropy":
                losses = losses * position_weight(entr(log_q.detach().exp()).sum(dim=1), vocab_size)
            total = losses.sum()
            scaled = total if scale is None else total * scale
        count = torch.full((), len(losses), dtype=losses.dtype, device=losses.device)
        sums = torch.stack([total, kl.sum(), ce.sum(), agrees.sum(dtype=losses.dtype), count]).detach()
        if scale is None:
            return sums, None
        (d_logits,) = torch.autograd.grad(scaled, z)
        return sums, d_logits.to(dtype or d_logits.dtype)
