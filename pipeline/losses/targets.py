"""What the walk over chunks of positions (`fused.py`) needs of the teacher's targets.

Three implementations, each with its own loss and gradient:

    SparseTargetBatch   entries of a cache                          `sparse_targets.py`
    (RaggedTargets      the same on the way to the device           likewise)
    FullTargets         all V probabilities, from stored states     `full_targets.py`
    SortedTargets       sorted probabilities, for a student with another tokenizer   `uld.py`

Targets are flat: N positions, usually B rows of T. Index n is the prediction made *from* position n; nothing shifts.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from pipeline.losses.spec import DistillLoss


class Targets(Protocol):
    """The teacher's side of N positions."""

    CHUNK_POSITIONS: ClassVar[int]
    """Default number of positions that the walk handles at a time on a CPU."""
    GPU_CHUNK_POSITIONS: ClassVar[int]
    """The same on any other device, at most; see `fused.chunk_positions`."""

    @property
    def labels(self) -> Tensor:
        """[N] int64, the true token; `IGNORE_INDEX` (-100) outside the loss mask."""
        ...

    @property
    def loss_mask(self) -> Tensor:
        """[N] bool, true for loss tokens."""
        ...

    @property
    def loss_tokens(self) -> Tensor | None:
        """[n] int64, the places of the loss tokens in ascending order, where they were found before the labels went to
        a device: reading them back from there waits for all its work. None if unknown."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice | Tensor) -> Targets: ...

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> Targets:
        """Moves all tensors to `device`, and converts what the loss computes with to `dtype`."""
        ...

    def pin_memory(self) -> Targets: ...

    def with_labels(self, labels: Tensor) -> Targets:
        """The same targets with other labels [N]."""
        ...

    def prepare(self, loss: DistillLoss) -> Targets:
        """The targets as `loss` reads them. Raises: ValueError if they cannot serve it."""
        ...

    def loss_and_dlogits(
        self, logits: Tensor, loss: DistillLoss, scale: float | Tensor | None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Sums [loss, kl, ce, agreement, count] over all N positions, and d(scale·loss)/dlogits [N, V].

        Args:
            logits: [N, V] of the student in float32 or float64; may be overwritten.
            scale: None computes no gradient.
            dtype: of the gradient; default: that of the logits.
        """
        ...
