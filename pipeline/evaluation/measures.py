"""What is measured at each loss token beside the loss: rank of the teacher's choice, calibration, acceptance.

    top5_agreement   the teacher's most likely token is among the student's five most likely
    ece              expected calibration error: confidence max q against the share of correct predictions, in 15 bins
                     of equal width (Guo et al. 2017, https://arxiv.org/abs/1706.04599)
    ece_teacher      the same against the teacher's probability p of the student's most likely token
    acceptance       Σ min(p, q): share of this draft model's tokens that speculative sampling with this teacher accepts
                     (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192, theorem 3.5), at the cache's temperature
    tokens_γ         tokens per pass of the teacher when the student drafts γ: 1 + Σ_{k≤γ} a_t·…·a_{t+k−1}, the mean
                     over runs of γ successive loss tokens of a document. Lengths are measured along the text, so
                     acceptance may vary and be correlated between positions; it is assumed that an accepted draft
                     continues like the text

Targets with entries bound what they cannot give, if their tail mass is known. min(p, q) is not linear in p, and a
sampled entry stores its weight instead of p, so acceptance is bounded by the exact entries and the tail mass m as one
class:
Σ_S min(p, q) ≤ acceptance ≤ Σ_S min(p, q) + min(m, q outside). The probability p of one token is linear in p: samples
estimate it without bias; without samples a token outside the entries counts as 0, at most min(m, smallest entry) less.

Cost: one walk over chunks of positions, V-wide memory for one chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.losses import DistillLoss, FullTargets, SparseTargetBatch
from pipeline.losses.sparse_targets import agreement
from pipeline.models.head import Head
from pipeline.student.data.dataset import Batch

BINS = 15
DRAFTS = range(1, 9)
TOP = 5
SUMS = ("count", "kl", "ce", "agreement", "top5_agreement", "accepted_low", "accepted_high", "hidden_p")
BIN_SUMS = ("bin_confidence", "bin_correct", "bin_teacher", "bin_count")


def column_names() -> list[str]:
    """Columns of a table of sums by row."""
    runs = [f"{name}_{k}" for k in DRAFTS for name in ("runs", "tokens_low", "tokens_high")]
    return [*SUMS, *runs, *(f"{name}_{i}" for name in BIN_SUMS for i in range(BINS))]


@dataclass(frozen=True)
class Measured:
    """[n] each, at the loss tokens of a row, in float64.

    Attributes:
        low, high: bounds on the acceptance; equal where it is exact.
        confidence, correct, teacher: max q; whether that token is the label; the teacher's p of it (or its estimate).
        hidden_p: how much larger p may be.
    """

    top5: Tensor
    low: Tensor
    high: Tensor
    confidence: Tensor
    correct: Tensor
    teacher: Tensor
    hidden_p: Tensor


@torch.no_grad()
def group_sums(head: Head, batch: Batch, loss: DistillLoss) -> list[tuple[int, int, np.ndarray]]:
    """Row of the batch, group, and float64 [columns]: sums over the loss tokens of one group in one row, wherever there
    are any.

    Args:
        batch: collated; `groups` int64 [B, T] is the group of each position, the same in a whole document. Without it
            all are in group 0.
    """
    found, groups = [], batch.get("groups", torch.zeros_like(batch["labels"]))
    for i, (states, targets, position_ids) in enumerate(_rows(head, batch, loss)):
        kept = targets.loss_mask.nonzero().squeeze(1)
        here = groups[i].to(kept.device)[kept]
        for group in here.unique().tolist():
            sums = _sums(head, states, targets, position_ids, loss, kept[here == group])
            found.append((i, group, sums))
    return found


def _rows(
    head: Head, batch: Batch, loss: DistillLoss
) -> Iterator[tuple[Tensor, SparseTargetBatch | FullTargets, Tensor]]:
    """Hidden states, targets and position ids of each row."""
    inputs = batch["input_ids"], batch["position_ids"], batch.get("attention_mask")
    states = head.hidden_states(*inputs, documents=batch.get("documents"))
    targets = batch["targets"].prepare(loss)
    rows, length = batch["labels"].shape
    for i in range(rows):
        yield states[i], targets[i * length : (i + 1) * length], batch["position_ids"][i]


def _sums(
    head: Head,
    states: Tensor,
    targets: SparseTargetBatch | FullTargets,
    position_ids: Tensor,
    loss: DistillLoss,
    kept: Tensor,
) -> np.ndarray:
    """[columns] over the places `kept`, int64 [n] in ascending order, of a row."""
    parts, totals = [], torch.zeros(5, dtype=torch.float64)
    for places in kept.split(targets.CHUNK_POSITIONS):
        logits = head.logits(states[places])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chunk = targets[places].to(logits.device, logits.dtype)
        if isinstance(chunk, FullTargets):
            teacher = chunk.logits(logits.dtype)
            parts.append(_against_full(chunk, teacher, logits, loss.temperature))
            chunk = replace(chunk, head=functools.partial(_known, teacher))  # the loss need not compute it again
        else:
            parts.append(_against_entries(chunk, logits))
        totals += chunk.loss_and_dlogits(logits, loss, None)[0].cpu().double()  # last: it overwrites the logits
    found = Measured(*(torch.cat([getattr(part, name) for part in parts]) for name in Measured.__annotations__))
    _, kl, ce, agreement, count = totals.tolist()
    sums = [count, kl, ce, agreement, *(x.sum().item() for x in (found.top5, found.low, found.high, found.hidden_p))]
    for drafts in DRAFTS:
        low, runs = _tokens_per_run(found.low, kept.cpu(), position_ids.cpu(), drafts)
        sums += [runs, low, _tokens_per_run(found.high, kept.cpu(), position_ids.cpu(), drafts)[0]]
    bins = (found.confidence * BINS).long().clamp(max=BINS - 1)
    for values in (found.confidence, found.correct, found.teacher, torch.ones_like(found.confidence)):
        sums += torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, values).tolist()
    return np.asarray(sums)


def _known(logits: Tensor, states: Tensor) -> Tensor:
    """A head whose logits have been computed."""
    return logits


def _tokens_per_run(accepted: Tensor, places: Tensor, position_ids: Tensor, drafts: int) -> tuple[float, int]:
    """Sum of 1 + Σ_k Π a over all runs of `drafts` loss tokens that follow one another in a document; their number."""
    if len(places) < drafts:
        return 0.0, 0
    place, position = (x.unfold(0, drafts, 1) for x in (places, position_ids[places]))
    unbroken = (place[:, -1] - place[:, 0] == drafts - 1) & (position[:, -1] - position[:, 0] == drafts - 1)
    windows = accepted.unfold(0, drafts, 1)[unbroken]
    return float((1.0 + windows.cumprod(dim=1).sum(dim=1)).sum()), len(windows)


def _in_top(logits: Tensor, ids: Tensor) -> Tensor:
    """[n, K] whether ids [n, K] are among the student's five most likely tokens."""
    return (ids[:, :, None] == logits.topk(min(TOP, logits.shape[1]), dim=1).indices[:, None]).any(dim=2)


