"""Compiled layers compute what plain ones do; how often they are compiled, and where a graph ends."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from pipeline.errors import ConfigError
from pipeline.models.devices import compilation
from pipeline.models.devices.compilation import CompiledLayers
from pipeline.models.head import Head, open_head
from pipeline.models.isolation.document_attention import Documents
from pipeline.models.isolation.padding_free import padding_free
from pipeline.models.padding import pad_rows
from tiny_architectures import tiny_config

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
BATCHES = [[[19, 1, 7], [3, 12]], [[5, 6], [2], [30, 1]], [[4, 4, 4], [8]], [[11, 2], [3, 3], [17]]]
"""Lengths of the documents of each row."""


@dataclass(frozen=True)
class Row:
    input_ids: np.ndarray
    segment_lengths: np.ndarray


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[CompileCounter]:
    """Counts the graphs that a compiler would get, and runs them as they are."""
    caplog.set_level(logging.WARNING, "torch.__trace")  # else torch writes a trace for the log of the test
    counter = CompileCounter()
    monkeypatch.setattr(compilation, "BACKEND", counter)
    torch.compiler.reset()
    counters.clear()
    yield counter
    torch.compiler.reset()


def opened(architecture: str, *, free: bool = False) -> Head:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture)).eval()
    head = open_head(model, model.get_output_embeddings().weight.shape[0])
    found = padding_free(head, 64) if free else head
    assert found is not None
    return found


def states(head: Head, lengths: list[list[int]]) -> Tensor:
    rng = np.random.default_rng(0)
    rows = [Row(rng.integers(1, 400, sum(row)), np.array(row)) for row in lengths]
    return head.hidden_states(*pad_rows(rows), documents=Documents.of_rows(rows) if head.padding_free else None)


def gradients(head: Head, lengths: list[list[int]]) -> list[Tensor]:
    """States, and gradients of all weights that have one."""
    head.model.zero_grad()
    found = states(head, lengths)
    # Not Σ state²: it is constant behind a norm, and its gradients are rounding errors.
    (found * torch.linspace(-1.0, 1.0, found.shape[-1])).sum().backward()
    return [found.detach(), *(p.grad.clone() for p in head.model.parameters() if p.grad is not None)]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))


@pytest.mark.long
@pytest.mark.parametrize(
    "architecture, way, without, with_gradients, breaks",
    [
        ("llama", "padded", 2, 3, 0),  # without a mask; the trial was with one
        ("llama", "packed", 1, 2, 0),
        ("llama", "padding-free", 5, 10, 1),
        ("gemma2", "packed", 1, 2, 0),
        ("gemma2", "padding-free", 5, 10, 1),
        ("qwen3_moe", "packed", 1, 2, 0),
    ],
)
def test_graphs_do_not_depend_on_lengths(
    graphs: CompileCounter, architecture: str, way: str, without: int, with_gradients: int, breaks: int
) -> None:
    """What all layers and batches together are compiled to: one graph, which attention of documents cuts to five."""
    head = opened(architecture, free=way == "padding-free")
    batches = [[[sum(row)] for row in batch] for batch in BATCHES] if way == "padded" else BATCHES
    expected = [gradients(head, batch) for batch in batches]
    with closing(CompiledLayers(head)):
        with torch.no_grad():
            found = [states(head, batch) for batch in batches]
        assert graphs.frame_count == without
        for state, (plain, *_) in zip(found, expected, strict=True):
            torch.testing.assert_close(state, plain, **CLOSE)
        for batch, plain in zip(batches, expected, strict=True):
            same(gradients(head, batch), plain)
        assert graphs.frame_count == with_gradients
        assert len(counters["graph_break"]) == breaks


@pytest.mark.long
def test_layers_are_the_models_own_again(graphs: CompileCounter) -> None:
    head = opened("llama")
    keys, layers = list(head.model.state_dict()), list(head.model.model.layers)
    compiled = CompiledLayers(head)
    assert graphs.frame_count == 1 and all("forward" in vars(layer) for layer in layers)
    assert list(head.model.state_dict()) == keys
    compiled.close()
    assert not any("forward" in vars(layer) for layer in layers)


@pytest.mark.long
def test_generating_is_not_compiled(graphs: CompileCounter) -> None:
    head = opened("llama")
    ids = torch.arange(1, 6)[None]
    expected = head.model.generate(ids, max_new_tokens=5, do_sample=False)
    with closing(CompiledLayers(head)):
        before = graphs.frame_count
        assert torch.equal(head.model.generate(ids, max_new_tokens=5, do_sample=False), expected)
        assert graphs.frame_count == before


def _fails(*_: Any) -> Any:
    raise OSError("no compiler here")


def _another_result(graph: torch.fx.GraphModule, _: Any) -> Any:
    return lambda *inputs: [1.01 * each for each in graph(*inputs)]


@pytest.mark.parametrize("backend, reason", [(_fails, "no compiler here"), (_another_result, "times what rounding")])
def test_what_does_not_compile_or_computes_something_else_is_refused(
    graphs: CompileCounter, monkeypatch: pytest.MonkeyPatch, backend: Any, reason: str
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", backend)
    head = opened("llama")
    with pytest.raises(ConfigError, match=f"`compile`.*{reason}"):
        CompiledLayers(head)
    assert not any("forward" in vars(layer) for layer in head.model.model.layers)


def test_layers_with_hooks_of_another_library_are_refused(graphs: CompileCounter) -> None:
    head = opened("llama")
    layer = head.model.model.layers[0]
    layer.forward = layer.forward  # as accelerate does for a model on several devices
    with pytest.raises(ConfigError, match="`compile`"):
        CompiledLayers(head)


by_the_compiler_of_torch = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)


@pytest.mark.slow
@by_the_compiler_of_torch
def test_gradients_of_compiled_code() -> None:
    head = opened("llama")
    expected = [gradients(head, batch) for batch in BATCHES[:2]]
    with closing(CompiledLayers(head)):
        for batch, plain in zip(BATCHES, expected, strict=False):
            same(gradients(head, batch), plain)


@pytest.mark.slow
@by_the_compiler_of_torch
@torch.no_grad()  # each graph costs seconds
def test_states_of_code_compiled_around_attention() -> None:
    head = opened("gemma2", free=True)
    expected = [states(head, batch) for batch in BATCHES[:2]]
    with closing(CompiledLayers(head)):
        for batch, plain in zip(BATCHES, expected, strict=False):
            same([states(head, batch)], [plain])
