"""Matrix products whose results are wider than their factors: bfloat16 in, float32 out.

A GPU sums such a product in float32 anyway. `aten::mm.dtype_out` and `aten::addmm.dtype_out` write that sum as it is,
or add it to what is there: no rounding to bfloat16, and no further pass over memory. torch has them for CUDA only;
elsewhere the product is rounded to the dtype of its factors and then widened: the same within that rounding.

    torch 2.8     mm
    torch 2.10    addmm; before, it is there and refuses factors whose dtype is not that of the sum
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

ROWS = 8192
"""Rows of a product that are summed at once where `addmm` cannot add them itself; bounds the extra memory."""


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a·b, written to `out`, whose dtype may be wider than that of the factors."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if writes_wide_sums(a, out):
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(a @ b)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a·b. Bytes per number of `total` with bfloat16 factors: 8 on CUDA (torch 2.8, 2.9: 16), 14 elsewhere."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif not writes_wide_sums(a, total):
        total += a @ b
    elif adds_wide_sums(total.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        for rows, part in zip(a.split(ROWS), total.split(ROWS), strict=True):
            part += torch.mm(rows, b, out_dtype=total.dtype)


def writes_wide_sums(factor: Tensor, out: Tensor) -> bool:
    """Whether torch can write products of tensors like `factor` in the dtype of `out`."""
    return (
        out.device.type == "cuda"
        and torch.version.hip is None
        and out.dtype == torch.float32
        and factor.dtype in (torch.bfloat16, torch.float16)
        and hasattr(torch.ops.aten.mm, "dtype_out")
    )


@functools.cache
def adds_wide_sums(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch can add a product of factors in `dtype` to float32 numbers. The first call for a device tries it,
    and waits for it."""
    factor = torch.ones((16, 16), dtype=dtype, device=device)
    total = torch.ones((16, 16), device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())
