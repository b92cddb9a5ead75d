"""The passes of `triton_kernels` over rows of float32 logits, for a CPU: compiled by numba, rows shared among threads.

Plain torch spends most of such a pass in exp, and reads memory again for each operation. Here a row is read once for
each function and stays in the cache of its core; exp is a polynomial that the compiler turns into vector instructions.

**exp(x)**, x ≤ 0, is 2^n · exp(f) with n = ⌊x/ln 2 + ½⌋ and |f| ≤ ln 2 / 2; the polynomial is that of Cephes (`expf`,
within 2 units in the last place). Below the smallest normal float32 the result is 0. Blocks of 32 are summed in
float32, their sums in float64.

Import it through `kernels.kernels_on`, which checks that the kernels work.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba import uintp
from numpy.typing import NDArray
from torch import Tensor

from cache_format.codecs.packed.compiled import compiled
from pipeline.models.devices.kernels import PARTS, RowSums, combined

NAME = "numba"
DTYPES = (torch.float32,)
BLOCK = 32  # logits that are summed in float32, and of which `sums` gives the maxima
WORTH_A_THREAD = 2**18  # logits
# What sums may be rearranged by; not by assuming that there are no NaN.
FASTMATH = {"contract", "reassoc", "nsz"}

_LOG2_E, _HALF, _ONE, _ZERO = (np.float32(x) for x in (1.44269504088896341, 0.5, 1.0, 0.0))
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # their sum is ln 2, the first has few bits
_C0, _C1, _C2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C3, _C4, _C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_SMALLEST, _LEAST_EXPONENT = np.float32(-87.33654), np.float32(-126.0)
_BIAS, _MANTISSA_BITS = np.int32(127), np.int32(23)
_INFINITY = np.float32(np.inf)

Floats = NDArray[np.float32]


def sums(
    logits: Tensor, *, temperature: float = 1.0, at_least: Tensor | None = None, block: int | None = None
) -> RowSums:
    """As `triton_kernels.sums`."""
    n, width = logits.shape
    parts = torch.empty((n, 1, PARTS), dtype=torch.float32)
    maxima = torch.empty((n, _blocks(width, block)), dtype=torch.float32)
    into = parts.view(n, PARTS).numpy(), maxima.numpy()
    _by_rows(_sums, logits, *into, np.float32(1 / temperature), temperature != 1.0)
    return combined(parts, temperature, at_least, None if block is None else maxima)


def block_sums(logits: Tensor, largest: Tensor, *, temperature: float, block: int) -> tuple[Tensor, Tensor]:
    """As `triton_kernels.block_sums`."""
    n, width = logits.shape
    found = torch.empty((n, _blocks(width, block)), dtype=torch.float32)
    logarithms = torch.empty(n, dtype=torch.float32)
    into = found.numpy(), logarithms.numpy()
    _by_rows(_block_sums, logits, _numbers(largest), *into, np.float32(1 / temperature))
    return found, logarithms


def write_gradient(
    logits: Tensor, largest: Tensor, factor: Tensor, tempered_factor: Tensor | None, temperature: float, out: Tensor
) -> None:
    """As `triton_kernels.write_gradient`, but overwrites the logits if `out` is not float32."""
    into = out if out.dtype == torch.float32 else logits
    if into.data_ptr() != logits.data_ptr():
        into.copy_(logits)
    numbers = [_numbers(each) for each in (largest, factor, factor if tempered_factor is None else tempered_factor)]
    _by_rows(_write_gradient, into, *numbers, np.float32(1 / temperature), tempered_factor is not None)
    if into is not out:
        out.copy_(into)


def _blocks(width: int, block: int | None) -> int:
    if block not in (None, BLOCK):
        raise ValueError(f"found blocks of {block} logits, expected {BLOCK}.")
    return -(-width // BLOCK)


def _numbers(row: Tensor) -> Floats:
    return row.detach().to(torch.float32).contiguous().numpy()


def _by_rows(loop: Callable[..., None], logits: Tensor, *arguments: Any) -> None:
    """Calls the loop for shares of the rows; arrays among the arguments have one entry per row."""
    n, width = logits.shape
    if n == 0:
        return
    stride = logits.stride(0)
    # Flat, because numba vectorises only loops over memory that it knows to be contiguous.
    flat = logits.detach().as_strided((stride * (n - 1) + width,), (1,)).numpy()
    threads = max(1, min(torch.get_num_threads(), n, n * width // WORTH_A_THREAD))

    def run(share: int) -> None:
        first, last = n * share // threads, n * (share + 1) // threads
        cut = [each[first:last] if isinstance(each, np.ndarray) else each for each in arguments]
        loop(flat[first * stride :], stride, last - first, width, *cut)

    if threads == 1:
        run(0)
    else:
        list(_threads(os.getpid(), threads).map(run, range(threads)))


@cache
def _threads(process: int, number: int) -> ThreadPoolExecutor:
    """Those of this process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(number, thread_name_prefix="logits")


