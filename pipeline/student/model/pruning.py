"""Make a student narrower: keep the most active channels, MLP neurons and attention heads of a model.

Activity is measured on rows of the cache, as in Minitron (Muralidharan et al., 2024, https://arxiv.org/abs/2407.14679):

    channels of the hidden state   mean |output of a norm|, summed over all norms
    neurons of an MLP              mean |input of the down projection|, per layer
    attention heads                mean ‖input of the output projection‖ per head and layer; with grouped queries, a
                                   key–value head is kept or removed with all of its queries, by the sum of theirs

Each norm's weight is multiplied by rms(kept) / rms(all channels), measured on the same rows, because a norm divides by
the rms over the channels that remain. Costs one forward pass over `CALIBRATION_ROWS` rows and no training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pipeline.errors import ConfigError, ModelError
from pipeline.models.isolation.length_limits import by_document, limited_rotaries
from pipeline.models.loading import reason
from pipeline.student.data.dataset import Batch, CacheDataset

# Each is tested. Other architectures may have more parameters, tie sizes or scale the hidden state by its width.
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")

CALIBRATION_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the narrower model; None keeps the size."""

    width: int | None = None  # channels of the hidden state
    intermediate: int | None = None  # neurons of each MLP
    heads: int | None = None  # query heads of each layer

    def __bool__(self) -> bool:
        return any(size is not None for size in (self.width, self.intermediate, self.heads))


def resized(config: PreTrainedConfig, sizes: Sizes) -> PreTrainedConfig:
    """The configuration of the narrower model. The dimension of a head stays.

    Raises:
        ConfigError: the architecture is not supported, or it cannot have these sizes.
    """
    if config.model_type not in SUPPORTED:
        raise ConfigError(
            f"`student_width`, `student_intermediate`, `student_heads`: the model is a {config.model_type}, expected "
            f"{', '.join(SUPPORTED)}. Use `student_layers`, or write a `student_config`."
        )
    queries, pairs = config.num_attention_heads, config.num_key_value_heads
    group = queries // pairs
    for option, wanted, has in (
        ("student_width", sizes.width, config.hidden_size),
        ("student_intermediate", sizes.intermediate, config.intermediate_size),
        ("student_heads", sizes.heads, queries),
    ):
        if wanted is not None and not 1 <= wanted <= has:
            raise ConfigError(f"`{option}` {wanted}: the model has {has}. Use a number from 1 to {has}.")
    heads = queries if sizes.heads is None else sizes.heads
    if heads % group:
        raise ConfigError(
            f"`student_heads` {heads}: in this model {group} query heads share a key–value head, expected a multiple "
            f"of {group}, such as {max(group, heads - heads % group)}."
        )
    settings = config.to_dict() | {
        "hidden_size": sizes.width or config.hidden_size,
        "intermediate_size": sizes.intermediate or config.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // group,
        "head_dim": _head_dim(config),
    }
    try:
        return AutoConfig.for_model(**settings)
    except (StrictDataclassError, ValueError) as error:
        raise ConfigError(
            f"`student_width` {settings['hidden_size']}, `student_heads` {heads}: {type(config).__name__} refuses "
            f"them: {reason(error)}. Choose other sizes."
        ) from error


def calibration_batches(dataset: CacheDataset) -> Iterable[Batch]:
    """`CALIBRATION_ROWS` rows, evenly spaced over a cache, one per batch, so that no batch has padding."""
    indices = np.linspace(0, len(dataset) - 1, min(CALIBRATION_ROWS, len(dataset))).round().astype(int)
    return (dataset.collate([dataset[int(i)]]) for i in indices)


def prune(model: PreTrainedModel, sizes: Sizes, batches: Iterable[Batch]) -> PreTrainedModel:
    """A narrower model of the same architecture in float32 on the CPU, with the most active parts of `model`.

    Kept channels, neurons and heads stay in their order.

    Args:
        batches: input_ids and position_ids [1, T] of the text to measure on.

    Raises:
        ConfigError: as `resized`.
        ModelError: the model has a parameter that cannot be made narrower.
    """
    config = resized(model.config, sizes)
    measured = _measure(model, batches)
    channels = _largest(measured.channels, config.hidden_size)
    layers = [
        _Kept(
            neurons=_largest(neurons, config.intermediate_size),
            pairs=_largest(heads.view(model.config.num_key_value_heads, -1).sum(dim=1), config.num_key_value_heads),
        )
        for neurons, heads in zip(measured.neurons, measured.heads, strict=True)
    ]
    group, dim = model.config.num_attention_heads // model.config.num_key_value_heads, _head_dim(model.config)
    smaller = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    weights = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        kept = layers[int(parts[2])] if parts[1] == "layers" else None
        weights[name] = _cut(name, tensor.cpu(), channels, kept, group, dim, measured.squares)
    smaller.load_state_dict(weights, strict=True)
    smaller.tie_weights()
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.eval()


