"""Universal logit distillation: sorted probabilities against sorted probabilities, for vocabularies that differ.

    D = Σ_i |p₍ᵢ₎ − q₍ᵢ₎|        p₍₁₎ ≥ p₍₂₎ ≥ …, the shorter vector padded with zeros

(Boizard et al., 2024, https://arxiv.org/abs/2402.12030.) It compares how certain both models are, and between how many
tokens, not which tokens; so no token needs a counterpart in the other vocabulary. K probabilities of the teacher and
its tail mass m are known, so the tail of both sides is one term, |m − Σ_{i>K} q₍ᵢ₎|: a lower bound of D, and D itself
with K = V.

Cost on top of a sparse loss: a softmax and its backward pass over the V logits of a chunk, and the selection of the K
largest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.losses.divergence_sum import FORWARD_KL, DivergenceSum, soft_losses
from pipeline.losses.entries import PositionTensors, TargetEntries
from pipeline.losses.reference import student_values
from pipeline.losses.sparse_targets import SparseTargetBatch, agreement
from pipeline.losses.spec import DistillLoss
from pipeline.losses.tails import entries_of


@dataclass(frozen=True, kw_only=True)
class SortedTargets(PositionTensors):
    """A teacher's probabilities at N positions of a student with another tokenizer, whichever tokens they are of.

    Attributes:
        logprobs: [N, K] float, descending; -inf where there are fewer.
        residual_logprob: [N] float, log of the tail mass.
        aligned: [N] bool, false where no position of the teacher ends at the same place in the text: D is 0.
        entries: labels, and the entries that have a counterpart in the student's vocabulary, for the reported KL.
    """

    CHUNK_POSITIONS: ClassVar[int] = SparseTargetBatch.CHUNK_POSITIONS
    GPU_CHUNK_POSITIONS: ClassVar[int] = 1024

    PER_POSITION: ClassVar = ("logprobs", "residual_logprob", "aligned", "entries")
    COMPUTED_WITH: ClassVar = ("logprobs", "residual_logprob", "entries")

    logprobs: Tensor
    residual_logprob: Tensor
    aligned: Tensor
    entries: TargetEntries

    @property
    def labels(self) -> Tensor:
        """[N] int64, `IGNORE_INDEX` outside the loss mask."""
        return self.entries.labels

    def with_labels(self, labels: Tensor) -> SortedTargets:
        return replace(self, entries=self.entries.with_labels(labels), loss_tokens=None)

    def prepare(self, loss: DistillLoss) -> SortedTargets:
        """Without sampled entries. Raises: ValueError for entries captured at a temperature other than 1."""
        return replace(self, entries=entries_of(self.entries, "bucket", 1.0))

    def loss_and_dlogits(
        self, logits: Tensor, loss: DistillLoss, scale: float | Tensor | None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Targets`: (1 − kd_weight)·CE + kd_weight·D, and the KL of `entries` under `bucket`, which compares runs.

        The other fields of the loss are not read. Every position must be a loss token.
        """
        entries = self.entries
        z = logits.detach().requires_grad_(scale is not None)
        with torch.set_grad_enabled(scale is not None), torch.autocast(logits.device.type, enabled=False):
            ce = torch.nn.functional.cross_entropy(z, entries.labels, reduction="none")
            total = ((1.0 - loss.kd_weight) * ce + loss.kd_weight * uld(z, self)).sum()
            scaled = total if scale is None else total * scale
        with torch.no_grad():
            student = student_values(logits, entries)
            kl, _ = soft_losses(entries, student, "bucket", 1.0, logits.shape[1], DivergenceSum.parse(FORWARD_KL))
            agrees = agreement(entries, entries.ids == logits.argmax(dim=1, keepdim=True))
        count = torch.full((), len(ce), dtype=ce.dtype, device=ce.device)
        sums = torch.stack([total, kl.sum(), ce.sum(), agrees.sum(dtype=ce.dtype), count]).detach()
        if scale is None:
            return sums, None
        (d_logits,) = torch.autograd.grad(scaled, z)
        return sums, d_logits.to(dtype or d_logits.dtype)


def uld(student_logits: Tensor, targets: SortedTargets) -> Tensor:
    """[N] D of logits [N, V], in fp32 or their own wider dtype."""
    logits = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    given = (targets.logprobs > -torch.inf)[:, : logits.shape[1]]  # [N, K]
    p = targets.logprobs.to(logits.dtype).exp()
    surplus = p[:, logits.shape[1] :].sum(dim=1)  # more entries than the student has tokens: compared with zeros
    p = p[:, : logits.shape[1]]
    q = logits.softmax(dim=1).topk(p.shape[1], dim=1).values  # [N, K], descending; its gradient reaches those tokens
    q = torch.where(given, q, 0.0)
    rest = targets.residual_logprob.to(logits.dtype).exp() - (1.0 - q.sum(dim=1))
    # Where every token of the student has been compared, `rest` is the teacher's alone.
    distance = (p - q).abs().sum(dim=1) + surplus + rest.abs()
    return torch.where(targets.aligned, distance, 0.0)
