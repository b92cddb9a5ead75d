"""Make a student shallower: keep some layers of a model, evenly spaced, and all other weights.

    configuration ─▶ the same with fewer layers ─▶ smaller model ─▶ weights of the kept layers ─▶ kinds compared

A configuration describes layers that differ from one another in many ways: one item per layer, lists of the layers that
are special, how many are at the beginning or at the end, a period. The first three are rewritten for the kept
layers. What cannot be rewritten, such as a period, shows when the layers of the smaller model are compared with those
that they come from: another class, other parameters, another window. Such a selection is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from cache_format.wording import quantity
from pipeline.errors import ConfigError, ModelError
from pipeline.models.loading import reason

# Settings that count layers from the beginning, and from the end.
FIRST = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index")
LAST = ("num_kv_shared_layers",)

# Settings of a module that do not change what it computes. The last two say which layers share their keys and values:
# in the smaller model it is the last kept one of the same type.
NOT_OF_A_KIND = ("training", "kv_shared_layer_index", "store_full_length_kv")


def kept_layers(total: int, keep: int) -> list[int]:
    """`keep` of the layers 0 … total − 1, evenly spaced, including the first and the last."""
    return [round(float(i)) for i in np.linspace(0, total - 1, keep)]


def keep_layers(model: PreTrainedModel, keep: int) -> PreTrainedModel:
    """A copy of `model` in float32 on the CPU with `keep` of its layers and all other weights.

    Raises:
        ConfigError: `keep` is out of range, or the architecture cannot have so few layers.
        ModelError: the architecture has no list of layers, or a kept layer would become one of another kind.
    """
    config = with_layers(model.config, keep)
    total = getattr(_decoder(model.config), _counts(_decoder(model.config))[0])
    kept = kept_layers(total, keep)
    try:
        type(config).from_dict(config.to_dict())  # as it will be saved, which is when a class checks its settings
        smaller = type(model)(config).float()
    except Exception as error:  # architectures fail in many ways for a number of layers that they do not support
        raise _refused(keep, f"{type(model).__name__} cannot be built from these layers: {reason(error)}") from error
    lists = _layer_lists(model, smaller, total, keep)
    for name in lists:
        for new, old in enumerate(kept):
            _check_kind(model.get_submodule(f"{name}.{old}"), smaller.get_submodule(f"{name}.{new}"), old, new, kept)
    weights = _selected_weights(model, smaller, lists, kept, total)
    _check_weights(smaller, weights, kept)
    smaller.load_state_dict(weights, strict=True)
    smaller.tie_weights()
    if hasattr(model, "generation_config"):  # masked models have none
        smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.eval()


# ---- the configuration


def with_layers(config: PreTrainedConfig, keep: int) -> PreTrainedConfig:
    """A copy of a configuration with `keep` layers, and the settings of those layers.

    Raises:
        ConfigError: `keep` is out of range, or the configuration has no number of layers.
    """
    config = copy.deepcopy(config)
    text = _decoder(config)
    counts = _counts(text)
    total = getattr(text, counts[0], None)
    if total is None:
        raise ConfigError(
            f"`student_layers` {keep}: a {config.model_type} has no number of layers (num_hidden_layers) in its "
            "configuration. Leave `student_layers` out, or write a `student_config`."
        )
    if not 1 <= keep <= total:
        raise ConfigError(
            f"`student_layers` {keep}: the model has {quantity(total, 'layer')}. Use a number from 1 to {total}."
        )
    kept = kept_layers(total, keep)
    following = _following(text, counts)
    settings = text.to_dict()
    layers = {int(i): each for i, each in (settings.pop("per_layer_config", None) or {}).items()}
    if layers:
        text.per_layer_config = None
    for name, value in settings.items():
        if name in FIRST and isinstance(value, int):
            setattr(text, name, sum(i < value for i in kept))
        elif name in LAST and isinstance(value, int):
            setattr(text, name, sum(i >= total - value for i in kept))
        elif not isinstance(value, list | tuple):
            continue
        elif ("layer" in name or "idx" in name) and _are_places(value, total):
            setattr(text, name, [kept.index(i) for i in value if i in kept])
        elif len(value) == total and (name in following or all(isinstance(each, str) for each in value)):
            setattr(text, name, [value[i] for i in kept])
    for name in counts:
        setattr(text, name, keep)
    if layers:
        text.per_layer_config = {new: layers[old] for new, old in enumerate(kept) if old in layers}
    return config


def _decoder(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a configuration that describes the layers, `config` itself or one inside it."""
    text: PreTrainedConfig = config.get_text_config(decoder=True)
    return text if any(text is getattr(config, name, None) for name in config.sub_configs) else config


def _counts(config: PreTrainedConfig) -> list[str]:
    """Names of the number of layers; that of a decoder first, which may stand beside that of an encoder."""
    settings = config.to_dict()
    decoder = [name for name in ("decoder_layers", "num_decoder_layers") if name in settings]
    return decoder or ["num_hidden_layers", *(name for name in ("num_blocks",) if name in settings)]


