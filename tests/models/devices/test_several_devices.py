"""Layers on several GPUs, as a device map puts them, with devices that hold no values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer

from pipeline.models.isolation import document_attention
from pipeline.models.isolation.length_limits import LengthLimit, _embed_by_document
from pipeline.teacher.engines.decoding import Decoding


@pytest.fixture
def gpus() -> Iterator[None]:
    """Tensors on cuda:0 and cuda:1 that know their shapes, and do not mix."""
    with FakeTensorMode():
        yield


class OnTheSecondGpu(nn.Module):
    """A rotary embedding, called with positions of the first one, as accelerate's hooks allow."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids.to("cuda:1").unsqueeze(-1).expand(-1, -1, 4).float()
        return angles.cos(), angles.sin()


def test_a_rotary_embedding_with_a_limit_on_another_device(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LengthLimit, "kinds", lambda self, lengths: [(lengths > self.tokens, 0)])
    rotary, positions = OnTheSecondGpu(), torch.zeros((2, 5), dtype=torch.int64, device="cuda:0")
    limits, given = {None: LengthLimit(tokens=4)}, {"x": positions, "position_ids": positions}
    output = rotary(**given)
    found = _embed_by_document(rotary, (), given, output, limits=limits, lengths=positions + 5)
    assert [each.device for each in found] == [torch.device("cuda:1")] * 2


def test_a_cache_whose_layers_are_on_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA refuses an index of another GPU."""
    select = DynamicLayer.batch_select_indices
    moved = []

    def strict(layer: Any, index: Tensor) -> None:
        assert index.device == layer.keys.device
        moved.append(index)
        select(layer, index)

    monkeypatch.setattr(DynamicLayer, "batch_select_indices", strict)
    cache = DynamicCache(config=LlamaConfig(num_hidden_layers=4, hidden_size=8, num_attention_heads=2))
    for layer, device in enumerate(("cpu", "cpu", "meta", "meta")):
        states = torch.arange(24.0, device=device).view(3, 2, 1, 4)
        cache.update(states, states, layer)
    decoding = object.__new__(Decoding)
    grown = torch.arange(3)[:, None]
    vars(decoding).update(_cache=cache, _lengths=[1, 2, 3], _input_ids=grown, _mask=grown, hidden=grown)
    decoding.select([2, 0])
    assert decoding._lengths == [3, 1]
    assert torch.equal(cache.layers[1].keys, torch.arange(24.0).view(3, 2, 1, 4)[[2, 0]])
    assert cache.layers[3].keys.shape == (2, 2, 1, 4)
    assert moved[0] is moved[1] and moved[2] is moved[3]  # one upload for each device


@pytest.mark.parametrize(
    ("device", "flash", "repeated"), [("cuda", True, False), ("cuda", False, True), ("cpu", False, False)]
)
def test_grouped_heads_are_given_to_kernels_that_take_them(
    gpus: None, device: str, flash: bool, repeated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA without flash attention, grouped heads would get a tensor of H·T² scores."""
    asked, seen = [], []

    def compute(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.append((key.shape[1], value.shape[1], options["enable_gqa"]))
        return query

    def takes(params: Any) -> bool:
        asked.append((params.enable_gqa, params.is_causal, params.dropout))
        return flash

    monkeypatch.setattr(document_attention, "scaled_dot_product_attention", compute)
    monkeypatch.setattr(document_attention, "can_use_flash_attention", takes)
    heads = [torch.empty(count, 7, 16, device=device) for count in (8, 2, 2)]
    options = {"scale": 1.0, "dropout": 0.1, "window": None, "softcap": None, "sinks": None}
    assert document_attention._document(*heads, **options).shape == (8, 7, 16)
    assert seen == [(8, 8, False) if repeated else (2, 2, True)]
    assert asked == [(True, True, 0.1)] * (device == "cuda")
