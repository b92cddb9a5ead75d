"""Passes over rows of logits [n, V] in Triton: each reads a logit once and writes, if anything, a gradient once.

    sums              largest logit, Σ exp, Σ exp · z, maxima of blocks          one read
    block_sums        Σ exp over blocks of the vocabulary                        one read
    write_gradient    exp(z − max) times a number for each row                   one read, one write

A program takes a tile of `TILE` logits of one row, so that a few rows fill a GPU as well as many, and what comes out
for a row depends on nothing else. What is left, [n, V/TILE] numbers, is combined by torch. Everything is computed in
float32, relative to the largest logit: exp never overflows, and a constant added to all logits costs no digits.

Import it through `kernels.kernels_on`, which checks that the kernels work.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.models.devices.kernels import PARTS, TILE, RowSums

WARPS = 8


def sums(
    logits: Tensor, *, temperature: float = 1.0, at_least: Tensor | None = None, block: int | None = None
) -> RowSums:
    """
    Args:
        logits: [n, V] float32, bfloat16 or float16, rows may have any stride.
        at_least: [n] float32, takes part in `largest`: logits that have been taken out of the row.
        block: number of logits of a block, a power of two; None: no maxima of blocks.
    """
    n, width = logits.shape
    tiles = triton.cdiv(width, TILE)
    parts = torch.empty((n, tiles, PARTS), dtype=torch.float32, device=logits.device)
    maxima = None if block is None else logits.new_empty((n, triton.cdiv(width, block)))
    with torch.cuda.device_of(logits):
        _sum_tile[(n * tiles,)](
            logits,
            logits.stride(0),
            width,
            tiles,
            parts,
            parts if maxima is None else maxima,
            1.0 / temperature,
            TEMPERED=temperature != 1.0,
            BLOCK=block or 0,
            TILE=TILE,
            PARTS=PARTS,
            num_warps=WARPS,
        )
    largest_of, total, tempered, logarithms, infinite = parts.unbind(dim=2)  # [n, tiles]
    largest = largest_of.amax(dim=1)
    if at_least is not None:
        largest = torch.maximum(largest, at_least)
    below = largest_of - largest[:, None]
    share = below.exp()
    moved = torch.where(share > 0, share * total * below, 0.0)  # -inf · 0 where a tile has no mass
    return RowSums(
        largest=largest,
        total=(share * total).sum(dim=1),
        tempered=((below / temperature).exp() * tempered).sum(dim=1),
        surprise=-(share * logarithms + moved).sum(dim=1),
        finite=infinite.sum(dim=1) == 0,
        block_maxima=maxima,
    )


def block_sums(logits: Tensor, largest: Tensor, *, temperature: float, block: int) -> tuple[Tensor, Tensor]:
    """[n, ⌈V/block⌉] sums of e = exp((z − largest) / T) over blocks of [n, V] logits z, and Σ e·log e [n]."""
    n, width = logits.shape
    tiles, blocks = triton.cdiv(width, TILE), triton.cdiv(width, block)
    found = torch.empty((n, blocks), dtype=torch.float32, device=logits.device)
    logarithms = torch.empty((n, tiles), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _sum_blocks[(n * tiles,)](
            logits,
            logits.stride(0),
            width,
            tiles,
            largest,
            1.0 / temperature,
            found,
            blocks,
            logarithms,
            BLOCK=block,
            TILE=TILE,
            num_warps=WARPS,
        )
    return found, logarithms.sum(dim=1)


def write_gradient(
    logits: Tensor, largest: Tensor, factor: Tensor, tempered_factor: Tensor | None, temperature: float, out: Tensor
) -> None:
    """out = factor · exp(z − largest) + tempered_factor · exp((z − largest) / T).

    Args:
        logits: z [n, V].
        largest, factor, tempered_factor: [n] float32.
        out: [n, V] of any dtype; may be `logits`.
    """
    n, width = logits.shape
    tiles = triton.cdiv(width, TILE)
    with torch.cuda.device_of(logits):
        _write_gradient[(n * tiles,)](
            logits,
            logits.stride(0),
            width,
            tiles,
            largest,
            factor,
            factor if tempered_factor is None else tempered_factor,
            1.0 / temperature,
            out,
            out.stride(0),
            TEMPERED=tempered_factor is not None,
            TILE=TILE,
            num_warps=WARPS,
        )


@triton.jit
def _tile(logits, stride, width, tiles, TILE: tl.constexpr):
    """Row and tile of this program, the places of its logits in the row, and the logits; -inf behind the row's end.

    Only the last tile of a row is masked. A mask that ends anywhere would make every load one logit wide, 2 bytes
    instead of 16, unless V is a multiple of 16.
    """
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    place = tile * TILE + tl.arange(0, TILE)
    at = logits + row * stride + place
    if (tile + 1) * TILE <= width:
        z = tl.load(at)
    else:
        z = tl.load(at, mask=place < width, other=-float("inf"))
    return row, tile, place, z.to(tl.float32)


@triton.jit
def _block_maxima(z, TILE: tl.constexpr, BLOCK: tl.constexpr):
    return tl.max(tl.reshape(z, [TILE // BLOCK, BLOCK]), axis=1)


@triton.jit
def _sum_tile(
    logits,
    stride,
    width,
    tiles,
    parts,
    maxima,
    inverse_temperature,
    TEMPERED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    row, tile, place, z = _tile(logits, stride, width, tiles, TILE)
    largest = tl.max(z, axis=0)
    x = z - tl.where(largest == -float("inf"), 0.0, largest)
    e = tl.exp(x)
    total = tl.sum(e, axis=0)
    part = parts + tl.program_id(0).to(tl.int64) * PARTS
    tl.store(part, largest)
    tl.store(part + 1, total)
    if TEMPERED:
        tl.store(part + 2, tl.sum(tl.exp(x * inverse_temperature), axis=0))
    else:
        tl.store(part + 2, total)
    tl.store(part + 3, tl.sum(tl.where(e > 0, e * x, 0.0), axis=0))
    finite = tl.abs(z) < float("inf")  # false of NaN too
    tl.store(part + 4, tl.sum(tl.where(finite | (place >= width), 0.0, 1.0), axis=0))
    if BLOCK > 0:
        blocks = tl.cdiv(width, BLOCK)
        at = tile * (TILE // BLOCK) + tl.arange(0, TILE // BLOCK)
        tl.store(maxima + row * blocks + at, _block_maxima(z, TILE, BLOCK), mask=at < blocks)


@triton.jit
def _sum_blocks(
    logits,
    stride,
    width,
    tiles,
    largest,
    inverse_temperature,
    found,
    blocks,
    logarithms,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    row, tile, place, z = _tile(logits, stride, width, tiles, TILE)
    x = (z - tl.load(largest + row)) * inverse_temperature
    e = tl.exp(x)
    at = tile * (TILE // BLOCK) + tl.arange(0, TILE // BLOCK)
    tl.store(found + row * blocks + at, tl.sum(tl.reshape(e, [TILE // BLOCK, BLOCK]), axis=1), mask=at < blocks)
    tl.store(logarithms + tl.program_id(0), tl.sum(tl.where(e > 0, e * x, 0.0), axis=0))


@triton.jit
def _write_gradient(
    logits,
    stride,
    width,
    tiles,
    largest,
    factor,
    tempered_factor,
    inverse_temperature,
    out,
    out_stride,
    TEMPERED: tl.constexpr,
    TILE: tl.constexpr,
):
    row, tile, place, z = _tile(logits, stride, width, tiles, TILE)
    x = z - tl.load(largest + row)
    gradient = tl.exp(x) * tl.load(factor + row)
    if TEMPERED:
        gradient += tl.exp(x * inverse_temperature) * tl.load(tempered_factor + row)
    at = out + row * out_stride + place
    gradient = gradient.to(out.dtype.element_ty)
    if (tile + 1) * TILE <= width:  # see `_tile`
        tl.store(at, gradient)
    else:
        tl.store(at, gradient, mask=place < width)