def _confidence(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The student's most likely token, its probability, and whether it is the label; [n] each."""
    largest, choice = logits.max(dim=1)
    return choice, (largest - logits.logsumexp(dim=1)).exp(), choice == labels


def _against_full(targets: FullTargets, teacher: Tensor, logits: Tensor, temperature: float) -> Measured:
    choice, confidence, correct = _confidence(logits, targets.labels)
    p = (teacher / temperature).softmax(dim=1)
    top5 = _in_top(logits, teacher.argmax(dim=1, keepdim=True)).squeeze(1)
    accepted = torch.minimum(p, (logits / temperature).softmax(dim=1)).sum(dim=1)
    of_choice = teacher.softmax(dim=1) if temperature != 1.0 else p
    teacher_p = of_choice.gather(1, choice[:, None]).squeeze(1)
    return _measured(top5, accepted, accepted, confidence, correct, teacher_p, torch.zeros_like(teacher_p))


def _against_entries(targets: SparseTargetBatch, logits: Tensor) -> Measured:
    choice, confidence, correct = _confidence(logits, targets.labels)
    z = logits.gather(1, targets.ids)
    exact = targets.exact
    tempered = z / targets.temperature
    total = (logits if targets.temperature == 1.0 else logits / targets.temperature).logsumexp(dim=1)
    p = exact.logprobs.exp()
    q = (tempered - total[:, None]).exp() * exact.valid
    low = torch.minimum(p, q).sum(dim=1)
    tail = targets.residual_logprob.exp()
    high = low + torch.minimum(tail, (1.0 - q.sum(dim=1)).clamp(min=0.0))
    is_choice = (targets.ids == choice[:, None]) & targets.valid
    teacher_p = (targets.logprobs.exp() * is_choice).sum(dim=1)
    smallest = p.masked_fill(~exact.leading, 1.0).amin(dim=1)
    unlisted = torch.minimum(tail, smallest).masked_fill((is_choice & exact.valid).any(dim=1), 0.0)
    return _measured(
        agreement(targets, _in_top(logits, targets.ids)),
        low,
        high.clamp(max=1.0),
        confidence,
        correct,
        teacher_p,
        unlisted,
    )


def _measured(*values: Tensor) -> Measured:
    return Measured(*(value.cpu().double() for value in values))  # not on the device: MPS has no float64
