"""Sparse teacher targets as tensors: the part of a cache row that a loss reads.

The cache stores the entries of all positions flat, with a count per position (`cache_format.SparseTargets`). A loss
needs rectangles, so entries are padded to the longest list of the batch. Shapes here and in the whole package:

    N  positions (flattened batch)      K  entries per position after padding      V  vocabulary

Cost: 12 bytes per entry on the device, K ≪ V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position outside the loss mask, as in `torch.nn.functional.cross_entropy`."""


Entries = TypeVar("Entries", bound="TargetEntries")


@dataclass(frozen=True, kw_only=True)
class TargetEntries:
    """Entries of N positions.

    Attributes:
        ids: [N, K] int64, token ids of the entries; any value where `logprobs` is -inf.
        logprobs: [N, K] float, nats: log-probabilities of the exact entries, which come first, then logarithms of the
            weights of the sampled entries. -inf marks padding, or an entry of probability zero, which no loss
            distinguishes from it. The entries of a position are distinct tokens.
        residual_logprob: [N] float, log of the tail mass; -inf if the tail is empty.
        labels: [N] int64, the true token; `IGNORE_INDEX` outside the loss mask. Such a position adds exactly zero to
            every loss, gradient and count.
        exact_counts: [N] int64, number of exact entries. Default: all.
        entropy: [N] float, nats, of the teacher's full distribution. Default: NaN, for losses that do not read it.
        temperature: of the softmax at which the cache was captured.
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
            every_entry = torch.full_like(self.labels, self.ids.shape[1])
            object.__setattr__(self, "exact_counts", every_entry)
        if self.entropy is None:
            object.__setattr__(self, "entropy", torch.full_like(self.residual_logprob, torch.nan))

    @property
    def valid(self) -> Tensor:
        """[N, K] bool, false for padding."""
        return self.logprobs > -torch.inf

    @property
    def loss_mask(self) -> Tensor:
        """[N] bool, true for loss tokens."""
        return self.labels != IGNORE_INDEX

    @property
    def loss_tokens(self) -> Tensor | None:
        """Unknown, see `Targets`."""
        return None

    @property
    def exact(self: Entries) -> Entries:
        """The exact entries alone: what every loss reads that is not linear in the teacher's probabilities."""
        place = torch.arange(self.logprobs.shape[1], device=self.logprobs.device)
        sampled = place >= self.exact_counts[:, None]
        return replace(self, logprobs=self.logprobs.masked_fill(sampled, -torch.inf))

    def __len__(self) -> int:
        return self.labels.shape[0]

    def __getitem__(self: Entries, index: slice | Tensor) -> Entries:
        return self._map(lambda tensor: tensor[index])

    def to(
        self: Entries,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> Entries:
        """Moves all tensors to `device`, and converts the floats to `dtype`."""

        def move(tensor: Tensor) -> Tensor:
            # Token ids keep their dtype: bfloat16 cannot tell token 256 from 257.
            float_dtype = dtype if tensor.is_floating_point() else None
            return tensor.to(device=device, dtype=float_dtype, non_blocking=non_blocking)

        return self._map(move)

    def pin_memory(self: Entries) -> Entries:
        return self._map(Tensor.pin_memory)

    def with_labels(self: Entries, labels: Tensor) -> Entries:
        return replace(self, labels=labels)

    def _map(self: Entries, function: Callable[[Tensor], Tensor]) -> Entries:
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})
