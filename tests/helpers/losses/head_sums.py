"""`fused_head` and `general_head` with the fields of `DistillLoss` as keyword arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pipeline.losses import DistillLoss, HeadOutput, Targets, fused_head, general_head

WALK = ("scale", "vocab_size", "chunk_size")


def fused_sums(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Targets, **options: Any) -> HeadOutput:
    walk = {name: options.pop(name) for name in WALK if name in options}
    return fused_head(hidden, weight, bias, targets, DistillLoss(**options), **walk)


def general_sums(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Targets, **options: Any) -> HeadOutput:
    walk = {name: options.pop(name) for name in WALK if name in options}
    return general_head(hidden, head, targets, DistillLoss(**options), **walk)
