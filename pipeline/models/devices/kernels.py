"""Whether the passes over the vocabulary are done by Triton kernels (`triton_kernels`) or by plain torch.

Kernels read logits less often than the operations of torch that they replace, with the same results within rounding.
They are used on CUDA if Triton is installed (torch's builds for CUDA bring it) and a trial on a few rows gives the
results of torch: on a GPU or a version where they do not compile, a run is slower, not wrong.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.testing import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 4096
"""Logits that one program takes."""
PARTS = 5
"""Numbers that `sums` writes for each tile: largest logit, Σ e, tempered Σ e, Σ e·log e, logits that are not finite."""

logger = logging.getLogger("distill")


class RowSums(NamedTuple):
    """Sums over each row of z [n, V], with e = exp(z − largest).

    largest:      [n] max z
    total:        [n] Σ e
    tempered:     [n] Σ exp((z − largest) / T)
    surprise:     [n] −Σ e·log e
    finite:       [n] bool, whether all logits are
    block_maxima: [n, ⌈V/block⌉] in the dtype of z, or None
    """

    largest: Tensor
    total: Tensor
    tempered: Tensor
    surprise: Tensor
    finite: Tensor
    block_maxima: Tensor | None


def kernels_for(logits: Tensor) -> ModuleType | None:
    """The kernels for logits [n, V], or None: take plain torch."""
    if logits.dtype not in DTYPES or logits.stride(1) != 1 or logits.stride(0) < logits.shape[1]:
        return None  # rows that share memory cannot be written to
    return kernels_on(logits.device)


@functools.cache
def kernels_on(device: torch.device) -> ModuleType | None:
    """The kernels, if they work on this device. The first call for a device tries them, and waits for it."""
    if device.type != "cuda" or not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return None
    try:
        from pipeline.models.devices import triton_kernels as kernels

        check_kernels(kernels, device)
    except Exception as error:  # compilers and drivers raise anything
        reason = " ".join(str(error).split())[:300]
        kind = type(error).__name__
        logger.warning("Triton kernels are not used on %s, plain torch is: %s: %s", device, kind, reason)
        return None
    return kernels


@torch.no_grad()
def check_kernels(kernels: ModuleType, device: torch.device) -> None:
    """Compares every kernel with torch on a few rows. Raises: AssertionError, or what compiling them raises."""
    temperature, block = 2.0, 32
    for dtype in DTYPES:
        z = (4 * torch.randn((3, TILE + 100), generator=torch.Generator().manual_seed(0))).to(device, dtype)
        z[:, 7] = -torch.inf
        wide = z.double()
        largest = wide.amax(dim=1)
        x = wide - largest[:, None]
        e, tempered = x.exp(), (x / temperature).exp()
        blocks = torch.nn.functional.pad(tempered, (0, -z.shape[1] % block)).unflatten(1, (-1, block)).sum(dim=2)
        whole = z[:, : z.shape[1] // block * block].unflatten(1, (-1, block))
        factor = torch.tensor([0.5, -1.0, 2.0], device=device)

        found = kernels.sums(z, temperature=temperature, block=block)
        by_block, logarithms = kernels.block_sums(z, largest.float(), temperature=temperature, block=block)
        written = torch.empty_like(z)
        kernels.write_gradient(z, largest.float(), factor, 3 * factor, temperature, written)
        assert not found.finite.any(), "a logit of -inf was not noticed"
        for given, expected in (
            (found.largest, largest),
            (found.total, e.sum(dim=1)),
            (found.tempered, tempered.sum(dim=1)),
            (found.surprise, torch.special.entr(e).sum(dim=1)),
            (found.block_maxima[:, : whole.shape[1]], whole.amax(dim=2)),
            (by_block, blocks),
            (logarithms, -torch.special.entr(tempered).sum(dim=1)),
            (written, (e + 3 * tempered) * factor[:, None]),
        ):
            rtol = 1e-2 if given is written else 1e-4
            assert_close(given.double(), expected.double(), rtol=rtol, atol=1e-6)
