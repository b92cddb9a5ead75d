"""Configurations and classes of published models that differ from a Llama's: labels, bodies, positions, causality.

`test_every_architecture.py` runs all causal language models of transformers through both stages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_heads import GPT2, V, build, check_head
from transformers import GPT2Config, PreTrainedModel, PreTrainedTokenizerFast

from architecture_sweep import build_teacher
from pipeline.errors import ConfigError, ModelError
from pipeline.models.devices.placement import check_split
from pipeline.models.head import Head, open_head
from pipeline.models.isolation.causality import check_causal
from pipeline.models.loading import config_fingerprint, load_model
from pipeline.models.objective import most_positions
from pipeline.student.model.initialization import load_student
from tiny_architectures import POSITIONS, tiny_config


def tiny(model_type: str) -> PreTrainedModel:
    return build(tiny_config(model_type))


# ---- fingerprints


def test_labels_of_a_classifier_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    """distilgpt2 is published with `id2label`, whose keys are integers once it is loaded."""
    plain = build(GPT2Config(**GPT2))
    plain.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert config_fingerprint(load_model(str(tmp_path)).config) == config_fingerprint(plain.config)


@pytest.mark.parametrize("model_type", ["mpt", "bart", "gemma4_text"])
def test_fingerprints_of_numbered_settings(model_type: str, tmp_path: Path) -> None:
    """Labels by default; settings of single layers, whose numbers are strings in the file."""
    model = tiny(model_type)
    model.save_pretrained(tmp_path)
    assert config_fingerprint(load_model(str(tmp_path)).config) == config_fingerprint(model.config)


def test_settings_of_one_layer_change_the_fingerprint() -> None:
    model = tiny("gemma4_text")
    before = config_fingerprint(model.config)
    model.config.per_layer_config = {3: {"head_dim": 24}}
    assert config_fingerprint(model.config) != before


# ---- the body and its positions


@pytest.mark.parametrize(
    "model_type, body",
    [
        ("llama", "model"),
        ("llama4", "model"),  # its class has `base_model_prefix` language_model
        ("llama4_text", "model"),
        ("opt", "model.decoder"),  # its forward pass goes past `model`
        ("bart", "model.decoder"),
        ("xlm", "transformer"),
        ("gemma3", "model"),
    ],
)
def test_the_body_is_what_the_forward_pass_calls(model_type: str, body: str) -> None:
    model = tiny(model_type)
    head = open_head(model, V)
    module = model.get_submodule(body)
    assert head.body_name == body and head.body is module
    check_head(model, head)
    assert model.get_submodule(body) is module  # put back after the head's own forward pass


def test_a_model_that_looks_up_its_embeddings_itself_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(ModelError, match="LlamaForCausalLM: found no module that turns tokens into hidden states"):
        model.get_input_embeddings = lambda: model.lm_head  # type: ignore[method-assign]
        open_head(model, V)


def test_a_model_that_needs_more_than_text_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot be run on text alone, .*inputs_embeds and shared_kv_states"):
        open_head(tiny("gemma4_unified_assistant"), V)
    with pytest.raises(ModelError, match="cannot be run on text alone, as body and vocabulary head .IndexError"):
        open_head(tiny("prophetnet"), V)


@pytest.mark.parametrize(
    "model_type, limit",
    [("llama", POSITIONS), ("gpt2", POSITIONS), ("xlnet", None), ("mamba", None), ("mpt", POSITIONS),
     ("whisper", POSITIONS), ("gemma3", POSITIONS), ("moshi", POSITIONS)],
)  # fmt: skip
def test_most_positions(model_type: str, limit: int | None) -> None:
    assert most_positions(tiny_config(model_type)) == limit


def test_heads_are_counted_in_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = tiny_config("gemma4_text")
    check_split("teacher", config)
    config.per_layer_config = {1: {"num_key_value_heads": 1}}
    with pytest.raises(ConfigError, match="`tensor_parallel`: teacher has 1 key-value heads, found 2 processes"):
        check_split("teacher", config)


def test_a_student_that_could_not_be_loaded_again_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Emu3 is loaded with the configuration of all its parts and saved with that of its text part."""
    build_teacher("emu3", tmp_path, tokenizer)
    load_model(str(tmp_path))  # as a teacher it will do
    with pytest.raises(ModelError, match="Emu3ForCausalLM is saved with the configuration of a emu3_text_model"):
        load_student(str(tmp_path), vocab_size=400, seed=0)


# ---- causality


def causal(model_type: str, **settings: Any) -> Head:
    config = tiny_config(model_type)
    config.update(settings)
    return open_head(build(config), V)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mamba", "opt", "recurrent_gemma", "xglm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_causal_models_pass(model_type: str, dtype: torch.dtype) -> None:
    check_causal(open_head(build(tiny_config(model_type), dtype), V))


@pytest.mark.parametrize("model_type, settings", [("bert", {"is_decoder": False}), ("xlnet", {}), ("cpmant", {})])
def test_a_model_that_sees_later_tokens_is_refused(model_type: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="the model sees the tokens that it would have to predict"):
        check_causal(causal(model_type, **settings))


def test_a_model_that_counts_positions_differently_is_refused() -> None:
    """A RoBERTa's begin at the id of its padding token + 1, whether it is causal or not."""
    with pytest.raises(ModelError, match="its positions do not begin at 0"):
        check_causal(causal("roberta", is_decoder=True))
