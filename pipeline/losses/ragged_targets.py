"""Sparse targets on their way from the cache to the device: flat lists of entries in narrow types.

    cache rows ─▶ RaggedTargets (host, pinned) ─▶ RaggedTargets (device) ─▶ SparseTargetBatch of the loss tokens

The rectangle that a loss reads takes 12 bytes per place, for as many places at every position as the longest list has.
This form takes 6 bytes per entry for vocabularies up to 65,536 tokens (8 for larger ones) and nothing for padding; with
`threshold` targets that is some fifty times less to copy between processes, to pin, and to send. The device makes the
rectangle, and for loss tokens only. Their places are found on the host, where labels are at hand: on a device that
would have to wait (`nonzero`).

Shapes: N positions, n loss tokens, E entries of all positions, K entries of the longest list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from cache_format import CacheRow
from pipeline.losses.entries import IGNORE_INDEX
from pipeline.losses.sparse_targets import SparseTargetBatch
from pipeline.losses.spec import DistillLoss

PER_ENTRY = ("ids", "logprobs")
PER_POSITION = ("starts", "counts", "exact_counts", "residual_logprob", "entropy", "labels")


@dataclass(frozen=True, kw_only=True)
class RaggedTargets:
    """`SparseTargetBatch` of N positions, with the entries of all positions one after another.

    Attributes:
        ids: [E] token ids: int16 with the bits of a uint16, for which torch has few operations, or a wider integer.
        logprobs: [E] float32.
        starts: [N] int64, first entry of each position.
        counts, exact_counts: [N] int32.
        residual_logprob, entropy: [N] float32.
        labels: [N] int64, `IGNORE_INDEX` outside the loss mask.
        loss_tokens: [n] int64, ascending; None if unknown.
        width: K.
        temperature: of the softmax at which the cache was captured.
    """

    CHUNK_POSITIONS: ClassVar[int] = SparseTargetBatch.CHUNK_POSITIONS
    GPU_CHUNK_POSITIONS: ClassVar[int] = SparseTargetBatch.GPU_CHUNK_POSITIONS

    ids: Tensor
    logprobs: Tensor
    starts: Tensor
    counts: Tensor
    exact_counts: Tensor
    residual_logprob: Tensor
    entropy: Tensor
    labels: Tensor
    loss_tokens: Tensor | None
    width: int
    temperature: float = 1.0

    @property
    def loss_mask(self) -> Tensor:
        """[N] bool, true for loss tokens."""
        return self.labels != IGNORE_INDEX

    def __len__(self) -> int:
        return self.labels.shape[0]

    def __getitem__(self, index: slice | Tensor) -> RaggedTargets:
        found = {name: getattr(self, name)[index] for name in PER_POSITION}
        return replace(self, **found, loss_tokens=None)

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> RaggedTargets:
        """Moves all tensors to `device`; floats stay float32 until `rectangular`, whatever `dtype` is."""
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._tensors().items()}
        return replace(self, **moved)

    def pin_memory(self) -> RaggedTargets:
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self._tensors().items()})

    def with_labels(self, labels: Tensor) -> RaggedTargets:
        return replace(self, labels=labels, loss_tokens=None)

    def prepare(self, loss: DistillLoss) -> SparseTargetBatch:
        """See `Targets`. Raises: ValueError as `SparseTargetBatch.prepare`."""
        return self.rectangular().prepare(loss)

    def loss_and_dlogits(
        self, logits: Tensor, loss: DistillLoss, scale: float | Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Targets`."""
        return self.prepare(loss).loss_and_dlogits(logits, loss, scale)

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

    def _tensors(self) -> dict[str, Tensor]:
        names = (*PER_ENTRY, *PER_POSITION, "loss_tokens")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}


def _signed(ids: np.ndarray) -> np.ndarray:
    """The same bits as a signed type; ids are far below 2^31."""
    return ids.view({"uint16": np.int16, "uint32": np.int32, "uint64": np.int64}.get(ids.dtype.name, ids.dtype))
