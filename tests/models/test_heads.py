"""How each architecture's head is run, that it gives the model's own logits, and which models are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from pipeline.errors import ModelError
from pipeline.models.head import Head, evaluating, open_head
from pipeline.models.isolation.shared_rows import check_packing

V, PADDED = 101, 108

SHAPE: dict[str, Any] = {
    "vocab_size": PADDED,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": PADDED, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}

LINEAR: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "gpt2": GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "qwen2-tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=False),
    "qwen3-tied": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
    "phi, bias": PhiConfig(**SHAPE),
    "gemma3, no capping": Gemma3TextConfig(**SHAPE, head_dim=16),
}
OWN: dict[str, PretrainedConfig] = {
    "gemma2, soft-capping": Gemma2Config(**SHAPE, head_dim=16),
    "gemma2, just initialised": Gemma2Config(**{**SHAPE, "initializer_range": 0.02}, head_dim=16),
    "cohere, logit_scale": CohereConfig(**SHAPE),
    "granite, logits_scaling": GraniteConfig(**SHAPE, logits_scaling=1.1),
}


def build(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    bias = model.get_output_embeddings().bias
    if bias is not None:
        torch.nn.init.normal_(bias)
    return model.eval()


def sample_ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def check_head(model: PreTrainedModel, head: Head) -> None:
    """Both ways to run the head give the model's own logits over the real vocabulary, for several rows at once."""
    ids = sample_ids()
    expected = model(input_ids=ids, use_cache=False).logits[..., :V]
    hidden = head.hidden_states(ids, torch.arange(ids.shape[1]).expand_as(ids)).flatten(0, 1)
    exact = {"rtol": 0.0, "atol": 8 * torch.finfo(expected.dtype).eps * expected.abs().max().item()}
    for found in (head.logits(hidden), head.own_logits(hidden)):
        assert found.shape == (ids.numel(), V) and found.dtype == expected.dtype
        torch.testing.assert_close(found, expected.flatten(0, 1), **exact)
    if head.linear:
        out = torch.full((40, V), torch.nan, dtype=expected.dtype)
        found = head.logits(hidden, out=out)
        assert found.data_ptr() == out.data_ptr()
        torch.testing.assert_close(found, expected.flatten(0, 1), **exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_linear_heads(name: str, dtype: torch.dtype) -> None:
    model = build(LINEAR[name], dtype)
    head = open_head(model, V)
    assert head.linear and head.vocab_size == V
    assert head.weight.shape[0] == PADDED
    assert (head.bias is not None) == ("bias" in name)
    check_head(model, head)
    check_packing(model, head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OWN)
def test_heads_that_are_not_linear(name: str, dtype: torch.dtype) -> None:
    """Also in bfloat16, where soft-capping changes a logit of 10 by less than a loose tolerance."""
    model = build(OWN[name], dtype)
    head = open_head(model, V)
    assert not head.linear
    check_head(model, head)
    check_packing(model, head)
    assert model._modules[model.base_model_prefix] is model.base_model  # put back


def test_a_scaled_head_is_not_linear() -> None:
    model = build(OWN["granite, logits_scaling"])
    hidden = torch.randn(3, 32)
    own, linear = (Head(model=model, linear=way, vocab_size=V).logits(hidden) for way in (False, True))
    torch.testing.assert_close(own * 1.1, linear, rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_the_models_own_head() -> None:
    model = build(OWN["gemma2, soft-capping"])
    head = open_head(model, V)
    hidden = torch.randn(3, 32, requires_grad=True)
    gradient, weight_gradient = torch.autograd.grad(head.own_logits(hidden).sum(), [hidden, head.weight])
    assert (gradient != 0).all() and (weight_gradient[:V] != 0).any() and (weight_gradient[V:] == 0).all()


def test_the_mode_of_the_model_is_restored() -> None:
    for training in (True, False):
        model = build(GPT2Config(**GPT2)).train(training)  # with dropout, which a probe must not see
        check_packing(model, open_head(model, V))
        assert model.training == training and model.lm_head.training == training
    with pytest.raises(RuntimeError), evaluating(model.train()):
        assert not model.training
        raise RuntimeError
    assert model.training


# ---- refused


def test_a_model_whose_logits_cannot_be_reproduced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(LINEAR["llama"])
    states = Head.hidden_states

    def scaled(head: Head, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return states(head, input_ids, position_ids) * 1.001

    monkeypatch.setattr(Head, "hidden_states", scaled)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: logits computed .* \(linear\), .* \(own\)"):
        open_head(model, V)


def test_a_vocabulary_larger_than_the_model_is_refused() -> None:
    model = build(LINEAR["llama"])
    with pytest.raises(ModelError, match="predicts 108 tokens, the vocabulary has 109"):
        open_head(model, PADDED + 1)
    with pytest.raises(ModelError, match="no output embeddings"):
        open_head(model.base_model, V)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_with_nan_or_infinity_are_reported(value: float) -> None:
    model = build(LINEAR["llama"])
    with torch.no_grad():
        model.model.norm.weight[3] = value
    with pytest.raises(ModelError, match="NaN or infinity"):
        open_head(model, V)


def test_a_model_with_a_recurrent_state_may_not_be_packed() -> None:
    model = build(MambaConfig(vocab_size=PADDED, hidden_size=32, num_hidden_layers=1, state_size=4))
    head = open_head(model, V)
    with pytest.raises(ModelError, match="or attends to it. Use `packing=False`"):
        check_packing(model, head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_leak_is_found_next_to_very_large_states(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real models have a few states of a hundred times the usual size; a tolerance relative to those hides a leak."""
    model = build(LINEAR["llama"], dtype)
    with torch.no_grad():
        model.model.norm.weight[0] = 30.0
    head = open_head(model, V)
    check_packing(model, head)
    states = Head.hidden_states

    def leaking(head: Head, input_ids: Tensor, position_ids: Tensor, **_: None) -> Tensor:
        hidden = states(head, input_ids, position_ids)
        return hidden + 0.03 * hidden.cumsum(1)

    monkeypatch.setattr(Head, "hidden_states", leaking)
    with pytest.raises(ModelError, match="or attends to it"):
        check_packing(model, head)


def test_position_ids_that_are_ignored_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents do not attend to each other, but positions continue those of the document before."""
    model = build(GPT2Config(**GPT2))
    head = open_head(model, V)
    decoder = model.transformer.forward

    def counting_on(position_ids: Tensor, **kwargs: Any) -> Any:
        segments = (position_ids == 0).cumsum(1) - 1
        return decoder(position_ids=position_ids + 7 * segments, **kwargs)

    monkeypatch.setattr(model.transformer, "forward", counting_on)
    with pytest.raises(ModelError, match="or attends to it"):
        check_packing(model, head)


@torch.no_grad()
def test_an_attention_mask_of_ones_would_let_documents_attend_to_each_other() -> None:
    """Why `hidden_states` passes no mask: with one, transformers ignores that position ids restart."""
    model = build(LINEAR["llama"])
    head = open_head(model, V)
    first, second = sample_ids(2, 6).split(1)
    positions = torch.arange(6).repeat(2)[None]
    packed = torch.cat([first, second], dim=1)
    alone = head.hidden_states(second, positions[:, :6])[0]
    ours = head.hidden_states(packed, positions)[0, 6:]
    with_mask = model.model(
        input_ids=packed, position_ids=positions, attention_mask=torch.ones_like(packed), use_cache=False
    )[0][0, 6:]
    torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-4)
    assert (with_mask - alone).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_token_may_amplify_rounding_errors_in_16_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(LINEAR["llama"], dtype)
    head, states = open_head(model, V), Head.hidden_states

    def noisy(head: Head, input_ids: Tensor, position_ids: Tensor, **_: None) -> Tensor:
        hidden = states(head, input_ids, position_ids).clone()
        hidden[:, -2] *= 1 + input_ids.shape[1] / 10  # depends on the length of the row, not on its tokens
        return hidden

    monkeypatch.setattr(Head, "hidden_states", noisy)
    if dtype == torch.bfloat16:
        check_packing(model, head)
        return
    with pytest.raises(ModelError, match="or attends to it"):
        check_packing(model, head)
