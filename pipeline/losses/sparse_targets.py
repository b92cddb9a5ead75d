"""Sparse teacher targets as tensors: what a loss sees of the cache.

The cache stores the entries of all positions flat, with a count per position (`cache_format.SparseTargets`). A loss
wants rectangles, so a batch is padded to its longest entry list. Shapes here and in the whole package:

    N  positions (flattened batch)      K  entries per position after padding      V  vocabulary

Cost: 12 bytes per entry and position on the device, K ≪ V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from cache_format import CacheRow, SparseTargets

IGNORE_INDEX = -100
"""Label of a position that does not count, as in `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True, kw_only=True)
class TargetBatch:
    """Targets of N positions. Index n speaks of the prediction made *from* position n; nothing here shifts.

    Attributes:
        ids: [N, K] int64, token ids of the entries; anything where `logprobs` is -inf.
        logprobs: [N, K] float, in nats: log-probabilities of the exact entries, which come first, then logs of the
            weights of the sampled ones; -inf marks padding (or an entry of probability zero, which is the same thing to
            every loss). No token is twice among the entries of a position.
        exact_counts: [N] int64, how many entries are exact. Default: all.
        residual_logprob: [N] float, log of the mass outside the exact entries; -inf when there is none.
        entropy: [N] float, nats, of the teacher's full distribution. Default: NaN, for losses that do without it.
        labels: [N] int64, the true token; `IGNORE_INDEX` where the position does not count. A position that does
            not count contributes exactly zero to every loss, gradient and count.
        temperature: of the softmax that all of these speak of, as the cache was captured.
    """

    ids: Tensor
    logprobs: Tensor
    residual_logprob: Tensor
    labels: Tensor
    exact_counts: Tensor = None  # type: ignore[assignment]
    entropy: Tensor = None  # type: ignore[assignment]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.exact_counts is None:
            everything = torch.full_like(self.labels, self.ids.shape[1])
            object.__setattr__(self, "exact_counts", everything)
        if self.entropy is None:
            object.__setattr__(self, "entropy", torch.full_like(self.residual_logprob, torch.nan))

    @property
    def valid(self) -> Tensor:
        """[N, K] bool: which entries are real."""
        return self.logprobs > -torch.inf

    @property
    def counted(self) -> Tensor:
        """[N] bool: which positions count."""
        return self.labels != IGNORE_INDEX

    @property
    def exact(self) -> TargetBatch:
        """Without the sampled entries: what every loss sees that is not linear in the teacher's probabilities."""
        place = torch.arange(self.logprobs.shape[1], device=self.logprobs.device)
        sampled = place >= self.exact_counts[:, None]
        return replace(self, logprobs=self.logprobs.masked_fill(sampled, -torch.inf))

    def __len__(self) -> int:
        return self.labels.shape[0]

    def __getitem__(self, index: slice | Tensor) -> TargetBatch:
        return replace(self, **{name: tensor[index] for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def to(self, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> TargetBatch:
        """Everything on a device, the floats in a dtype."""
        moved = {
            # Never by way of a float: bfloat16 cannot tell token 256 from 257.
            name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
            for name, tensor in self._tensors().items()
        }
        return replace(self, **moved)

    @classmethod
    def from_rows(cls, rows: Sequence[CacheRow], length: int | None = None, temperature: float = 1.0) -> TargetBatch:
        """Pads rows to `length` positions each (default: the longest) and flattens them to N = len(rows) · length.

        Rows with several samples of the tail are taken with all of them together.
        """
        rows = [
            row if row.targets.sample_counts is None else replace(row, targets=row.targets.merged()) for row in rows
        ]
        length = length or max(len(row.input_ids) for row in rows)
        width = max(1, max(int(row.targets.counts.max(initial=0)) for row in rows))
        n = len(rows) * length
        ids = np.zeros((n, width), np.int64)
        logprobs = np.full((n, width), -np.inf, np.float32)
        exact_counts = np.zeros(n, np.int64)
        residual, entropy = np.zeros((2, n), np.float32)
        labels = np.full(n, IGNORE_INDEX, np.int64)
        for i, row in enumerate(rows):
            here = slice(i * length, i * length + len(row.input_ids))
            filled = np.arange(width) < np.asarray(row.targets.counts)[:, None]  # [T, K]
            ids[here][filled] = row.targets.ids
            logprobs[here][filled] = row.targets.logprobs
            exact_counts[here] = row.targets.exact_counts
            residual[here] = row.targets.residual_logprob
            entropy[here] = row.targets.entropy
            labels[here] = row.label_ids
        return cls(
            ids=torch.from_numpy(ids),
            logprobs=torch.from_numpy(logprobs),
            exact_counts=torch.from_numpy(exact_counts),
            residual_logprob=torch.from_numpy(residual),
            entropy=torch.from_numpy(entropy),
            labels=torch.from_numpy(labels),
            temperature=temperature,
        )

    @classmethod
    def from_sparse(
        cls,
        targets: SparseTargets,
        *,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        temperature: float = 1.0,
    ) -> TargetBatch:
        """One row's targets as read from a cache, with labels if the loss needs them.

        Without `labels` every position (of `loss_mask`) counts and carries label 0: fine for a pure divergence,
        refused by losses that mix in the hard label.
        """
        targets = targets.merged()
        counts = np.asarray(targets.counts, np.int64)
        width = max(1, int(counts.max(initial=0)))
        filled = np.arange(width) < counts[:, None]
        ids = np.zeros(filled.shape, np.int64)
        logprobs = np.full(filled.shape, -np.inf, np.asarray(targets.logprobs).dtype)
        ids[filled] = targets.ids
        logprobs[filled] = targets.logprobs
        if labels is None:
            labels = torch.zeros(len(counts), dtype=torch.int64)
        if loss_mask is not None:
            labels = labels.masked_fill(~torch.as_tensor(loss_mask, dtype=torch.bool), IGNORE_INDEX)
        return cls(
            ids=torch.from_numpy(ids),
            logprobs=torch.from_numpy(logprobs),
            exact_counts=torch.tensor(np.asarray(targets.exact_counts, np.int64)),
            residual_logprob=torch.tensor(np.asarray(targets.residual_logprob)),
            entropy=torch.tensor(np.asarray(targets.entropy)),
            labels=labels,
            temperature=temperature,
        )
