"""Pruned students: the least active parts are removed, and the remaining ones compute what they did before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

import cache_format as cf
from pipeline.errors import ConfigError, ModelError
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.held_out import evaluate
from pipeline.student.data.dataset import CacheDataset
from pipeline.student.model.initialization import load_student
from pipeline.student.model.pruning import CALIBRATION_ROWS, SUPPORTED, Sizes, calibration_batches, prune, resized
from runs import build_cache, distance, train, weights
from tiny import tiny_llama

CLASSES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
WIDTH, NEURONS, HEADS, PAIRS, DIM, LAYERS = 24, 40, 6, 3, 4, 3


@pytest.fixture(scope="module")
def cache(teacher_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("pruning") / "cache", teacher_dir, text_file)


def random_model(kind: str, tie: bool = False, **more: Any) -> PreTrainedModel:
    if kind != "qwen2":  # has no head_dim: it is derived from other sizes, and may not change when they shrink
        more["head_dim"] = DIM
    config = CLASSES[kind](
        vocab_size=400,
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=PAIRS,
        tie_word_embeddings=tie,
        max_position_embeddings=64,
        initializer_range=0.3,
        **more,
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # they are initialised to zeros and ones
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(400, (1, 20 + i), generator=generator) for i in range(count)]
    return [{"input_ids": i, "position_ids": torch.arange(i.shape[1])[None]} for i in ids]


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=torch.arange(30)[None], use_cache=False).logits


# -- kept parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SUPPORTED)
def test_keeping_all_parts_gives_the_same_model(kind: str):
    model = random_model(kind)
    same = prune(model, Sizes(width=WIDTH, intermediate=NEURONS, heads=HEADS), batches())
    assert torch.equal(logits(same), logits(model))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", SUPPORTED)
def test_inactive_parts_are_removed_and_logits_stay(kind: str, tie: bool):
    biases = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    model = random_model(kind, tie, rms_norm_eps=1e-12, **biases)  # the norms' correction ignores eps
    generator = torch.Generator().manual_seed(3)
    channels = torch.randperm(WIDTH, generator=generator)[:4]
    with torch.no_grad():
        # A channel is inactive if nothing writes to it: embeddings, output projections and their biases.
        model.model.embed_tokens.weight[:, channels] = 0
        for layer in model.model.layers:
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                module.weight[channels] = 0
                if module.bias is not None:
                    module.bias[channels] = 0
            neurons = torch.randperm(NEURONS, generator=generator)[:15]
            layer.mlp.up_proj.weight[neurons] = 0
            if layer.mlp.up_proj.bias is not None:
                layer.mlp.up_proj.bias[neurons] = 0
            pair = int(torch.randint(PAIRS, (1,), generator=generator))
            dead = slice(pair * DIM, (pair + 1) * DIM)
            layer.self_attn.v_proj.weight[dead] = 0
            if layer.self_attn.v_proj.bias is not None:
                layer.self_attn.v_proj.bias[dead] = 0
    smaller = prune(model, Sizes(width=WIDTH - 4, intermediate=NEURONS - 15, heads=HEADS - 2), batches())
    assert smaller.config.hidden_size == 20 and smaller.config.intermediate_size == 25
    assert (smaller.config.num_attention_heads, smaller.config.num_key_value_heads) == (4, 2)
    assert smaller.config.head_dim == DIM and smaller.model.layers[0].self_attn.o_proj.weight.shape == (20, 16)
    assert torch.allclose(logits(smaller), logits(model), rtol=1e-4, atol=1e-4)
    assert (smaller.lm_head.weight is smaller.model.embed_tokens.weight) == tie


@torch.no_grad()
def test_activity_equals_one_layer_computed_by_hand():
    """Every step from the weights, without hooks."""
    model = random_model("llama")
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    first = {name.removeprefix("model.layers.0."): t for name, t in state.items() if "layers.0." in name}
    neurons, heads = torch.zeros(NEURONS, dtype=torch.float64), torch.zeros(HEADS, dtype=torch.float64)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x / (x.square().mean(dim=-1, keepdim=True) + model.config.rms_norm_eps).sqrt()

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [T, heads, DIM]
        angles = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
        cos, sin = (f(torch.cat([angles, angles], dim=1).double())[:, None] for f in (torch.cos, torch.sin))
        half = torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], dim=-1)
        return x * cos + half * sin

    for batch in batches():
        x = state["model.embed_tokens.weight"][batch["input_ids"][0]]
        h = norm(x, first["input_layernorm.weight"])
        q, k, v = (
            (h @ first[f"self_attn.{n}_proj.weight"].T).unflatten(1, (-1, DIM)) for n in ("q", "k", "v")
        )  # fmt: skip
        q, k = rotate(q), rotate(k)
        k, v = (each.repeat_interleave(HEADS // PAIRS, dim=1) for each in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / DIM**0.5
        scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("hts,shd->thd", scores.softmax(dim=-1), v)
        heads += mixed.norm(dim=2).sum(dim=0)
        x = x + mixed.flatten(1) @ first["self_attn.o_proj.weight"].T
        h = norm(x, first["post_attention_layernorm.weight"])
        gate = h @ first["mlp.gate_proj.weight"].T
        neurons += (torch.nn.functional.silu(gate) * (h @ first["mlp.up_proj.weight"].T)).abs().sum(dim=0)

    smaller = prune(model, Sizes(intermediate=10, heads=2), batches()).model.layers[0]
    kept = sorted(neurons.topk(10).indices.tolist())
    assert torch.equal(smaller.mlp.gate_proj.weight, model.model.layers[0].mlp.gate_proj.weight[kept])
    pair = int(heads.view(PAIRS, -1).sum(dim=1).argmax())
    assert torch.equal(
        smaller.self_attn.k_proj.weight, model.model.layers[0].self_attn.k_proj.weight[pair * DIM : (pair + 1) * DIM]
    )


@torch.no_grad()
def test_kept_channels_have_the_largest_norm_outputs():
    model = random_model("qwen2")
    seen = torch.zeros(WIDTH, dtype=torch.float64)
    for batch in batches():
        states = model.model(**batch, output_hidden_states=True, use_cache=False).hidden_states
        # The output of the final norm, then of both norms of each layer.
        seen += states[-1].double().abs().sum(dim=(0, 1))
        for layer, entering in zip(model.model.layers, states[:-1], strict=True):
            attended = layer.input_layernorm(entering)
            seen += attended.double().abs().sum(dim=(0, 1))
            inside = layer.self_attn(
                hidden_states=attended,
                position_embeddings=model.model.rotary_emb(entering, batch["position_ids"]),
                attention_mask=None,
            )[0]
            seen += layer.post_attention_layernorm(entering + inside).double().abs().sum(dim=(0, 1))
    smaller = prune(model, Sizes(width=12), batches())
    kept = sorted(seen.topk(12).indices.tolist())
    assert torch.equal(smaller.model.embed_tokens.weight, model.model.embed_tokens.weight[:, kept])
    assert torch.equal(smaller.lm_head.weight, model.lm_head.weight[:, kept])


def test_pruning_by_activity_is_better_than_by_index():
    model = random_model("llama")
    target = logits(model).log_softmax(dim=-1)

    def far(smaller: PreTrainedModel) -> float:
        return float((target.exp() * (target - logits(smaller).log_softmax(dim=-1))).sum(dim=-1).mean())

    sizes = Sizes(intermediate=28)
    by_activation = prune(model, sizes, batches())
    by_place = prune(model, sizes, batches())
    with torch.no_grad():
        for layer, whole in zip(by_place.model.layers, model.model.layers, strict=True):
            layer.mlp.gate_proj.weight.copy_(whole.mlp.gate_proj.weight[:28])
            layer.mlp.up_proj.weight.copy_(whole.mlp.up_proj.weight[:28])
            layer.mlp.down_proj.weight.copy_(whole.mlp.down_proj.weight[:, :28])
    assert far(by_activation) < 0.7 * far(by_place)


def test_measuring_does_not_change_the_model():
    model = random_model("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prune(model, Sizes(heads=2), batches())
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_calibration_rows_are_spread_over_the_cache(cache: Path):
    opened = cf.open_cache(cache)
    found = list(calibration_batches(CacheDataset(opened)))
    assert len(opened) > CALIBRATION_ROWS == len(found)
    assert found[0]["input_ids"].tolist() == [opened[0].input_ids.tolist()]
    assert found[-1]["input_ids"].tolist() == [opened[-1].input_ids.tolist()]


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_pruned_student_trains_resumes_and_loads(tmp_path: Path, cache: Path, teacher_dir: Path):
    options: dict[str, Any] = {
        "student": teacher_dir,
        "student_layers": 1,
        "student_width": 16,
        "student_intermediate": 24,
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 1e-2,
    }
    before = evaluate(EvaluateConfig(cache=str(cache), student=str(teacher_dir), device="cpu"))
    train(tmp_path / "whole", cache, **options)
    config = AutoConfig.from_pretrained(tmp_path / "whole")
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (1, 16, 24)
    after = evaluate(EvaluateConfig(cache=str(cache), student=str(tmp_path / "whole"), device="cpu"))
    assert before.kl < 0.01 < after.kl

    def stop(step: int, total: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", cache, on_step=stop, **options)
    train(tmp_path / "parts", cache, resume=True, **options)
    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0.0


def test_random_weights_with_the_architecture_of_a_model(tmp_path: Path, teacher_dir: Path, cache: Path):
    options = {"random": True, "layers": 1, "sizes": Sizes(width=16), "vocab_size": 400}
    first, again, other = (load_student(str(teacher_dir), seed=seed, **options) for seed in (4, 4, 5))
    assert first.config.num_hidden_layers == 1 and first.config.hidden_size == 16
    assert torch.equal(logits(first), logits(again)) and not torch.equal(logits(first), logits(other))
    whole = load_student(str(teacher_dir), random=True, vocab_size=400, seed=4)
    loaded = load_student(str(teacher_dir), vocab_size=400, seed=1)
    assert type(whole) is type(loaded) and whole.config.hidden_size == loaded.config.hidden_size
    assert not torch.equal(whole.model.embed_tokens.weight, loaded.model.embed_tokens.weight)
    train(tmp_path / "s", cache, student=teacher_dir, student_random=True, student_intermediate=8, max_steps=1)
    assert AutoConfig.from_pretrained(tmp_path / "s").intermediate_size == 8


@pytest.mark.parametrize("tie", [True, False])
def test_frozen_embeddings_do_not_change(tmp_path: Path, cache: Path, tokenizer: Any, tie: bool):
    path = tiny_llama(tmp_path / "student", tokenizer, layers=1, hidden=16, tie=tie, seed=5)
    stages: list[str] = []
    options = {"max_steps": 3, "learning_rate": 1e-2, "freeze_embeddings": True, "on_stage": stages.append}
    train(tmp_path / "s", cache, student=path, **options)
    before, after = weights(path), weights(tmp_path / "s")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == before.keys() - {"model.embed_tokens.weight"}  # a tied head has no tensor of its own
    assert ("lm_head.weight" in moved) is not tie
    assert any(" of 0.0 M parameters" in stage for stage in stages)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, expected",
    [
        (Sizes(width=25), "`student_width` 25: the model has 24"),
        (Sizes(intermediate=41), "`student_intermediate` 41: the model has 40"),
        (Sizes(heads=7), "`student_heads` 7: the model has 6"),
        (Sizes(heads=3), "`student_heads` 3: .*expected a multiple of 2, such as 2"),
        (Sizes(width=23), "`student_width` 23, .*LlamaConfig refuses them: .*multiple of the number of attention"),
    ],
)
def test_impossible_sizes_are_refused(sizes: Sizes, expected: str):
    with pytest.raises(ConfigError, match=expected):
        resized(random_model("llama").config, sizes)


@pytest.mark.parametrize("config", [GPT2Config(n_layer=2), Gemma2Config()], ids=["gpt2", "gemma2"])
def test_unsupported_architectures_are_refused(config: Any):
    with pytest.raises(ConfigError, match=f"is a {config.model_type}, expected llama, mistral, qwen2, qwen3"):
        resized(config, Sizes(width=8))


def test_unknown_parameter_is_refused():
    model = random_model("llama")
    model.model.layers[1].mlp.extra = torch.nn.Linear(4, 4)
    with pytest.raises(ModelError, match="model.layers.1.mlp.extra.weight: .*`student_layers`"):
        prune(model, Sizes(width=12), batches())


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"student_random": True}, "`student_random`: found `student_config`"),
        ({"student_width": 8}, "`student_width`, .*: found `student_config`.*Set the sizes in"),
    ],
)
def test_size_options_with_a_configuration_are_refused(
    tmp_path: Path, cache: Path, student_dir: Path, options: dict[str, Any], expected: str
):
    with pytest.raises(ConfigError, match=expected):
        train(tmp_path / "s", cache, student_config=str(student_dir / "config.json"), **options)
    assert not (tmp_path / "s").exists()
