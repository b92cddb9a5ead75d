"""Sparse teacher targets as tensors: the part of a cache row that a loss reads.

The cache stores the entries of all positions flat, with a count per position (`cache_format.SparseTargets`). A loss
needs rectangles, so entries are padded to the longest list of the batch. Shapes here and in the whole package:

    N  positions (flattened batch)      K  entries per position after padding      V  vocabulary

Cost: 12 bytes per entry on the device, K ≪ V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position outside the loss mask, as in `torch.nn.functional.cross_entropy`."""


Tensors = TypeVar("Tensors", bound="PositionTensors")
Entries = TypeVar("Entries", bound="TargetEntries")


@dataclass(frozen=True, kw_only=True)
class PositionTensors:
    """Tensors about N positions, as fields of a subclass, some of them in other `PositionTensors`.

    Attributes:
        loss_tokens: [n] int64, see `Targets`.
    """

    PER_POSITION: ClassVar[tuple[str, ...]]
    """Fields whose first dimension is N; the others serve all positions."""
    COMPUTED_WITH: ClassVar[tuple[str, ...]] = ()
    """Floats that `to` converts."""

    if TYPE_CHECKING:

        @property
        def labels(self) -> Tensor: ...

    loss_tokens: Tensor | None = None

    @property
    def loss_mask(self) -> Tensor:
        """[N] bool, true for loss tokens."""
        return self.labels != IGNORE_INDEX

    def __len__(self) -> int:
        return self.labels.shape[0]

    def __getitem__(self: Tensors, index: slice | Tensor) -> Tensors:
        return replace(self, **{name: getattr(self, name)[index] for name in self.PER_POSITION}, loss_tokens=None)

    def to(
        self: Tensors,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> Tensors:
        """Moves all tensors to `device`, and converts the floats that the loss computes with to `dtype`."""
        moved = self._map(lambda each: each.to(device, non_blocking=non_blocking))
        return replace(moved, **{name: getattr(moved, name).to(dtype=dtype) for name in self.COMPUTED_WITH})

    def pin_memory(self: Tensors) -> Tensors:
        return self._map(lambda each: each.pin_memory())

    def with_labels(self: Tensors, labels: Tensor) -> Tensors:
        if labels.shape != self.labels.shape:
            raise ValueError(f"found labels of shape {tuple(labels.shape)} for {len(self)} positions, one label each.")
        return replace(self, **{"labels": labels, "loss_tokens": None})

    def _map(self: Tensors, function: Callable[[Any], Any]) -> Tensors:
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        kinds = (Tensor, PositionTensors)
        return replace(self, **{name: function(each) for name, each in found.items() if isinstance(each, kinds)})


@dataclass(frozen=True, kw_only=True)
class TargetEntries(PositionTensors):
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

    PER_POSITION: ClassVar = ("ids", "logprobs", "residual_logprob", "labels", "exact_counts", "entropy")
    COMPUTED_WITH: ClassVar = ("logprobs", "residual_logprob", "entropy")

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
    def leading(self) -> Tensor:
        """[N, K] bool: entries that no token of the tail is likelier than. The label is left out if there are others,
        since servers list the token of the text even if it is not among the likeliest."""
        is_label = self.ids == self.labels[:, None]
        return self.valid & ~(is_label & (self.valid.sum(dim=1, keepdim=True) > 1))

    @property
    def exact(self: Entries) -> Entries:
        """The exact entries alone: what every loss reads that is not linear in the teacher's probabilities."""
        place = torch.arange(self.logprobs.shape[1], device=self.logprobs.device)
        sampled = place >= self.exact_counts[:, None]
        return replace(self, logprobs=self.logprobs.masked_fill(sampled, -torch.inf))
