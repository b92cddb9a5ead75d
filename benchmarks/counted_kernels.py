"""Stands in for the Triton kernels where shapes are all there is: results without numbers, and the bytes moved.

A kernel moves what its code says: every logit of a row once, some numbers for each tile or row. That these counts are
those of the code is tested against Triton's interpreter (`tests/models/devices/test_kernels.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from pipeline.models.devices import kernels
from pipeline.models.devices.kernels import PARTS, TILE, RowSums

FLOAT = 4

Count = Callable[[str, int, int], None]
"""Called with the name of a kernel, and the bytes that it reads and writes."""


class CountedKernels:
    """See `pipeline.models.devices.triton_kernels`, whose functions these are."""

    def __init__(self, count: Count) -> None:
        self._count = count

    def sums(
        self, logits: Tensor, *, temperature: float = 1.0, at_least: Tensor | None = None, block: int | None = None
    ) -> RowSums:
        maxima = None if block is None else logits.new_empty((len(logits), -(-logits.shape[1] // block)))
        written = 0 if maxima is None else maxima.numel() * maxima.element_size()
        self._count("sums", _size(logits), _tiles(logits) * PARTS * FLOAT + written)
        row = logits.new_empty(len(logits), dtype=torch.float32)
        return RowSums(row, row, row, row, row.new_empty(len(row), dtype=torch.bool), maxima)

    def block_sums(self, logits: Tensor, largest: Tensor, *, temperature: float, block: int) -> tuple[Tensor, Tensor]:
        found = logits.new_empty((len(logits), -(-logits.shape[1] // block)), dtype=torch.float32)
        tiles = _tiles(logits) * FLOAT
        self._count("block_sums", _size(logits) + tiles, found.numel() * FLOAT + tiles)
        return found, found.new_empty(len(found))

    def write_gradient(
        self,
        logits: Tensor,
        largest: Tensor,
        factor: Tensor,
        tempered_factor: Tensor | None,
        temperature: float,
        out: Tensor,
    ) -> None:
        of_rows = (2 if tempered_factor is None else 3) * _tiles(logits) * FLOAT
        self._count("write_gradient", _size(logits) + of_rows, _size(out))


@contextmanager
def counted_kernels(count: Count) -> Iterator[None]:
    """Inside the block all logits go through `CountedKernels`."""
    with mock.patch.object(kernels, "kernels_on", lambda device: CountedKernels(count)):
        yield


@contextmanager
def plain_torch() -> Iterator[None]:
    """Inside the block no logits go through kernels."""
    with mock.patch.object(kernels, "kernels_on", lambda device: None):
        yield


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tiles(logits: Tensor) -> int:
    return len(logits) * -(-logits.shape[1] // TILE)
