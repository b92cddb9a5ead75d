"""The states of a document do not depend on what shares its batch, also in models that switch at a length."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_heads import SHAPE, V, build
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    BigBirdConfig,
    BloomConfig,
    Gemma3TextConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    MptConfig,
    OPTConfig,
    Phi3Config,
    PhimoeConfig,
    PretrainedConfig,
    PreTrainedModel,
    XGLMConfig,
)

from pipeline.errors import ModelError
from pipeline.models import head as head_module
from pipeline.models.head import Head, open_head
from pipeline.models.isolation.length_limits import LengthLimit, document_lengths
from pipeline.models.isolation.shared_rows import check_packing, check_padding
from pipeline.models.padding import pad_rows, padding_mask
from tiny import LONGROPE

LIMIT = LONGROPE["original_max_position_embeddings"]
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}
LAYER_TYPES = ["sliding_attention", "full_attention"]
MSCALE = {"short_mscale": 1.0, "long_mscale": 1.5}

CAUSAL: dict[str, PretrainedConfig] = {
    "phi3, longrope": Phi3Config(
        **{**SHAPE, "max_position_embeddings": 128}, rope_parameters=LONGROPE, original_max_position_embeddings=LIMIT
    ),
    "llama, longrope": LlamaConfig(**{**SHAPE, "max_position_embeddings": 128}, rope_parameters=LONGROPE),
    "llama, dynamic": LlamaConfig(**{**SHAPE, "max_position_embeddings": LIMIT}, rope_parameters=DYNAMIC),
    "phimoe, scale": PhimoeConfig(**{**SHAPE, "max_position_embeddings": 128}, rope_parameters={**LONGROPE, **MSCALE}),
    "gemma3, some layers": Gemma3TextConfig(
        **{**SHAPE, "max_position_embeddings": LIMIT},
        head_dim=16,
        layer_types=LAYER_TYPES,
        sliding_window=8,
        rope_parameters={"sliding_attention": DEFAULT, "full_attention": DYNAMIC},
    ),
}
MASKED: dict[str, PretrainedConfig] = {
    "modernbert, some layers": ModernBertConfig(
        **{**SHAPE, "max_position_embeddings": LIMIT},
        layer_types=LAYER_TYPES,
        local_attention=16,
        rope_parameters={"sliding_attention": DEFAULT, "full_attention": DYNAMIC},
    ),
}

BATCHES = {
    "on both sides of the limit": [[20], [60], [LIMIT], [LIMIT + 1]],
    "short ones padded past it": [[28, 20, 20], [25], [30, 30]],
    "packed with long ones": [[60, 9, 31, LIMIT + 1], [5, 50, 47], [50]],
}


def rows_of(lengths: list[list[int]], seed: int = 0) -> list[Any]:
    """Rows of documents of these lengths."""
    random = np.random.default_rng(seed)
    return [
        SimpleNamespace(input_ids=random.integers(0, V, sum(row)), segment_lengths=np.array(row)) for row in lengths
    ]


def of_batch(head: Head, rows: list[Any]) -> list[Tensor]:
    """The states of every row [T, D], computed together."""
    hidden = head.hidden_states(*pad_rows(rows), padding_mask(rows))
    return [states[: len(row.input_ids)] for states, row in zip(hidden, rows, strict=True)]


def alone(model: PreTrainedModel, row: Any) -> Tensor:
    """The same of one row by the body's plain forward pass, with a fresh copy of the model for each document."""
    documents = np.split(row.input_ids, np.cumsum(row.segment_lengths)[:-1])
    bodies = [copy.deepcopy(model).base_model for _ in documents]
    return torch.cat([body(torch.from_numpy(d)[None])[0][0] for body, d in zip(bodies, documents, strict=True)])


