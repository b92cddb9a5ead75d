"""Universal logit distillation: sorted probabilities against sorted probabilities, for vocabularies that differ.

    D = Σ_i |p₍ᵢ₎ − q₍ᵢ₎|        p₍₁₎ ≥ p₍₂₎ ≥ …, the shorter vector filled up with zeros

(Boizard et al., 2024, https://arxiv.org/abs/2402.12030.) It asks how sure the teacher is, and of how many tokens, never
which: no token of one vocabulary has to have a like in the other. Of the teacher K probabilities and the mass m of the
rest are known, so the rest of both sides is one term, |m − Σ_{i>K} q₍ᵢ₎|: a lower bound of D, and D itself with K = V.

Needs the K largest of the student's V probabilities, so logits are built, a chunk of positions at a time, and again in
the backward pass: memory chunk·V, no fused twin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.losses.divergence_sum import FORWARD_KL, Mixture, soft_losses
from pipeline.losses.fused import CHUNK_POSITIONS, HeadOutput
from pipeline.losses.reference import student_values
from pipeline.losses.sparse_targets import TargetBatch
from pipeline.losses.tails import entries_of


@dataclass(frozen=True)
class SortedTargets:
    """A teacher's probabilities at N positions, whichever tokens they are of.

    Attributes:
        logprobs: [N, K] float, descending; -inf where there are fewer.
        residual_logprob: [N] float, log of the mass outside of them.
        aligned: [N] bool, false where there is no teacher: D is 0.
    """

    logprobs: Tensor
    residual_logprob: Tensor
    aligned: Tensor

    def __getitem__(self, index: slice | Tensor) -> SortedTargets:
        return SortedTargets(self.logprobs[index], self.residual_logprob[index], self.aligned[index])


def uld(student_logits: Tensor, targets: SortedTargets) -> Tensor:
    """[N] D of logits [N, V], in fp32 or their own wider dtype."""
    logits = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    given = (targets.logprobs > -torch.inf)[:, : logits.shape[1]]  # [N, K]
    p = targets.logprobs.to(logits.dtype).exp()
    surplus = p[:, logits.shape[1] :].sum(dim=1)  # more entries than the student has tokens: against zeros
    p = p[:, : logits.shape[1]]
    q = logits.softmax(dim=1).topk(p.shape[1], dim=1).values  # [N, K], descending; the gradient goes to where they are
    q = torch.where(given, q, 0.0)
    rest = targets.residual_logprob.to(logits.dtype).exp() - (1.0 - q.sum(dim=1))
    # Where every token of the student has been compared, rest is the teacher's alone.
    distance = (p - q).abs().sum(dim=1) + surplus + rest.abs()
    return torch.where(targets.aligned, distance, 0.0)


def uld_head(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: TargetBatch,
    sorted_targets: SortedTargets,
    *,
    kd_weight: float,
    scale: float | Tensor = 1.0,
    chunk_size: int = CHUNK_POSITIONS,
) -> HeadOutput:
    """Sums of (1 − α)·CE + α·D; `kl` is that of `targets` under `bucket`, so that runs can be compared by it.

    Args:
        hidden: [N, D] or [B, T, D] states. head: [n, D] → [n, V], cut to the student's real vocabulary.
        targets: labels, and the teacher's entries as far as the student has the same tokens.
        sorted_targets: of the same positions.
    """
    hidden = hidden.reshape(-1, hidden.shape[-1])
    kept = targets.counted.nonzero().squeeze(1)
    hidden, targets, sorted_targets = hidden[kept], entries_of(targets[kept], "bucket", 1.0), sorted_targets[kept]
    mixture = Mixture.parse(FORWARD_KL)

    def chunk_terms(states: Tensor, chunk: TargetBatch, ordered: SortedTargets) -> Tensor:
        logits = head(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chunk = chunk.to(dtype=logits.dtype)
        ce = torch.nn.functional.cross_entropy(logits, chunk.labels, reduction="none")
        loss = (1.0 - kd_weight) * ce + kd_weight * uld(logits, ordered)
        with torch.no_grad():
            kl, _ = soft_losses(chunk, student_values(logits, chunk), "bucket", 1.0, logits.shape[1], mixture)
            likeliest = chunk.valid & (chunk.logprobs >= chunk.logprobs.amax(dim=1, keepdim=True))
            agrees = (likeliest & (chunk.ids == logits.argmax(dim=1, keepdim=True))).any(dim=1)
        count = torch.full((), len(ce), dtype=loss.dtype, device=loss.device)
        return torch.stack([loss.sum(), kl.sum(), ce.detach().sum(), agrees.sum(dtype=loss.dtype), count])

    total = torch.zeros(())
    for start in range(0, max(1, len(hidden)), chunk_size):  # once at least, see general_head
        here = slice(start, start + chunk_size)
        terms = checkpoint(chunk_terms, hidden[here], targets[here], sorted_targets[here], use_reentrant=False)
        total = terms if start == 0 else total + terms
    return HeadOutput(total[0] * scale, *total[1:].detach().unbind())
