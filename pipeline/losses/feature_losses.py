"""Distance between a student's and its teacher's hidden state, at one position and layer.

    cosine           1 − cos(s, t)                 direction only: DistilBERT (Sanh et al., 2019, arXiv 1910.01108)
    mse              Σ (s − t)² / D                size as well: TinyBERT (Jiao et al., 2020, arXiv 1909.10351)
    normalized-mse   Σ (s − t)² / Σ t²             size as well, relative to the teacher's

A few components of a transformer's state are hundreds of times as large as the others, and layers differ in size by as
much. `mse` mostly fits those; `normalized-mse` gives every position and layer the same weight; `cosine` ignores size.
All are 0 if s = t, and are computed in float32 or wider.

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
    """[n] distances of states [n, D]; the gradient is for the student only.

    Raises: ValueError for a kind that is not one of `FEATURE_LOSSES`.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    s, t = student.to(dtype), teacher.detach().to(dtype)
    if kind == "cosine":
        # 1 − cos as half the squared distance of unit vectors: exactly 0 for equal vectors, and never negative.
        return 0.5 * (_unit(s) - _unit(t)).square().sum(dim=-1)
    if kind == "mse":
        return (s - t).square().mean(dim=-1)
    if kind == "normalized-mse":
        return (s - t).square().sum(dim=-1) / t.square().sum(dim=-1).clamp(min=TINY)
    raise ValueError(f"`hidden_loss` {kind}: expected one of {', '.join(FEATURE_LOSSES)}.")


def _unit(states: Tensor) -> Tensor:
    return states / states.norm(dim=-1, keepdim=True).clamp(min=TINY)
