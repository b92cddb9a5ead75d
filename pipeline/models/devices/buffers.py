"""Memory for rows of logits [n, V], laid out as a GPU reads it best."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 128  # bytes


def empty_rows(n: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised [n, width]; on CUDA every row begins at a multiple of 128 bytes.

    In a plain [n, V] tensor with an odd V, rows begin anywhere. Tensor cores and 16-byte loads need them aligned.
    """
    if device.type != "cuda":
        return torch.empty((n, width), dtype=dtype, device=device)
    return torch.empty((n, aligned_stride(width, dtype)), dtype=dtype, device=device)[:, :width]


def aligned_stride(width: int, dtype: torch.dtype) -> int:
    """Elements from one row to the next."""
    each = ALIGNMENT // dtype.itemsize
    return -(-width // each) * each
