"""Each kernel against fp64, in every shape; what it moves; and when it is not used."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels_here import DEVICE, kernels_in_use, triton_kernels
from pipeline.models.devices import kernels
from pipeline.models.devices.kernels import TILE, check_kernels, kernels_for

BLOCK = 32
WIDTHS = [1, 2, 5, 32, 33, TILE - 1, TILE, 3 * TILE + 77]
SHAPES = [(width, torch.float32) for width in WIDTHS]
SHAPES += [(width, dtype) for width in (3, TILE + 1) for dtype in (torch.bfloat16, torch.float16)]
every_shape = pytest.mark.parametrize("width, dtype", SHAPES, ids=str)
HALF_STEP = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # the interpreter cuts to bfloat16


def logits_of(width: int, dtype: torch.dtype = torch.float32, rows: int = 3) -> Tensor:
    """Rows that are cut from wider ones, whose ends are louder than all the rest."""
    z = 4 * torch.randn(rows, width + 7, generator=torch.Generator().manual_seed(width))
    z[:, width:] = 1000.0
    return z.to(DEVICE, dtype)[:, :width]


def by_block(values: Tensor, fill: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, -values.shape[1] % BLOCK), value=fill).unflatten(1, (-1, BLOCK))


def close(found: Tensor, expected: Tensor, rtol: float = 2e-6) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=1e-6)


@every_shape
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_sums(width: int, dtype: torch.dtype, temperature: float) -> None:
    z = logits_of(width, dtype)
    found = triton_kernels.sums(z, temperature=temperature, block=BLOCK)
    x = z.double() - z.double().amax(dim=1, keepdim=True)
    assert torch.equal(found.largest, z.float().amax(dim=1))
    assert torch.equal(found.block_maxima, by_block(z, -torch.inf).amax(dim=2)) and found.block_maxima.dtype == dtype
    close(found.total, x.exp().sum(dim=1))
    close(found.tempered, (x / temperature).exp().sum(dim=1))
    close(found.surprise, -(x.exp() * x).sum(dim=1), rtol=1e-5)
    assert found.finite.all()


@pytest.mark.parametrize("width", [1, 33, TILE + 1])
def test_sums_relative_to_a_logit_that_is_not_in_the_row(width: int) -> None:
    z = logits_of(width)
    at_least = z.amax(dim=1) + torch.tensor([-1.0, 0.0, 3.0], device=DEVICE)
    found = triton_kernels.sums(z, temperature=2.0, at_least=at_least)
    largest = torch.maximum(z.amax(dim=1), at_least)
    x = (z - largest[:, None]).double()
    assert torch.equal(found.largest, largest) and found.block_maxima is None
    close(found.total, x.exp().sum(dim=1))
    close(found.tempered, (x / 2).exp().sum(dim=1))
    close(found.surprise, -(x.exp() * x).sum(dim=1), rtol=1e-5)


@every_shape
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_block_sums(width: int, dtype: torch.dtype, temperature: float) -> None:
    z = logits_of(width, dtype)
    largest = z.float().amax(dim=1)
    found, logarithms = triton_kernels.block_sums(z, largest, temperature=temperature, block=BLOCK)
    x = (z.double() - largest[:, None]) / temperature
    close(found, by_block(x.exp(), 0.0).sum(dim=2))
    close(logarithms, (x.exp() * x).sum(dim=1), rtol=1e-5)


@every_shape
@pytest.mark.parametrize("tempered", [False, True])
def test_gradient_in_place_and_beside(width: int, dtype: torch.dtype, tempered: bool) -> None:
    z = logits_of(width).contiguous()
    largest, factor = z.amax(dim=1), torch.tensor([0.25, -2.0, 0.0], device=DEVICE)
    x = (z - largest[:, None]).double()
    expected = x.exp() * factor[:, None] + (3 * (x / 2).exp() if tempered else 0.0)
    at_t = torch.full_like(factor, 3.0) if tempered else None
    out = z if dtype == z.dtype else torch.empty_like(z, dtype=dtype)
    triton_kernels.write_gradient(z, largest, factor, at_t, 2.0, out)
    close(out, expected, rtol=HALF_STEP[dtype])


def test_nothing_is_written_behind_the_end_of_a_row() -> None:
    wide = torch.full((3, TILE + 40), 7.0, device=DEVICE)
    z = wide[:, : TILE + 1]
    triton_kernels.write_gradient(z, z[:, 0].clone(), torch.ones(3, device=DEVICE), None, 1.0, z)
    assert (z == 1.0).all() and (wide[:, TILE + 1 :] == 7.0).all()


def test_no_rows() -> None:
    found = triton_kernels.sums(torch.empty(0, 100, device=DEVICE), block=BLOCK)
    assert found.total.shape == (0,) and found.block_maxima.shape == (0, 4)


@pytest.mark.parametrize("width", [3, TILE + 10])
def test_minus_infinity_is_a_token_without_mass(width: int) -> None:
    """One, a whole tile, and a whole row, whose sums are what the tokens outside of it say."""
    z = logits_of(width)
    z[0, 1] = -torch.inf
    z[1, 1:TILE] = -torch.inf
    z[2] = -torch.inf
    at_least = torch.full((3,), -1.0, device=DEVICE)
    found = triton_kernels.sums(z, temperature=2.0, at_least=at_least, block=BLOCK)
    x = (z - found.largest[:, None]).double()
    close(found.total, x.exp().sum(dim=1))
    close(found.tempered, (x / 2).exp().sum(dim=1))
    close(found.surprise, torch.special.entr(x.exp()).sum(dim=1), rtol=1e-5)
    assert not found.finite.any() and found.total[2] == 0.0
    blocks, logarithms = triton_kernels.block_sums(z, found.largest, temperature=1.0, block=BLOCK)
    close(blocks, by_block(x.exp(), 0.0).sum(dim=2))
    close(logarithms, -torch.special.entr(x.exp()).sum(dim=1), rtol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_logit_that_is_no_number_is_noticed(value: float) -> None:
    for place in (0, 50, TILE + 5):
        z = logits_of(TILE + 10)
        z[1, place] = value
        found = triton_kernels.sums(z)
        assert found.finite.tolist() == [True, False, True]
        assert found.total.isnan().tolist() == [False, True, False]


# ---- when they are used


def test_the_trial_passes() -> None:
    check_kernels(triton_kernels, DEVICE)


@pytest.mark.parametrize("name", ["sums", "block_sums", "write_gradient"])
def test_the_trial_finds_a_kernel_that_computes_something_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = getattr(triton_kernels, name)

    def wrong(*arguments: Any, **options: Any) -> Any:
        if name == "write_gradient":
            inner(*arguments, **options)
            return arguments[-1].mul_(1.02)
        first, *others = inner(*arguments, **options)
        return (first * 1.001, *others) if name == "block_sums" else kernels.RowSums(first * 1.001, *others)

    monkeypatch.setattr(triton_kernels, name, wrong)
    with pytest.raises(AssertionError):
        check_kernels(triton_kernels, DEVICE)


@pytest.fixture()
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kernels.kernels_on.cache_clear()
    yield torch.device("cuda", 5)
    kernels.kernels_on.cache_clear()


def test_kernels_that_fail_the_trial_are_not_used(
    a_gpu: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, and the log says why; the numbers then come from plain torch."""

    def fails(*_: Any) -> None:
        raise RuntimeError("ptxas not found\nsecond line")

    monkeypatch.setattr(kernels, "check_kernels", fails)
    with caplog.at_level(logging.WARNING, "distill"):
        assert kernels.kernels_on(a_gpu) is None and kernels.kernels_on(a_gpu) is None
    assert caplog.messages == [
        "Triton kernels are not used on cuda:5, plain torch is: RuntimeError: ptxas not found second line"
    ]
    monkeypatch.setattr(kernels, "check_kernels", lambda *_: None)
    kernels.kernels_on.cache_clear()
    assert kernels.kernels_on(a_gpu) is triton_kernels


