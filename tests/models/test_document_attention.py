"""Documents laid end to end have the states, the gradients and the attention that each has by itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from pipeline.errors import ConfigError, ModelError
from pipeline.models.head import Head, open_head
from pipeline.models.isolation import document_attention, shared_rows
from pipeline.models.isolation.document_attention import Documents, forget_documents
from pipeline.models.isolation.padding_free import padding_free, without_padding
from pipeline.models.isolation.shared_rows import check_packing
from pipeline.models.padding import pad_rows
from tiny_architectures import tiny_config

# Windows of 8 tokens: Mistral, Gemma 2 (soft caps besides), gpt-oss (sinks besides). The others attend to everything.
ARCHITECTURES = ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3", "gpt2"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LENGTHS = [[19, 1, 7], [3, 12], [30]]


@dataclass(frozen=True)
class Row:
    input_ids: np.ndarray
    segment_lengths: np.ndarray


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_attention, "QUERIES", 5)


def opened(architecture: str) -> Head:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture)).eval()
    return open_head(model, model.get_output_embeddings().weight.shape[0])


def some_rows(lengths: list[list[int]] = LENGTHS) -> list[Row]:
    rng = np.random.default_rng(0)
    return [Row(rng.integers(1, 400, sum(row)), np.array(row)) for row in lengths]


def alone(head: Head, rows: list[Row], layers: tuple[int, ...] = (1,)) -> tuple[torch.Tensor, torch.Tensor]:
    """The last states and those of a layer [N, D], each document by itself."""
    found = []
    for row in rows:
        for ids in np.split(row.input_ids, np.cumsum(row.segment_lengths)[:-1]):
            states, inner = head.states(layers, torch.from_numpy(ids)[None], torch.arange(len(ids))[None])
            found.append((states[0], inner[layers[0]][0]))
    last, first = (torch.cat(each) for each in zip(*found, strict=True))
    return last, first


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_and_gradients_are_those_of_each_document_alone(architecture: str) -> None:
    head, rows = opened(architecture), some_rows()
    expected, inner = alone(head, rows)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in head.model.named_parameters() if p.grad is not None}
    head.model.zero_grad()

    free = padding_free(head, 64)
    assert free is not None
    there = Documents.of_rows(rows)
    states, by_layer = free.states([1], *pad_rows(rows), documents=there)
    assert states.shape[:2] == (3, 30)
    torch.testing.assert_close(there.flat(states)[0], expected, **CLOSE)
    torch.testing.assert_close(there.flat(by_layer[1])[0], inner, **CLOSE)
    assert states.flatten(0, 1)[27:30].abs().max() == 0  # padding
    states.square().sum().backward()
    found = {name: p.grad for name, p in head.model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_activations_that_are_computed_again_know_the_documents(architecture: str) -> None:
    head, rows = opened(architecture), some_rows()
    free = padding_free(head, 64)
    assert free is not None
    found = []
    for recompute in (False, True):
        if recompute:
            head.model.gradient_checkpointing_enable()
            head.model.train()  # transformers recomputes in this mode only; nothing here has dropout
        head.model.zero_grad()
        free.hidden_states(*pad_rows(rows), documents=Documents.of_rows(rows)).square().sum().backward()
        found.append(head.model.get_input_embeddings().weight.grad.clone())
    torch.testing.assert_close(*found)


class Largest(TorchDispatchMode):
    """The most elements that any result has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return result


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_nothing_has_as_many_elements_as_a_mask(architecture: str) -> None:
    length = 1500
    head = opened(architecture)
    rows = some_rows([[length - 100, 100]])
    with torch.no_grad():
        free = padding_free(head, 64)
        assert free is not None
        with Largest() as without:
            free.hidden_states(*pad_rows(rows), documents=Documents.of_rows(rows))
        with Largest() as masked:
            head.hidden_states(*pad_rows(rows))
    assert masked.elements >= length**2
    assert without.elements < length**2 / 4


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_calls_without_documents_are_what_they_were(architecture: str) -> None:
    head = opened(architecture)
    before = head.model.config._attn_implementation
    ids = torch.arange(1, 41).view(2, 20)
    mask = (torch.arange(20) >= torch.tensor([[0], [6]])).long()  # padded on the left, as for generation
    with torch.no_grad():
        expected = head.model(input_ids=ids, attention_mask=mask).logits
        assert padding_free(head, 64) is not None
        assert torch.equal(head.model(input_ids=ids, attention_mask=mask).logits, expected)
    forget_documents(head.model)
    assert head.model.config._attn_implementation == before


@pytest.mark.parametrize("architecture", ["bloom", "llama4_text", "mamba", "qwen3_next"])
def test_models_that_cannot_are_found(architecture: str) -> None:
    """ALiBi of its own, chunks of attention, no attention, and linear attention that does not see a document end."""
    head = opened(architecture)
    before = head.model.config._attn_implementation
    cpu = torch.device("cpu")
    assert padding_free(head, 64) is None
    assert head.model.config._attn_implementation == before
    with pytest.raises(ConfigError, match="`padding_free`"):
        without_padding(head, 64, wanted=True, device=cpu)
    assert without_padding(head, 64, wanted=None, device=torch.device("cuda")) is head


@pytest.mark.parametrize("architecture", ["gpt_oss", "opt"])
def test_models_that_keep_documents_apart_in_no_other_way_may_pack(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = opened(architecture)
    with pytest.raises(ModelError, match="or attends to it"):
        check_packing(head.model, head, 32)
    free = padding_free(head, 32)
    assert free is not None
    check_packing(head.model, free, 32)

    def as_one(first: torch.Tensor, second: torch.Tensor) -> Documents:
        both = first.shape[1] + second.shape[1]
        return Documents(lengths=(both, both), starts=torch.tensor([0, both, 2 * both]), places=torch.arange(2 * both))

    monkeypatch.setattr(shared_rows, "_two_each", as_one)
    with pytest.raises(ModelError, match="or attends to it"):
        check_packing(head.model, free, 32)


def test_it_is_the_default_on_cuda_and_cpus() -> None:
    head = opened("llama")
    for wanted, device, free in (
        (None, "cpu", True),
        (None, "cuda", True),
        (None, "mps", False),
        (False, "cuda", False),
        (False, "cpu", False),
        (True, "mps", True),
    ):
        assert without_padding(head, 64, wanted=wanted, device=torch.device(device)).padding_free is free