@dataclass(frozen=True)
class _Kept:
    neurons: Tensor
    pairs: Tensor  # key–value heads


@dataclass(frozen=True)
class _Measured:
    """Activity, summed over tokens; float64 on the CPU."""

    channels: Tensor  # [D], over all norms
    squares: dict[str, Tensor]  # norm -> [D] squared inputs
    neurons: list[Tensor]  # [F] of each layer
    heads: list[Tensor]  # [H] of each layer


@torch.no_grad()
def _measure(model: PreTrainedModel, batches: Iterable[Batch]) -> _Measured:
    layers, dim = model.model.layers, _head_dim(model.config)
    norms = {name: module for name, module in model.named_modules() if _is_hidden_norm(name)}
    device = next(model.parameters()).device
    channels = torch.zeros(model.config.hidden_size, dtype=torch.float64, device=device)
    squares = {name: torch.zeros_like(channels) for name in norms}
    neurons = [torch.zeros(layer.mlp.down_proj.in_features, dtype=torch.float64, device=device) for layer in layers]
    heads = [torch.zeros(model.config.num_attention_heads, dtype=torch.float64, device=device) for _ in layers]

    def watch_norm(name: str, module: nn.Module) -> RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            channels.add_(output.double().abs().flatten(0, -2).sum(dim=0))
            squares[name].add_(inputs[0].double().square().flatten(0, -2).sum(dim=0))

        return module.register_forward_hook(hook)

    def watch_inputs(module: nn.Module, total: Tensor, size: int | None) -> RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            values = inputs[0].double().flatten(0, -2)  # [T, F]
            values = values.abs() if size is None else values.unflatten(1, (-1, size)).norm(dim=2)
            total.add_(values.sum(dim=0))

        return module.register_forward_pre_hook(hook)

    hooks = [watch_norm(name, module) for name, module in norms.items()]
    for layer, neuron_sums, head_sums in zip(layers, neurons, heads, strict=True):
        hooks.append(watch_inputs(layer.mlp.down_proj, neuron_sums, None))
        hooks.append(watch_inputs(layer.self_attn.o_proj, head_sums, dim))
    training, rotaries = model.training, limited_rotaries(model)
    model.eval()
    try:
        for batch in batches:
            ids, positions = (batch[name].to(device) for name in ("input_ids", "position_ids"))
            with by_document(rotaries, positions):
                model.model(input_ids=ids, position_ids=positions, use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return _Measured(
        channels.cpu(),
        {name: s.cpu() for name, s in squares.items()},
        [n.cpu() for n in neurons],
        [h.cpu() for h in heads],
    )


def _cut(
    name: str, tensor: Tensor, channels: Tensor, kept: _Kept | None, group: int, dim: int, squares: dict[str, Tensor]
) -> Tensor:
    """The part of a tensor of the larger model that the narrower model keeps."""
    *_, module, kind = name.split(".")
    norm = name.removesuffix(".weight")
    if norm in squares:
        energy = squares[norm]
        ratio = (energy[channels].mean() / energy.mean().clamp(min=1e-30)).sqrt()
        return tensor[channels] * ratio.to(tensor.dtype)
    if module in ("embed_tokens", "lm_head") and kind == "weight":
        return tensor[:, channels]
    if module in ("q_norm", "k_norm"):  # over the dimensions of a head
        return tensor
    if kept is not None:
        queries = (kept.pairs[:, None] * group + torch.arange(group)).flatten()
        outputs = {
            "q_proj": _head_rows(queries, dim),
            "k_proj": _head_rows(kept.pairs, dim),
            "v_proj": _head_rows(kept.pairs, dim),
            "o_proj": channels,
            "gate_proj": kept.neurons,
            "up_proj": kept.neurons,
            "down_proj": channels,
        }
        inputs = {"o_proj": _head_rows(queries, dim), "down_proj": kept.neurons}
        if module in outputs and kind == "bias":
            return tensor[outputs[module]]
        if module in outputs and kind == "weight":
            return tensor[outputs[module]][:, inputs.get(module, channels)]
    raise ModelError(
        f"{name}: cannot be made narrower, the parameter is not one of a supported architecture. Use `student_layers`."
    )


def _is_hidden_norm(name: str) -> bool:
    return name == "model.norm" or name.endswith((".input_layernorm", ".post_attention_layernorm"))


def _head_rows(heads: Tensor, dim: int) -> Tensor:
    """Indices of the rows of a projection that belong to the given heads."""
    return (heads[:, None] * dim + torch.arange(dim)).flatten()


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest values, ascending; ties go to the first."""
    return values.sort(descending=True, stable=True).indices[:count].sort().values


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
