"""How far a student's hidden state is from its teacher's, at one position and layer.

    cosine           1 − cos(s, t)                 direction alone: DistilBERT (Sanh et al., 2019, arXiv 1910.01108)
    mse              Σ (s − t)² / D                size too: TinyBERT (Jiao et al., 2020, arXiv 1909.10351)
    normalized-mse   Σ (s − t)² / Σ t²             size too, but relative to the teacher's

A few numbers of a transformer's state are hundreds of times as large as the others, and layers differ in size by as
much: `mse` is mostly about those, `normalized-mse` gives every position and layer the same weight, `cosine` leaves the
size to the student. All are 0 where s = t, and computed in float32 at least.

Shapes: n positions, D the teacher's width.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

FeatureLoss = Literal["cosine", "mse", "normalized-mse"]
FEATURE_LOSSES: tuple[FeatureLoss, ...] = get_args(FeatureLoss)

TINY = 1e-12


def feature_losses(kind: FeatureLoss, student: Tensor, teacher: Tensor) -> Tensor:
    """[n] of states [n, D]; a gradient for the student alone.

    Raises: ValueError for a kind that is not one of `FEATURE_LOSSES`.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    s, t = student.to(dtype), teacher.detach().to(dtype)
    if kind == "cosine":
        # 1 − cos, as half the square of the distance of two unit vectors: exactly 0 for equal ones, and never below.
        return 0.5 * (_unit(s) - _unit(t)).square().sum(dim=-1)
    if kind == "mse":
        return (s - t).square().mean(dim=-1)
    if kind == "normalized-mse":
        return (s - t).square().sum(dim=-1) / t.square().sum(dim=-1).clamp(min=TINY)
    raise ValueError(f"feature loss {kind}: expected one of {', '.join(FEATURE_LOSSES)}")


def _unit(states: Tensor) -> Tensor:
    return states / states.norm(dim=-1, keepdim=True).clamp(min=TINY)
