"""The loss against the teacher's whole distribution, which the teacher's head makes of its states as it is needed.

    p = softmax(head(h_t) / T)        q = softmax(z / T)        L = w·[(1 − α)·CE(label) + α·T²·D(p ‖ q)]

The same divergences as on entries, their K+1 numbers being all V: no tail, no policy, no estimate, any temperature.
A chunk of positions at a time, forward and backward, so that what is V wide is some dozen tensors of chunk·V, whatever
N is. What they cost beside a sparse loss is the teacher's product, a third more than the student's three, and their
passes over memory.

Shapes: N positions, n of a chunk, m stored states, D the teacher's width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.losses.divergence_sum import full_soft_losses
from pipeline.losses.sparse_targets import IGNORE_INDEX
from pipeline.losses.weighting import position_weight

if TYPE_CHECKING:
    from pipeline.losses.fused import Objective

CHUNK_POSITIONS = 128
"""Positions per chunk: as many tensors of that times V as autograd keeps are 300 MB at V = 49,152."""


@dataclass(frozen=True, kw_only=True)
class FullTargets:
    """Targets of N positions, as states of the teacher.

    Attributes:
        states: [m, D], as they are stored: float, or int8 with `scales`.
        scales: [m] float32, or None.
        place: [N] int64, which of the states is a position's; any where it does not count.
        labels: [N] int64, `IGNORE_INDEX` where the position does not count.
        entropy: [N] float, nats, of the teacher's distribution.
        head: [n, D] → [n, V] logits of the teacher, in the dtype of what it is given.
    """

    states: Tensor
    scales: Tensor | None
    place: Tensor
    labels: Tensor
    entropy: Tensor
    head: Callable[[Tensor], Tensor]

    @property
    def counted(self) -> Tensor:
        """[N] bool: which positions count."""
        return self.labels != IGNORE_INDEX

    def logits(self, dtype: torch.dtype) -> Tensor:
        """[N, V] of the teacher."""
        states = self.states[self.place].to(dtype)
        return self.head(states if self.scales is None else states * self.scales[self.place].to(dtype)[:, None])

    def __len__(self) -> int:
        return self.labels.shape[0]

    def __getitem__(self, index: slice | Tensor) -> FullTargets:
        parts = {name: getattr(self, name)[index] for name in ("place", "labels", "entropy")}
        return replace(self, **parts)

    def to(self, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> FullTargets:
        """On a device; of `dtype` the entropy, and the teacher's logits when they are made."""
        moved = {name: getattr(self, name).to(device) for name in ("states", "place", "labels")}
        scales = None if self.scales is None else self.scales.to(device)
        return replace(self, **moved, scales=scales, entropy=self.entropy.to(device=device, dtype=dtype))


def full_loss_and_dlogits(
    logits: Tensor, targets: FullTargets, objective: Objective, scale: float | Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Sums [loss, kl, ce, agreement, count] of one chunk of logits [n, V], and d(scale·loss)/dlogits [n, V].

    All positions count. `scale` None: no gradient.
    """
    temperature, kd_weight, _, mixture, weighting, _ = objective
    want_grad = scale is not None
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        teacher = targets.logits(logits.dtype)
        likeliest = logits.gather(1, teacher.argmax(dim=1, keepdim=True)).squeeze(1)
        agrees = likeliest >= logits.amax(dim=1)
        log_p = (teacher if temperature == 1.0 else teacher.div_(temperature)).log_softmax(dim=1)
        del teacher
    z = logits.detach().requires_grad_(want_grad)
    with torch.set_grad_enabled(want_grad), torch.autocast(logits.device.type, enabled=False):
        log_q = z.log_softmax(dim=1)
        z_t, log_q_t = z, log_q
        if temperature != 1.0:
            z_t = z / temperature
            log_q_t = z_t.log_softmax(dim=1)
        kl, soft = full_soft_losses(log_p, log_q_t, z_t, temperature, mixture)
        ce = -log_q.gather(1, targets.labels[:, None]).squeeze(1)
        loss = (1.0 - kd_weight) * ce + kd_weight * temperature**2 * soft
        if weighting == "teacher-entropy":
            loss = loss * position_weight(targets.entropy, logits.shape[1])
        elif weighting == "student-entropy":
            own = log_q.detach()
            loss = loss * position_weight(-(own.exp() * own).sum(dim=1), logits.shape[1])
        total = loss.sum()
        scaled = total if scale is None else total * scale
    count = torch.full((), len(loss), dtype=loss.dtype, device=loss.device)
    terms = torch.stack([total, kl.sum(), ce.sum(), agrees.sum(dtype=loss.dtype), count]).detach()
    if scale is None:
        return terms, None
    (d_logits,) = torch.autograd.grad(scaled, z)
    return terms, d_logits
