"""Products with wide results: the way a GPU takes, emulated on a CPU, against the plain one and against fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dense import random_targets
from head_sums import fused_sums
from pipeline.models.devices import products
from textbook import relative_errors

aten = torch.ops.aten
N, D, V, K = 900, 24, 307, 9


class WideSums(TorchDispatchMode):
    """`mm.dtype_out` and `addmm.dtype_out` as CUDA defines them: float32 sums of bfloat16 factors, not rounded."""

    def __init__(self) -> None:
        super().__init__()
        if not hasattr(aten.addmm, "dtype_out"):
            pytest.skip("torch 2.8 and later have it")
        self.addmm_takes_narrow_factors = True  # since torch 2.10
        self.calls = {aten.mm: 0, aten.addmm: 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet not in self.calls or "dtype" not in func._overloadname:
            return func(*args, **kwargs)
        self.calls[packet] += 1
        *total, a, b, dtype = args
        if total and not self.addmm_takes_narrow_factors:
            raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")
        assert a.dtype == b.dtype == torch.bfloat16 and dtype == torch.float32
        found = a.float() @ b.float()
        out = kwargs.get("out", torch.empty_like(found))
        assert out.dtype == dtype
        return out.copy_(total[0] + found if total else found)

    def reset(self) -> None:
        self.calls = dict.fromkeys(self.calls, 0)


@pytest.fixture()
def wide(monkeypatch: pytest.MonkeyPatch) -> Iterator[WideSums]:
    monkeypatch.setattr(products, "writes_wide_sums", lambda a, out: out.dtype == torch.float32 != a.dtype)
    products.adds_wide_sums.cache_clear()
    with WideSums() as mode:
        yield mode
    products.adds_wide_sums.cache_clear()


def factors(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*s, generator=generator).to(dtype) for s in ((40, 70), (70, 30)))  # type: ignore[return-value]


def test_wide_sums_are_those_of_float32_factors(wide: WideSums) -> None:
    a, b = factors(torch.bfloat16)
    out, total = torch.empty(40, 30), torch.ones(40, 30)
    assert products.product(a, b, out) is out
    products.add_product(total, a, b)
    torch.testing.assert_close(out, a.float() @ b.float())
    torch.testing.assert_close(total, out + 1)
    assert wide.calls == {aten.mm: 1, aten.addmm: 2}  # the trial, and the sum
    wide.reset()
    products.add_product(total, a, b)
    assert wide.calls == {aten.mm: 0, aten.addmm: 1}


def test_sums_of_a_torch_whose_addmm_takes_no_narrow_factors(wide: WideSums, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.10. They are not rounded to bfloat16 either, and the refusal is met once."""
    monkeypatch.setattr(products, "ROWS", 16)
    wide.addmm_takes_narrow_factors = False
    a, b = factors(torch.bfloat16)
    total = torch.ones(40, 30)
    for times in (1, 2):
        products.add_product(total, a, b)
        torch.testing.assert_close(total, 1 + times * (a.float() @ b.float()))
    assert wide.calls == {aten.mm: 2 * 3, aten.addmm: 1}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2**-8), (torch.float32, 1e-6), (torch.float64, 1e-15)])
def test_plain_way_rounds_to_the_dtype_of_the_factors(dtype: torch.dtype, bound: float) -> None:
    a, b = factors(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    out, total = torch.empty(40, 30, dtype=wide), torch.ones(40, 30, dtype=wide)
    products.product(a, b, out)
    products.add_product(total, a, b)
    truth = a.double() @ b.double()
    assert max(relative_errors([out, total - 1], [truth, truth])) < bound


def sums(dtype: torch.dtype, chunk_size: int) -> list[Tensor]:
    """Loss and gradients of hidden states and weight, autocast to bfloat16 if `dtype` is."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, D, generator=generator).bfloat16()
    weight = (0.5 * torch.randn(V, D, generator=generator)).bfloat16()
    leaves = [
        x.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_() for x in (hidden, weight)
    ]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = fused_sums(
            *leaves, None, random_targets(N, V, K), scale=1 / N, kd_weight=0.5, chunk_size=chunk_size
        ).loss
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def test_gradients_are_nearer_to_those_in_float64_than_the_plain_ones(wide: WideSums, monkeypatch: Any) -> None:
    truth = sums(torch.float64, 64)
    found = relative_errors(sums(torch.bfloat16, 64), truth)
    chunks = -(-int(_loss_tokens()) // 64)
    assert wide.calls == {aten.mm: chunks, aten.addmm: chunks + 1}  # with the trial
    monkeypatch.setattr(products, "writes_wide_sums", lambda a, out: False)
    plain = relative_errors(sums(torch.bfloat16, 64), truth)
    exact = relative_errors(sums(torch.float32, 64), truth)
    assert found[2] < plain[2] and found[1] <= plain[1]  # of the weight; of the hidden states
    assert max(exact) < 1e-5


def _loss_tokens() -> Tensor:
    return random_targets(N, V, K).loss_mask.sum()
