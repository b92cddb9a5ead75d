"""Angle between an arm's gradient and the gradient under the full distribution, for one batch and one student.

The gradient is over all parameters except the embedding (which is also the head), because the vocabulary would dominate
it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.quality.objectives import Objective
from pipeline.models.head import Head


def body_gradient(head: Head, objective: Objective, indices: Sequence[int]) -> Tensor:
    """Flattened gradient of the mean loss over these rows."""
    model = head.model
    embedding = model.get_input_embeddings().weight
    body = [parameter for parameter in model.parameters() if parameter is not embedding]
    loss = objective(head, indices)
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, body)])


def compare(gradient: Tensor, reference: Tensor) -> dict[str, float]:
    """Angle in degrees, and |gradient| / |reference|."""
    a, b = gradient.double(), reference.double()
    # atan2, since the cosine rounds to 1 for small angles.
    along, across = a @ b / b.norm(), (a - (a @ b / (b @ b)) * b).norm()
    return {"angle": math.degrees(math.atan2(float(across), float(along))), "norm_ratio": float(a.norm() / b.norm())}
