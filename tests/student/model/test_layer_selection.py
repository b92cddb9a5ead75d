"""Students with some layers of a larger model: each layer computes what it did there.

The reference is the larger model with the other layers replaced by ones that pass the hidden states on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_heads import build
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pipeline.errors import ConfigError, ModelError
from pipeline.student.model.layer_selection import keep_layers, kept_layers, with_layers
from tiny_architectures import LAYERS, tiny_config

SLIDING = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]

# Model type, settings of its text part, and the list of its layers.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {}, "model.layers"),
    "several windows": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": SLIDING},
        "model.layers",
    ),
    "llama 4, some layers without rotation": ("llama4", {"no_rope_layers": [1, 0, 1, 0]}, "model.layers"),
    "inside text_config": ("gemma3", {"layer_types": SLIDING}, "model.language_model.layers"),
    "first_k_dense_replace": ("deepseek_v3", {"first_k_dense_replace": 1}, "model.layers"),
    "mlp_only_layers": ("qwen2_moe", {"mlp_only_layers": [0, 1]}, "model.layers"),
    "period that fits": ("jamba", {}, "model.layers"),
    "numbers per layer": ("granite_swa", {"layer_rope_theta": [10.0, 100.0, 1000.0, 10000.0]}, "model.layers"),
    "settings of one layer": ("gemma4_text", {"num_kv_shared_layers": 0}, "model.layers"),
    "embeddings per layer": ("gemma3n_text", {"num_kv_shared_layers": 0}, "model.layers"),
}


class PassedOn(nn.Module):
    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return hidden_states


def tiny(model_type: str, settings: dict[str, Any]) -> PreTrainedModel:
    config = tiny_config(model_type)
    text = config.get_text_config()
    changed = type(text).from_dict({**text.to_dict(), **settings})
    return build(changed if text is config else type(config).from_dict({**config.to_dict(), "text_config": changed}))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(3, 400, (2, 30), generator=torch.Generator().manual_seed(5))  # longer than every window
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_kept_layers_compute_what_they_did(name: str, tmp_path: Path) -> None:
    model_type, settings, layers = MODELS[name]
    model = tiny(model_type, settings)
    before = logits(model)
    smaller = keep_layers(model, 2)
    assert torch.equal(logits(model), before)  # it is left alone
    kept = kept_layers(LAYERS, 2)
    for place in range(LAYERS):
        if place not in kept:
            passed_on = PassedOn()
            # What a model asks its layers, besides the forward pass.
            vars(passed_on).update({n: v for n, v in vars(model.get_submodule(layers)[place]).items() if n[0] != "_"})
            model.get_submodule(layers)[place] = passed_on
    torch.testing.assert_close(logits(smaller), logits(model), rtol=1e-4, atol=1e-4)
    assert (logits(smaller) - before).abs().max() > 0.1

    smaller.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(again.eval()), logits(smaller))


def config_of(model_type: str, **settings: Any) -> PreTrainedConfig:
    config = tiny_config(model_type)
    return type(config).from_dict({**config.to_dict(), **settings})


@pytest.mark.parametrize(
    "model_type, settings, expected",
    [
        # Lists that have as many items as there are layers, and mean something else.
        ("falcon_h1", {"num_hidden_layers": 5, "ssm_multipliers": [1.0] * 5}, [1.0] * 5),
        ("mamba2", {"num_hidden_layers": 2, "time_step_limit": [0.0, 9.0]}, [0.0, 9.0]),
        # Numbers of layers.
        ("qwen2_moe", {"mlp_only_layers": [0, 1, 2, 3]}, [0, 1, 2]),
        ("qwen2_moe", {"mlp_only_layers": [1, 3]}, [2]),
        ("llama4_text", {"moe_layers": [1, 2]}, [1]),
        # One item per layer.
        ("llama4_text", {"no_rope_layers": [0, 1, 1, 0]}, [0, 1, 0]),
        ("granite_swa", {"layer_rope_theta": [10.0, 20.0, 30.0, 40.0]}, [10.0, 30.0, 40.0]),
        # How many at the beginning, and at the end.
        ("deepseek_v3", {"first_k_dense_replace": 2}, 1),
        ("glm4_moe", {"first_k_dense_replace": 3}, 2),
        ("gemma3n_text", {"num_kv_shared_layers": 1}, 1),
    ],
)  # fmt: skip
def test_settings_of_the_kept_layers(model_type: str, settings: dict[str, Any], expected: object) -> None:
    name, config = list(settings)[-1], config_of(model_type, **settings)
    keep = config.num_hidden_layers - 1  # of four layers 0, 2 and 3
    found = getattr(with_layers(config, keep), name)
    assert (list(found) if isinstance(found, list | tuple) else found) == expected
    assert getattr(config, name) == settings[name]  # the given configuration is left alone


@pytest.mark.parametrize(
    "model_type, settings, keep, expected",
    [
        ("jamba", {}, 3, "`student_layers` 3: .* layer 2 would become layer 1, which has a JambaAttentionDecoderLayer"),
        ("gpt_neox_japanese", {}, 1, "whose attention.use_bias is True instead of False"),
        ("rwkv", {}, 1, "RwkvForCausalLM cannot be built from these layers: "),
        ("gemma4_text", {"num_kv_shared_layers": 2}, 3, "cannot be built from these layers: The set of layer types"),
        ("olmo_hybrid", {}, 1, "cannot be built from these layers: .*"),  # its class wants both kinds of layers
        ("hrm_text", {}, 1, "found no list of"),
    ],
)
def test_layers_that_cannot_be_selected_are_refused(
    model_type: str, settings: dict[str, Any], keep: int, expected: str
) -> None:
    with pytest.raises(ModelError, match=expected) as caught:
        keep_layers(build(config_of(model_type, **settings)), keep)
    assert "\n" not in str(caught.value)


def test_layers_that_share_keys_and_values_share_those_of_a_kept_one() -> None:
    layers = {"layer_types": ["full_attention"] * LAYERS, "num_kv_shared_layers": 2}
    smaller = keep_layers(build(config_of("gemma3n_text", **layers)), 3)  # without layer 1, whose keys were shared
    assert smaller.config.num_kv_shared_layers == 2
    assert logits(smaller).isfinite().all()


def test_too_many_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="`student_layers` 5: the model has 4 layers"):
        keep_layers(build(tiny_config("gemma3")), 5)
