"""Sparse targets, from the cache to the device, and their loss on a chunk of logits, with its gradient.

    cache rows ─▶ RaggedTargets (host, pinned) ─▶ RaggedTargets (device) ─▶ SparseTargetBatch of the loss tokens

A sparse loss sees the V logits of a position through K+2 numbers only (`StudentValues`): the logits z_S of the entries,
the label's, and the log-sum-exp r of everything else. So

    ∂L/∂z_j = ∂L/∂z_j                     for j in S or the label     (a scatter of K+1 numbers)
    ∂L/∂z_j = ∂L/∂r · exp(z_j − r)        for every other j           (one scalar per row times the softmax)

The divergence and its K+2 derivatives are plain autograd on [n, K+2] tensors: a new divergence needs no new gradient.
Cost: a handful of passes over the V logits, all of them in `pipeline.models.devices.exponentials`.

Shapes: N positions, n loss tokens (of a chunk), E entries of all positions, K of the longest list, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, overload

import numpy as np
import torch
from torch import Tensor

from cache_format import CacheRow, SparseTargets
from pipeline.losses.divergence_sum import soft_losses
from pipeline.losses.divergences import sampled_forward_kl, soft_loss
from pipeline.losses.entries import IGNORE_INDEX, PositionTensors, TargetEntries
from pipeline.losses.spec import DistillLoss
from pipeline.losses.tails import ABSENT, UNDERFLOW_NATS, StudentValues, entries_of
from pipeline.losses.targets import Targets
from pipeline.losses.weighting import entropy_of_parts, position_weight
from pipeline.models.devices.exponentials import exponentials


@dataclass(frozen=True, kw_only=True)
class SparseTargetBatch(TargetEntries):
    """`TargetEntries` of N positions as targets of a loss.

    Attributes:
        labelled: whether the labels are the true tokens; without them only the loss mask is known.
    """

    CHUNK_POSITIONS: ClassVar[int] = 512
    """Enough rows for the matrix product to run at full speed (measured in `benchmarks/`)."""
    GPU_CHUNK_POSITIONS: ClassVar[int] = 4096
    """Each chunk reads and writes the head's gradient once: 8·D bytes per token of the vocabulary, beside 46 bytes for
    each logit, 18 with Triton (benchmarks/results/loss_counts.md)."""

    labelled: bool = True

    def with_labels(self, labels: Tensor) -> SparseTargetBatch:
        return replace(super().with_labels(labels), labelled=True)

    def masked(self, loss_mask: Tensor) -> SparseTargetBatch:
        """With fewer loss tokens. Args: loss_mask: [N] bool."""
        labels = self.labels.masked_fill(~loss_mask, IGNORE_INDEX)
        return replace(super().with_labels(labels), labelled=self.labelled)

    def check_labels(self, loss: DistillLoss) -> None:
        """Raises: ValueError for a loss that reads the true tokens, which are not known."""
        if not self.labelled and (loss.tail in ("label", "realized") or any(each != 1.0 for each in loss.kd_weights)):
            raise ValueError(
                f"`kd_weight={loss.kd_weight}` with `tail={loss.tail}` needs labels, but these targets have none. Pass "
                "labels=row.label_ids."
            )

    def prepare(self, loss: DistillLoss) -> SparseTargetBatch:
        """Without the sampled entries, unless the loss or the reported KL reads them.

        Raises: ValueError for a loss on other targets, one that needs labels where there are none, or one at a
            temperature that these cannot be tempered to.
        """
        if loss.full or loss.uld:
            kind = "sorted" if loss.uld else "full"
            raise ValueError(f"found sparse targets for a loss on {kind} ones: collate with the dataset of the cache.")
        self.check_labels(loss)
        of_loss = entries_of(self, loss.tail, loss.temperature)  # refuses what cannot be tempered
        return self if loss.kl_tail == "sampled" else of_loss

    def loss_and_dlogits(
        self, logits: Tensor, loss: DistillLoss, scale: float | Tensor | None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Targets`; works in the logits' memory. Every position must be a loss token."""
        temperature, tail, kl_tail, vocab_size = loss.temperature, loss.tail, loss.kl_tail, logits.shape[1]
        want_grad = scale is not None
        label = self.labels[:, None]  # [n, 1]
        targets: TargetEntries = self
        taken = gathered = _ids_and_label(self)  # [n, K+1]
        if kl_tail == "sampled" != tail:  # in this loss the sampled entries belong to the tail
            targets = entries_of(self, tail, temperature)
            taken = _ids_and_label(targets)
        is_label = (targets.ids == label) & targets.valid  # [n, K]
        label_is_entry = is_label.any(dim=1)
        z = logits.gather(1, gathered)  # [n, K+1]
        entries = z[:, :-1].masked_fill(~targets.valid, ABSENT).requires_grad_(want_grad)
        label_alone = z[:, -1].masked_fill(label_is_entry, ABSENT).requires_grad_(want_grad)
        choice = None if want_grad else logits.argmax(dim=1)
        # `logits` are not to be read from here on.
        others = exponentials(logits, taken, temperature, math.exp(-UNDERFLOW_NATS))
        largest, rest, rest_t = others.largest, others.lse, others.tempered_lse
        if loss.position_weighting == "student-entropy":
            parts = torch.cat([entries, label_alone[:, None]], dim=1)
            student_entropy = entropy_of_parts(*others.sum_and_surprise(), (parts - largest[:, None]).exp())
        leaves = [entries, label_alone, rest.requires_grad_(want_grad), rest_t.requires_grad_(want_grad)]

        with torch.set_grad_enabled(want_grad):
            at_1 = StudentValues(entries, label_alone, rest)
            at_t = at_1
            if temperature != 1.0:
                at_t = StudentValues(entries / temperature, label_alone / temperature, rest_t)
            reported = None
            if kl_tail == "sampled" != tail:  # at the temperature of the sample, which is 1 if it is not T
                at_sample = at_t if temperature == self.temperature else at_1
                reported = sampled_forward_kl(self, z[:, :-1] / self.temperature, at_sample.lse.detach())
            elif kl_tail != tail:
                with torch.no_grad():
                    reported = soft_loss(targets, at_t, kl_tail, temperature, vocab_size)
            kl, soft = soft_losses(targets, at_t, tail, temperature, vocab_size, loss.divergence, reported)  # [n] each
            z_label = torch.where(label_is_entry, torch.where(is_label, entries, 0.0).sum(dim=1), label_alone)
            ce = at_1.lse - z_label  # [n]
            losses = loss.weighted(ce, soft)
            if loss.position_weighting != "uniform":
                entropy = targets.entropy if loss.position_weighting == "teacher-entropy" else student_entropy
                losses = losses * position_weight(entropy, vocab_size)
            total_loss = losses.sum() * scale if want_grad else None

        # A training step saves the pass that finds which of several equal logits is the student's choice.
        is_choice = z[:, :-1] >= largest[:, None] if choice is None else self.ids == choice[:, None]
        agrees = agreement(self, is_choice)
        count = torch.full((), len(losses), dtype=losses.dtype, device=losses.device)
        sums = torch.stack([losses.sum(), kl.sum(), ce.sum(), agrees.sum(dtype=losses.dtype), count]).detach()
        if not want_grad:
            return sums, None

        d_entries, d_label, d_rest, d_rest_t = torch.autograd.grad(
            total_loss, leaves, allow_unused=True, materialize_grads=True
        )
        d_logits = others.gradient(d_rest, d_rest_t, dtype or logits.dtype)
        # `taken` may name the label several times; all but one of those carry zero, so adding is exact.
        d_entries = d_entries.masked_fill(~targets.valid, 0.0)
        d_label = d_label.masked_fill(label_is_entry, 0.0)
        d_taken = torch.cat([d_entries, d_label[:, None]], dim=1).to(d_logits.dtype)
        return sums, d_logits.scatter_add_(1, taken, d_taken)

    @classmethod
    def from_rows(
        cls, rows: Sequence[CacheRow], length: int | None = None, temperature: float = 1.0
    ) -> SparseTargetBatch:
        """Pads rows to `length` positions each (default: the longest) and flattens them to N = len(rows) · length.

        If rows have several samples of the tail, all of them are used together.
        """
        return RaggedTargets.from_rows(rows, length, temperature).rectangular()

    @classmethod
    def from_sparse(
        cls,
        targets: SparseTargets,
        *,
        labels: Tensor | np.ndarray | None = None,
        loss_mask: Tensor | np.ndarray | None = None,
        temperature: float = 1.0,
    ) -> SparseTargetBatch:
        """One row's targets as read from a cache, with labels if the loss needs them.

        Without `labels` every position (of `loss_mask`) is a loss token: right for a pure divergence, refused by
        losses that use the label.

        Raises: ValueError for a number of labels other than that of positions, or a loss token without entries, on
            which no loss is defined.
        """
        targets = targets.merged()
        counts = np.asarray(targets.counts, np.int64)
        width = max(1, int(counts.max(initial=0)))
        filled = np.arange(width) < counts[:, None]
        ids = np.zeros(filled.shape, np.int64)
        logprobs = np.full(filled.shape, -np.inf, np.asarray(targets.logprobs).dtype)
        ids[filled] = targets.ids
        logprobs[filled] = targets.logprobs
        batch = cls(
            ids=torch.from_numpy(ids),
            logprobs=torch.from_numpy(logprobs),
            exact_counts=torch.tensor(np.asarray(targets.exact_counts, np.int64)),
            residual_logprob=torch.tensor(np.asarray(targets.residual_logprob)),
            entropy=torch.tensor(np.asarray(targets.entropy)),
            labels=torch.zeros(len(counts), dtype=torch.int64),
            temperature=temperature,
            labelled=False,
        )
        batch = batch_of(batch, labels, loss_mask)
        _check_entries(counts, batch.loss_mask.numpy())
        return batch


