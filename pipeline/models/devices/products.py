"""Matrix products whose results are wider than their factors: bfloat16 in, float32 out.

A GPU sums such a product in float32 anyway. `aten::mm.dtype_out` and `aten::addmm.dtype_out` write that sum as it is,
or add it to what is there: no rounding to bfloat16, and no further pass over memory. torch has them for CUDA only;
elsewhere the product is rounded to the dtype of its factors and then widened: the same within that rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a·b, written to `out`, whose dtype may be wider than that of the factors."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if writes_wide_sums(a, out):
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(a @ b)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a·b. Bytes per number of `total` with bfloat16 factors: 8 on CUDA, 14 elsewhere."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif writes_wide_sums(a, total):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def writes_wide_sums(factor: Tensor, out: Tensor) -> bool:
    """Whether torch can write products of tensors like `factor` in the dtype of `out`."""
    return (
        out.device.type == "cuda"
        and torch.version.hip is None
        and out.dtype == torch.float32
        and factor.dtype in (torch.bfloat16, torch.float16)
        and hasattr(torch.ops.aten.addmm, "dtype_out")  # torch 2.8
    )