def _compiled(*arguments: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return compiled("void", "float32[::1]", "int64", "int64", "int64", *arguments, fastmath=FASTMATH)


def _inlined(function: Callable[..., Any]) -> Any:
    return numba.njit(inline="always", fastmath=FASTMATH)(function)


@_inlined
def _exp_parts(x):  # type: ignore[no-untyped-def]
    """n, exp(f), and whether exp(x) is 0; see the module. NaN stays one."""
    gone = x < _SMALLEST
    x = _ZERO if gone else x
    n = np.floor(x * _LOG2_E + _HALF)
    f = x - n * _LN2_HIGH - n * _LN2_LOW
    polynomial = ((((_C0 * f + _C1) * f + _C2) * f + _C3) * f + _C4) * f + _C5
    n = n if n > _LEAST_EXPONENT else _LEAST_EXPONENT  # also of NaN, which is no integer
    return n, polynomial * f * f + f + _ONE, gone


@_inlined
def _sum_and_logarithms(z, start, reference, inverse, bits):  # type: ignore[no-untyped-def]
    """Σ e and Σ e·log e of the block from `start` on, e = exp((z − reference) · inverse)."""
    power = bits.view(np.float32)
    total, logarithms = _ZERO, _ZERO
    for i in range(BLOCK):
        x = (z[uintp(start + i)] - reference) * inverse
        n, fraction, gone = _exp_parts(x)
        bits[i] = (np.int32(n) + _BIAS) << _MANTISSA_BITS
        e = _ZERO if gone else fraction * power[i]
        total += e
        logarithms += _ZERO if gone else e * x
    return total, logarithms


@_inlined
def _largest(z, start):  # type: ignore[no-untyped-def]
    """The largest logit of a block, and 0, or NaN if one of them is not finite."""
    most, zero = -_INFINITY, _ZERO
    for i in range(BLOCK):
        each = z[uintp(start + i)]
        most = each if each > most else most
        zero += each * _ZERO
    return most, zero


@_inlined
def _padded(row, whole, padded):  # type: ignore[no-untyped-def]
    """Copies what is behind the whole blocks of a row, with -inf behind that; returns its length."""
    padded[:] = -_INFINITY
    rest = len(row) - whole * BLOCK
    for i in range(rest):
        padded[i] = row[whole * BLOCK + i]
    return rest


@_compiled("float32[:, ::1]", "float32[:, ::1]", "float32", "boolean")
def _sums(flat, stride, n, width, parts, maxima, inverse, tempered):  # type: ignore[no-untyped-def]
    bits, padded, whole = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.float32), width // BLOCK
    for r in range(n):
        row = flat[r * stride : r * stride + width]
        rest = _padded(row, whole, padded)
        largest, zero = -_INFINITY, _ZERO
        for b in range(whole):
            maxima[r, b], of_block = _largest(row, b * BLOCK)
            largest, zero = max(largest, maxima[r, b]), zero + of_block
        if rest:
            maxima[r, whole], _ = _largest(padded, 0)
            largest = max(largest, maxima[r, whole])
            for i in range(rest):
                zero += padded[i] * _ZERO
        reference = _ZERO if largest == -_INFINITY else largest
        total, logarithms = _sum_and_logarithms(padded, 0, reference, _ONE, bits)
        total_t, _ = _sum_and_logarithms(padded, 0, reference, inverse, bits)
        for b in range(whole):
            of_block, logs = _sum_and_logarithms(row, b * BLOCK, reference, _ONE, bits)
            total, logarithms = total + np.float64(of_block), logarithms + np.float64(logs)
        if tempered:
            for b in range(whole):
                of_block, _ = _sum_and_logarithms(row, b * BLOCK, reference, inverse, bits)
                total_t += np.float64(of_block)
        parts[r, 0], parts[r, 1], parts[r, 2] = largest, total, total_t if tempered else total
        parts[r, 3], parts[r, 4] = logarithms, 0.0 if zero == _ZERO else 1.0


@_compiled("float32[::1]", "float32[:, ::1]", "float32[::1]", "float32")
def _block_sums(flat, stride, n, width, largest, found, logarithms, inverse):  # type: ignore[no-untyped-def]
    bits, padded, whole = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.float32), width // BLOCK
    for r in range(n):
        row = flat[r * stride : r * stride + width]
        rest = _padded(row, whole, padded)
        of_last, logs = _sum_and_logarithms(padded, 0, largest[r], inverse, bits)
        of_row = np.float64(logs)
        if rest:
            found[r, whole] = of_last
        for b in range(whole):
            found[r, b], logs = _sum_and_logarithms(row, b * BLOCK, largest[r], inverse, bits)
            of_row += np.float64(logs)
        logarithms[r] = of_row


@_inlined
def _gradient(z, start, reference, factor, factor_t, inverse, tempered, bits):  # type: ignore[no-untyped-def]
    """Writes the gradient over a block; see `write_gradient`."""
    power = bits.view(np.float32)
    for i in range(BLOCK):
        n, fraction, gone = _exp_parts(z[uintp(start + i)] - reference)
        bits[i] = (np.int32(n) + _BIAS) << _MANTISSA_BITS
        gradient = _ZERO if gone else fraction * power[i] * factor
        if tempered:
            n, fraction, gone = _exp_parts((z[uintp(start + i)] - reference) * inverse)
            bits[i] = (np.int32(n) + _BIAS) << _MANTISSA_BITS
            gradient += _ZERO if gone else fraction * power[i] * factor_t
        z[uintp(start + i)] = gradient


@_compiled("float32[::1]", "float32[::1]", "float32[::1]", "float32", "boolean")
def _write_gradient(flat, stride, n, width, largest, factor, factor_t, inverse, tempered):  # type: ignore[no-untyped-def]
    bits, padded, whole = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.float32), width // BLOCK
    for r in range(n):
        row = flat[r * stride : r * stride + width]
        rest = _padded(row, whole, padded)
        _gradient(padded, 0, largest[r], factor[r], factor_t[r], inverse, tempered, bits)
        for i in range(rest):
            row[whole * BLOCK + i] = padded[i]
        for b in range(whole):
            _gradient(row, b * BLOCK, largest[r], factor[r], factor_t[r], inverse, tempered, bits)