@dataclass(frozen=True, kw_only=True)
class RaggedTargets(PositionTensors):
    """`SparseTargetBatch` of N positions, with the entries of all positions one after another, in narrow types.

    The rectangle that a loss reads takes 12 bytes per place, for as many places at every position as the longest list
    has. This form takes 6 bytes per entry for vocabularies of up to 65,536 tokens (8 for larger ones) and nothing for
    padding: less to copy between processes, to pin and to send. The device makes the rectangle, and for loss tokens
    only. Their places are found on the host, where labels are at hand; a device would have to be waited for.

    Attributes:
        ids: [E] token ids: int16 with the bits of a uint16, for which torch has few operations, or a wider integer.
        logprobs: [E] float32.
        starts: [N] int64, first entry of each position.
        counts, exact_counts: [N] int32.
        residual_logprob, entropy: [N] float32.
        labels: [N] int64, `IGNORE_INDEX` outside the loss mask.
        width: K.
        temperature: of the softmax at which the cache was captured.
    """

    CHUNK_POSITIONS: ClassVar[int] = SparseTargetBatch.CHUNK_POSITIONS
    GPU_CHUNK_POSITIONS: ClassVar[int] = SparseTargetBatch.GPU_CHUNK_POSITIONS

    PER_POSITION: ClassVar = ("starts", "counts", "exact_counts", "residual_logprob", "entropy", "labels")

    ids: Tensor
    logprobs: Tensor
    starts: Tensor
    counts: Tensor
    exact_counts: Tensor
    residual_logprob: Tensor
    entropy: Tensor
    labels: Tensor
    width: int
    temperature: float = 1.0

    def prepare(self, loss: DistillLoss) -> SparseTargetBatch:
        """See `Targets`. Raises: ValueError as `SparseTargetBatch.prepare`."""
        return self.rectangular().prepare(loss)

    def loss_and_dlogits(
        self, logits: Tensor, loss: DistillLoss, scale: float | Tensor | None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Targets`."""
        return self.prepare(loss).loss_and_dlogits(logits, loss, scale, dtype)

    def rectangular(self) -> SparseTargetBatch:
        """The entries padded to [N, K], on the device of the tensors and without waiting for it."""
        place = torch.arange(self.width, device=self.counts.device)
        missing = place >= self.counts[:, None]  # [N, K]
        entry = (self.starts[:, None] + place).clamp_(max=len(self.ids) - 1)
        ids = self.ids[entry].to(torch.int64)
        if self.ids.dtype == torch.int16:
            ids &= 0xFFFF
        return SparseTargetBatch(
            ids=ids.masked_fill_(missing, 0),
            logprobs=self.logprobs[entry].masked_fill_(missing, -torch.inf),
            exact_counts=self.exact_counts.to(torch.int64),
            residual_logprob=self.residual_logprob,
            entropy=self.entropy,
            labels=self.labels,
            temperature=self.temperature,
        )

    @classmethod
    def from_rows(cls, rows: Sequence[CacheRow], length: int | None = None, temperature: float = 1.0) -> RaggedTargets:
        """Rows padded to `length` positions each (default: the longest), N = len(rows) · length.

        If rows have several samples of the tail, all of them are used together.
        """
        length = length or max(len(row.input_ids) for row in rows)
        targets = [row.targets.merged() for row in rows]
        counts, exact_counts = np.zeros((2, len(rows), length), np.int32)
        residual, entropy = np.zeros((2, len(rows), length), np.float32)
        labels = np.full((len(rows), length), IGNORE_INDEX, np.int64)
        for i, (row, each) in enumerate(zip(rows, targets, strict=True)):
            here = slice(len(row.input_ids))
            counts[i, here], exact_counts[i, here] = each.counts, each.exact_counts
            residual[i, here], entropy[i, here] = each.residual_logprob, each.entropy
            labels[i, here] = row.label_ids
        ids = np.concatenate([each.ids for each in targets])
        logprobs = np.concatenate([each.logprobs for each in targets]).astype(np.float32, copy=False)
        if not len(ids):  # so that `rectangular` has something to point at
            ids, logprobs = np.zeros(1, np.uint16), np.full(1, -np.inf, np.float32)
        ends = np.cumsum(counts.ravel(), dtype=np.int64)
        return cls(
            ids=torch.from_numpy(_signed(ids)),
            logprobs=torch.from_numpy(logprobs),
            starts=torch.from_numpy(ends - counts.ravel()),
            counts=torch.from_numpy(counts.ravel()),
            exact_counts=torch.from_numpy(exact_counts.ravel()),
            residual_logprob=torch.from_numpy(residual.ravel()),
            entropy=torch.from_numpy(entropy.ravel()),
            labels=torch.from_numpy(labels.ravel()),
            loss_tokens=torch.from_numpy(np.flatnonzero(labels != IGNORE_INDEX)),
            width=max(1, int(counts.max(initial=0))),
            temperature=temperature,
        )


@overload
def batch_of(
    targets: SparseTargetBatch | SparseTargets,
    labels: Tensor | np.ndarray | None,
    loss_mask: Tensor | np.ndarray | None,
    temperature: float = ...,
) -> SparseTargetBatch: ...


@overload
def batch_of(
    targets: Targets | SparseTargets,
    labels: Tensor | np.ndarray | None,
    loss_mask: Tensor | np.ndarray | None,
    temperature: float = ...,
) -> Targets: ...


def batch_of(
    targets: Targets | SparseTargets,
    labels: Tensor | np.ndarray | None,
    loss_mask: Tensor | np.ndarray | None,
    temperature: float = 1.0,
) -> Targets:
    """The targets of a loss from what its caller gives, labels and loss mask of any shape.

    Args:
        temperature: at which a row's `SparseTargets` were captured.

    Raises: ValueError as `SparseTargetBatch.from_sparse`.
    """
    if isinstance(targets, SparseTargets):
        return SparseTargetBatch.from_sparse(targets, labels=labels, loss_mask=loss_mask, temperature=temperature)
    device = targets.labels.device
    if labels is not None:
        targets = targets.with_labels(torch.as_tensor(labels, device=device).reshape(-1))
    if loss_mask is None:
        return targets
    # A copy, since the mask of a cache row may not be written to, about which torch warns.
    mask = loss_mask if isinstance(loss_mask, Tensor) else torch.tensor(np.asarray(loss_mask))
    mask = mask.to(device, torch.bool).reshape(-1)
    if len(mask) != len(targets):
        raise ValueError(f"found a loss mask of {len(mask)} values for {len(targets)} positions, one value each.")
    if isinstance(targets, SparseTargetBatch):
        return targets.masked(mask)
    return targets.with_labels(targets.labels.masked_fill(~mask, IGNORE_INDEX))


def _check_entries(counts: np.ndarray, loss_mask: np.ndarray) -> None:
    """Every loss token of a cache has entries, unless the targets are hidden (SPEC, §3 and §9)."""
    without = np.flatnonzero(loss_mask & (counts == 0))
    if not len(without):
        return
    next_step = "A row has targets at its own loss tokens: pass loss_mask=row.loss_mask."
    if not counts.any():
        next_step = (
            "Hidden targets are computed from the states: use cache_format.rebuilt_targets, or a cache that distill "
            "convert makes of this one with `top_k`."
        )
    where = f"{len(without)} of the loss tokens, first at position {without[0]}"
    raise ValueError(f"found no entries at {where}. {next_step}")


def agreement(targets: TargetEntries, hits: Tensor) -> Tensor:
    """[n] share of the teacher's most likely tokens that are hits: 0 or 1, and 1/m if one of m equal ones is.

    One of those m was the teacher's choice before they were rounded to the same value.

    Args: hits: [n, K] bool, which entries are the student's choice.
    """
    likeliest = likeliest_entries(targets)
    return (likeliest & hits).sum(dim=1) / likeliest.sum(dim=1).clamp(min=1)


def likeliest_entries(targets: TargetEntries) -> Tensor:
    """[n, K] bool: the most likely entries of the teacher; several if they were rounded to the same value."""
    # Weights of sampled entries do not rank tokens, but they are all there is at a position without exact entries.
    some_exact = targets.exact_counts > 0
    known = torch.where(some_exact[:, None], targets.exact.logprobs, targets.logprobs)
    return (known >= known.amax(dim=1, keepdim=True)) & (known > -torch.inf)


def _ids_and_label(targets: TargetEntries) -> Tensor:
    """[n, K+1] token ids. The label replaces padding: it is excluded from the rest anyway."""
    label = targets.labels[:, None]
    return torch.cat([torch.where(targets.valid, targets.ids, label), label], dim=1)


def _signed(ids: np.ndarray) -> np.ndarray:
    """The same bits as a signed type; ids are far below 2^31."""
    return ids.view({"uint16": np.int16, "uint32": np.int32, "uint64": np.int64}.get(ids.dtype.name, ids.dtype))