def test_logits_that_the_kernels_do_not_take() -> None:
    z = torch.zeros(3, 40)
    with kernels_in_use():
        assert kernels_for(z) is kernels_for(z[:, :7]) is kernels_for(z.bfloat16()) is triton_kernels
        assert kernels_for(z.double()) is kernels_for(z.T) is kernels_for(z[:1].expand(3, 40)) is None


def test_a_cpu_takes_plain_torch() -> None:
    assert kernels.kernels_on(torch.device("cpu")) is None


# ---- what they move


@pytest.fixture()
def moved(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Bytes that the interpreter loads and stores."""
    from triton.runtime.interpreter import InterpreterBuilder

    found = SimpleNamespace(read=0, written=0)
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        found.read += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return load(self, pointers, mask, *others)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        found.written += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
        return store(self, pointers, value, mask, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_those_that_the_benchmarks_count(moved: SimpleNamespace, dtype: torch.dtype) -> None:
    from benchmarks.counted_kernels import CountedKernels

    counted = SimpleNamespace(read=0, written=0)

    def count(name: str, read: int, written: int) -> None:
        counted.read, counted.written = counted.read + read, counted.written + written

    z = logits_of(2 * TILE + 500, dtype)
    row, out = torch.ones(len(z)), torch.empty(z.shape, dtype=torch.bfloat16)
    for way in (triton_kernels, CountedKernels(count)):
        way.sums(z, block=BLOCK)
        way.sums(z, temperature=2.0)
        way.block_sums(z, row, temperature=1.0, block=BLOCK)
        way.write_gradient(z, row, row, None, 1.0, out)
        way.write_gradient(z, row, row, row, 2.0, out)
    assert (moved.read, moved.written) == (counted.read, counted.written)
    assert moved.read == pytest.approx(5 * z.numel() * z.element_size(), rel=0.01)