@torch.no_grad()
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", CAUSAL)
def test_states_are_those_of_the_document_alone(name: str, lengths: list[list[int]]) -> None:
    model = build(CAUSAL[name])
    rows, head = rows_of(lengths), Head(model=copy.deepcopy(model), linear=True, vocab_size=V)
    assert head.reads_padding_mask
    for row, found in zip(rows, of_batch(head, rows), strict=True):
        torch.testing.assert_close(found, alone(model, row), rtol=0.0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", MASKED)
def test_states_of_masked_models_are_those_of_the_document_alone(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(MASKED[name], dtype=torch.float32).eval()
    rows = rows_of([[20], [60], [LIMIT], [LIMIT + 1]])
    head = Head(model=copy.deepcopy(model), linear=False, vocab_size=V, masked=True)
    for row, found in zip(rows, of_batch(head, rows), strict=True):
        torch.testing.assert_close(found, alone(model, row), rtol=0.0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama, dynamic", "gemma3, some layers"])
def test_the_order_of_batches_does_not_matter(name: str) -> None:
    """Frequencies that have grown for a long document stay, unless the next one is shorter than the limit."""
    model = build(CAUSAL[name])
    head = Head(model=copy.deepcopy(model), linear=True, vocab_size=V)
    for length in (50, LIMIT, 40, 60, 12, 50, LIMIT):
        (row,) = rows_of([[length]], seed=length)
        (found,) = of_batch(head, [row])
        torch.testing.assert_close(found, alone(model, row), rtol=0.0, atol=2e-5)


@torch.no_grad()
def test_a_document_alone_takes_the_models_own_values_bit_by_bit() -> None:
    for name, config in CAUSAL.items():
        model = build(config)
        for length in (20, 60):
            (row,) = rows_of([[length]])
            head = Head(model=copy.deepcopy(model), linear=True, vocab_size=V)
            assert torch.equal(of_batch(head, [row])[0], alone(model, row)), name


def test_hooks_are_gone_after_a_pass_and_other_models_get_none(monkeypatch: pytest.MonkeyPatch) -> None:
    head = open_head(build(CAUSAL["phi3, longrope"]), V)
    (limited,) = head.rotaries
    assert not limited.module._forward_hooks
    plain = open_head(build(LlamaConfig(**SHAPE)), V)
    assert plain.rotaries == () and not plain.reads_padding_mask and not plain.separates(20, 60)


def test_lengths_of_documents() -> None:
    rows = rows_of([[3, 2], [4], [1, 1, 1]])
    _, positions = pad_rows(rows)
    expected = [[3, 3, 3, 2, 2], [4, 4, 4, 4, 0], [1, 1, 1, 0, 0]]
    assert document_lengths(positions, padding_mask(rows)).tolist() == expected
    assert document_lengths(positions[:1]).tolist() == expected[:1]
    # One new token behind a key-value cache.
    assert document_lengths(torch.tensor([[7], [40]])).tolist() == [[8], [41]]


def test_what_a_limit_separates() -> None:
    switch, grows = LengthLimit(tokens=32), LengthLimit(tokens=32, every_length=True)
    for shorter, longer, switches, changes in ((8, 32, 0, 0), (32, 33, 1, 1), (33, 40, 0, 1), (40, 40, 0, 0)):
        assert switch.separates(shorter, longer) == switches and grows.separates(shorter, longer) == changes


# ---- probes


@pytest.mark.parametrize("name", ["phi3, longrope", "phimoe, scale"])
def test_probes_find_a_switch_that_is_not_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in code that comes with a model. Both documents of the probe are short, but one of them ends late."""
    model = build(CAUSAL[name])
    head = open_head(model, V)
    check_packing(model, head, 64)
    check_padding(model, head, 64)
    monkeypatch.setattr(head_module, "limited_rotaries", lambda _: ())
    head = open_head(model, V)
    check_packing(model, head, LIMIT)
    check_padding(model, head, LIMIT)
    with pytest.raises(ModelError, match="depends on the length of that document"):
        check_packing(model, head, 64)
    with pytest.raises(ModelError, match="Use `batch_size=1`"):
        check_padding(model, head, 64)


# ---- models without such a limit

LONGER = {**SHAPE, "max_position_embeddings": 128}
LLAMA4 = {
    **{**LONGER, "num_hidden_layers": 4, "intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 16},
    **{"attention_chunk_size": 16, "no_rope_layers": [1, 1, 1, 0], "floor_scale": 64, "attn_temperature_tuning": True},
}
UNLIMITED: dict[str, PretrainedConfig] = {
    "mistral, sliding window": MistralConfig(**LONGER, sliding_window=8),
    "gemma3, sliding window": Gemma3TextConfig(**LONGER, head_dim=16, sliding_window=8, layer_types=LAYER_TYPES),
    "opt, offset": OPTConfig(**LONGER, ffn_dim=48, word_embed_proj_dim=32),
    "xglm, table that grows": XGLMConfig(
        vocab_size=SHAPE["vocab_size"], d_model=32, ffn_dim=48, num_layers=2, attention_heads=2, pad_token_id=0
    ),
    "llama4, chunks and temperature": Llama4TextConfig(**LLAMA4),
    "bloom, alibi": BloomConfig(vocab_size=SHAPE["vocab_size"], hidden_size=32, n_layer=2, n_head=2),
    "mpt, alibi": MptConfig(vocab_size=SHAPE["vocab_size"], d_model=32, n_layers=2, n_heads=2, expansion_ratio=2),
}
NOT_PACKED = ("opt, offset", "xglm, table that grows", "bloom, alibi", "mpt, alibi")


@pytest.fixture(autouse=True)
def _body_of_a_llama4_of_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own prefix is that of the multimodal model."""
    monkeypatch.setattr(Llama4ForCausalLM, "base_model_prefix", "model")


@torch.no_grad()
@pytest.mark.parametrize("name", UNLIMITED)
def test_windows_tables_and_biases_of_other_models(name: str) -> None:
    model = build(UNLIMITED[name])
    head = Head(model=model, linear=True, vocab_size=V)
    assert not head.reads_padding_mask
    rows = rows_of([[20], [60], [3], [33]] if name in NOT_PACKED else [[20, 31, 9], [60], [5, 40], [9, 9, 9]])
    for row, found in zip(rows, of_batch(head, rows), strict=True):
        torch.testing.assert_close(found, alone(model, row), rtol=1e-5, atol=2e-5)
    if name in NOT_PACKED:
        with pytest.raises(ModelError, match="or attends to it"):
            check_packing(model, head, 64)


@torch.no_grad()
def test_llama4_may_be_packed_up_to_its_first_temperature() -> None:
    """It counts temperatures by the place in the row. At its second one a packed document differs from one alone."""
    model = build(UNLIMITED["llama4, chunks and temperature"])
    head = Head(model=model, linear=True, vocab_size=V)
    (row,) = rows_of([[40, 30]])
    (found,) = of_batch(head, [row])
    off = (found - alone(model, row)).abs().amax(dim=1)
    assert off[:63].max() < 2e-5 < 1e-3 < off[63:].min()
    check_packing(model, head, 63)
    with pytest.raises(ModelError, match="found rows of up to 64 tokens, expected at most 63"):
        check_packing(model, head, 64)
    model.config.attn_temperature_tuning = False
    check_packing(model, head, 64)


@torch.no_grad()
def test_bigbird_attends_to_every_token_at_any_length() -> None:
    """Beyond a length its blocks would depend on the padding. Full attention, for shorter rows, stays once it is on."""
    sizes = {"block_size": 4, "num_random_blocks": 1, "hidden_size": 32, "num_attention_heads": 2}
    more = {
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "vocab_size": SHAPE["vocab_size"],
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(BigBirdConfig(**sizes, **more), dtype=torch.float32).eval()
    rows = rows_of([[20], [70], [37]])
    assert max(off(model, rows)) > 0.1
    open_head(model, V, masked=True)
    assert max(off(model, rows)) < 2e-5


def off(model: PreTrainedModel, rows: list[Any]) -> list[float]:
    """By how much the states of masked rows differ in a batch from those of each alone."""
    head = Head(model=copy.deepcopy(model), linear=False, vocab_size=V, masked=True)
    found = zip(of_batch(head, rows), (alone(model, row) for row in rows), strict=True)
    return [(together - expected).abs().max().item() for together, expected in found]