def _following(config: PreTrainedConfig, counts: Sequence[str]) -> set[str]:
    """Names of lists that get one item more if the class is given one layer more."""
    try:
        fewer, more = (type(config)(**dict.fromkeys(counts, n)).to_dict() for n in (6, 7))
    except Exception:  # a class that needs more settings than these; lists of names are found without
        return set()
    return {
        name
        for name, value in more.items()
        if isinstance(value, list | tuple) and isinstance(fewer.get(name), list | tuple)
        if (len(fewer[name]), len(value)) == (6, 7)
    }


def _are_places(values: Sequence[Any], total: int) -> bool:
    """Whether a list consists of numbers of layers."""
    numbers = [each for each in values if type(each) is int and 0 <= each < total]
    return len(numbers) == len(values) and numbers == sorted(set(numbers))


# ---- the weights


def _layer_lists(model: PreTrainedModel, smaller: PreTrainedModel, total: int, keep: int) -> list[str]:
    """Names of the lists of modules that have one module per layer, in both models."""

    def lists(of: PreTrainedModel, length: int) -> Iterator[str]:
        return (n for n, each in of.named_modules() if isinstance(each, nn.ModuleList) and len(each) == length)

    remaining = set(lists(smaller, keep))
    found = [name for name in lists(model, total) if name in remaining]
    # Inside a layer, only the number of its own parts (such as experts) can be the same by chance.
    found = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if not found:
        raise ModelError(
            f"{type(model).__name__}: found no list of {quantity(total, 'layer')}, so `student_layers` cannot "
            "select among them. Use another architecture, or write a `student_config`."
        )
    return found


def _selected_weights(
    model: PreTrainedModel, smaller: PreTrainedModel, lists: Sequence[str], kept: Sequence[int], total: int
) -> dict[str, Tensor]:
    """The weights of the smaller model, by their names there."""
    renamed = {f"{name}.{old}.": f"{name}.{new}." for name in lists for new, old in enumerate(kept)}
    sizes = {name: tensor.shape for name, tensor in smaller.state_dict().items()}
    weights = {}
    for name, tensor in model.state_dict().items():
        prefix = next((f"{each}." for each in lists if name.startswith(f"{each}.")), None)
        if prefix is not None:
            layer = name[: name.index(".", len(prefix)) + 1]
            if layer not in renamed:
                continue
            name = renamed[layer] + name[len(layer) :]
        weights[name] = _of_kept_layers(tensor, sizes.get(name, tensor.shape), kept, total)
    return weights


def _of_kept_layers(tensor: Tensor, size: torch.Size, kept: Sequence[int], total: int) -> Tensor:
    """A tensor with a block for each layer in one dimension (the embeddings per layer of a Gemma 3n), cut to `size`."""
    differing = [d for d, (a, b) in enumerate(zip(tensor.shape, size, strict=False)) if a != b]
    if tensor.ndim != len(size) or len(differing) != 1:
        return tensor
    (d,) = differing
    if tensor.shape[d] % total or tensor.shape[d] // total * len(kept) != size[d]:
        return tensor
    blocks = tensor.unflatten(d, (total, -1)).index_select(d, torch.tensor(kept, device=tensor.device))
    return blocks.flatten(d, d + 1)


def _check_weights(smaller: PreTrainedModel, weights: dict[str, Tensor], kept: Sequence[int]) -> None:
    expected = smaller.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        if name not in expected:
            raise _refused(len(kept), f"the smaller model has no {name}, which one of the kept layers has")
        if name not in weights:
            raise _refused(len(kept), f"none of the kept layers has the {name} of the smaller model")
        if weights[name].shape != expected[name].shape:
            shape, wanted = tuple(weights[name].shape), tuple(expected[name].shape)
            raise _refused(len(kept), f"{name} is {shape} in the model, but {wanted} in the smaller one")


def _check_kind(layer: nn.Module, copied: nn.Module, old: int, new: int, kept: Sequence[int]) -> None:
    """Compare what a layer is in both models: the classes of its parts and their plain settings, such as a window."""
    theirs = dict(copied.named_modules())
    for name, module in layer.named_modules():
        other = theirs.get(name)
        where = f"layer {old} would become layer {new}"
        if type(module) is not type(other):
            has = "has no" if other is None else f"has a {type(other).__name__} instead of its"
            raise _refused(len(kept), f"{where}, which {has} {type(module).__name__}")
        for setting, value in vars(module).items():
            found = vars(other).get(setting)
            if not isinstance(value, bool | int | str | None) or setting.startswith("_") or setting in NOT_OF_A_KIND:
                continue
            # A number of a layer changes with the selection.
            if type(value) is int and type(found) is int and value in kept and found == kept.index(value):
                continue
            if value != found:
                part = f"{name}.{setting}".lstrip(".")
                raise _refused(len(kept), f"{where}, whose {part} is {found} instead of {value}")


def _refused(keep: int, why: str) -> ModelError:
    return ModelError(
        f"`student_layers` {keep}: the kept layers do not make a model of this kind: {why}. Use another number, or "
        "write a `student_config`."
    )
