"""TF32: for training alone, and never for the comparisons of a start-up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.import_utils import enable_tf32

from pipeline.models.devices import precision
from pipeline.models.devices.compilation import CompiledLayers
from pipeline.models.devices.precision import full_float32, precision_restored
from pipeline.models.head import Head, open_head
from pipeline.models.head_export import export_head
from pipeline.models.isolation.causality import check_causal
from pipeline.models.isolation.padding_free import padding_free
from pipeline.models.isolation.shared_rows import check_packing, check_padding
from pipeline.teacher.engines.decoding import check_decoding

by_operation = pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9")


def of_products() -> str:
    """The precision of float32 products on CUDA, "none" by default."""
    if hasattr(torch.backends, "fp32_precision"):
        return str(torch.backends.cuda.matmul.fp32_precision)
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "none"


@pytest.fixture
def tf32() -> Iterator[None]:
    """As in training on Ampere and later."""
    with precision_restored():
        enable_tf32(True)
        yield


@pytest.fixture
def head(teacher_dir: Path) -> Head:
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32).eval()
    return open_head(model, model.config.vocab_size)


PROBES: dict[str, Callable[[Head], object]] = {
    "head": lambda head: open_head(head.model, head.vocab_size),
    "layers": lambda head: head.layers(),
    "exported head": export_head,
    "causality": check_causal,
    "packing": lambda head: check_packing(head.model, head, 32),
    "padding": lambda head: check_padding(head.model, head, 32),
    "padding-free": lambda head: padding_free(head, 32),
    "decoding": lambda head: check_decoding(head, padding=True),
}


@pytest.mark.parametrize("name", PROBES)
def test_probes_compute_without_tf32(tf32: None, head: Head, name: str) -> None:
    seen = []
    hook = head.body.register_forward_hook(lambda *_: seen.append((of_products(), torch.is_grad_enabled())))
    PROBES[name](head)
    hook.remove()
    assert set(seen) == {("ieee" if precision._by_operation() else "none", False)}
    assert of_products() == "tf32"


@pytest.mark.long
@by_operation
def test_compiled_layers_are_compared_without_tf32_and_then_use_it(tf32: None, head: Head) -> None:
    seen = []
    hook = head.body.register_forward_hook(lambda *_: seen.append(of_products()))
    CompiledLayers(head).close()
    hook.remove()
    assert set(seen) == {"ieee"}
    assert of_products() == "tf32"


def rounded_to_tf32(values: Tensor) -> Tensor:
    """To nearest, with 10 bits of mantissa."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def test_a_model_that_tf32_would_have_refused_passes(tf32: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sums in another order cross a boundary of TF32, states differ by a hundred times what float32 explains."""
    shape = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=512, vocab_size=512)).eval()
    head = Head(model=model, linear=True, vocab_size=512)
    plain = nn.functional.linear

    def as_on_ampere(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if of_products() != "tf32":
            return plain(x, weight, bias)
        return plain(rounded_to_tf32(x), rounded_to_tf32(weight), bias)

    monkeypatch.setattr(nn.functional, "linear", as_on_ampere)
    assert open_head(model, 512).linear
    check_causal(head)
    check_packing(model, head, 64)
    assert padding_free(head, 64) is not None


@by_operation
def test_what_compiling_writes_is_undone() -> None:
    with precision_restored():
        enable_tf32(True)
        torch.compile(lambda x: torch.relu(x) + 1, backend="eager")(torch.ones(3, 3))
    assert of_products() == "none"
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("new", [pytest.param(True, marks=by_operation), False])
@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_the_older_settings_stay_as_they_were(before: str, new: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with precision_restored():
        torch.set_float32_matmul_precision(before)
        was = of_products()
        monkeypatch.setattr(precision, "_by_operation", lambda: new)
        with full_float32():
            assert of_products() in ("ieee", "none")
            assert not new or torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        monkeypatch.undo()
        assert (of_products(), torch.get_float32_matmul_precision()) == (was, before)
        assert torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")


def test_a_second_run_of_a_process_has_tf32_too() -> None:
    for _ in range(2):
        with precision_restored():
            enable_tf32(True)
            assert of_products() == "tf32"
        assert of_products() == "none"


@by_operation
def test_what_was_inherited_is_inherited_again() -> None:
    matmul = torch.backends.cuda.matmul
    with precision_restored():
        torch.backends.fp32_precision = "tf32"
        with full_float32():
            assert matmul.fp32_precision == "ieee"
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"  # torch's own default
