"""Models that do not fit on one device: where their parts are, and how to read their weights.

    device_map         accelerate assigns every layer to a device or the disk and moves the states along; one process
    tensor_parallel    transformers splits every layer over the processes of torchrun, which form one model

With a device map, a weight that was left on the CPU or on disk is a "meta" tensor without values, which a hook loads
for each call of its module. With tensor parallelism, it is a `DTensor`. In both cases only the module can compute with
its weight; see `is_here`.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.modeling import align_module_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cache_format.json_object import json_object
from pipeline.errors import ConfigError, ModelError

BALANCED = ("auto", "balanced", "balanced_low_0", "sequential")
# A process may wait while others write their shards, and the rest of its group waits for it.
PATIENCE = datetime.timedelta(days=7)


def compute_device(module: nn.Module) -> torch.device:
    """The device on which a module computes, even if its weight is stored elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    weight: Tensor = module.weight
    if weight.is_meta and hook is not None:
        return torch.device(hook.execution_device)
    return weight.device


def is_here(weight: Tensor) -> bool:
    """Whether a weight has its values on this device and in this process, so that it can be used without its module."""
    return not weight.is_meta and not isinstance(weight, DTensor)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all tensors of the state dict, in order of their names.

    If a model is split over processes, every process must iterate over all of them.
    """
    modules = dict(model.named_modules())
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, DTensor):
            yield name, tensor.full_tensor()
        elif tensor.is_meta:
            parent, _, leaf = name.rpartition(".")
            with align_module_device(modules[parent], torch.device("cpu")):
                yield name, getattr(modules[parent], leaf).detach()
        else:
            yield name, tensor.detach()


def values_of(module: nn.Module, name: str) -> Tensor | None:
    """The values of a parameter, even if they are stored elsewhere; None if the module has no such parameter."""
    tensor = getattr(module, name, None)
    if tensor is None:
        return None
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach()
    if tensor.is_meta:
        with align_module_device(module, torch.device("cpu")):
            found: Tensor = getattr(module, name).detach()
            return found
    return tensor.detach()


def computing_devices(model: nn.Module, device: torch.device) -> list[torch.device]:
    """The devices that layers compute on; layers left on CPU or disk compute on the first GPU, if there is one."""
    places = set(getattr(model, "hf_device_map", {"": device}).values()) - {"cpu", "disk", torch.device("cpu")}
    return sorted((torch.device(place) for place in places), key=str) or [torch.device("cpu")]


def device_names(model: nn.Module, device: torch.device) -> str:
    """The kinds of devices that a model computes on; devices of one kind round alike."""
    places = computing_devices(model, device)
    return " + ".join(sorted({torch.cuda.get_device_name(p) if p.type == "cuda" else p.type for p in places}))


def place_of(model: nn.Module, module: nn.Module) -> Any:
    """The entry of the device map for a module or the module that contains it; None if there is no device map."""
    name = next(name for name, found in model.named_modules() if found is module)
    places = getattr(model, "hf_device_map", {})
    parents = [name.rsplit(".", drop)[0] for drop in range(name.count(".") + 1)]
    return next((places[part] for part in [*parents, ""] if part in places), None)


def parse_device_map(text: str, option: str = "device_map") -> str | dict[str, Any]:
    """A strategy of accelerate, or the contents of a JSON file: module name → device.

    Args:
        option: name of the option that it comes from.

    Raises:
        ConfigError: neither.
    """
    if text in BALANCED:
        return text
    path = Path(text)
    if not path.is_file():
        raise ConfigError(f"`{option}` {text}: expected {', '.join(BALANCED)}, or a JSON file. Check the path.")
    where, expected = f"`{option}` {text}", "an object of module names and devices"
    found = json_object(path.read_bytes(), where, expected=expected, next_step="Correct it.", error=ConfigError)
    if not all(isinstance(place, int | str) for place in found.values()):
        raise ConfigError(f"{where}: expected {expected}. Correct it.")
    return found


def check_split(name: str, config: Any) -> None:
    """Check that the processes of torchrun can split a model; transformers would fail in the first forward pass.

    Args:
        config: the transformers configuration; None if it is known only once the model is loaded.

    Raises:
        ConfigError: they cannot.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config is None or world < 2:
        return
    text = config.get_text_config(decoder=True)
    if not (getattr(config, "base_model_tp_plan", None) or getattr(text, "base_model_tp_plan", None)):
        raise ConfigError(
            f"`tensor_parallel`: transformers has no plan (tp_plan) for splitting {name}, a {config.model_type}. Use "
            "`device_map=auto` instead."
        )
    # Layers may differ, as in Gemma 4, and then the model as a whole has no number.
    layers = getattr(text, "per_layer_config", None) or [text]
    counts = [
        (getattr(each, "num_key_value_heads", None), getattr(each, "num_attention_heads", None)) for each in layers
    ]
    for pairs, heads in sorted({(pairs or heads, heads) for pairs, heads in counts if heads is not None}):
        for what, count in (("key-value heads", pairs), ("attention heads", heads)):
            if count % world:
                fit = [n for n in range(2, count + 1) if count % n == 0 and heads % n == 0]
                start = f"Start {' or '.join(map(str, fit))} processes with torchrun, or use" if fit else "Use"
                raise ConfigError(
                    f"`tensor_parallel`: {name} has {count} {what}, found {world} processes, expected a number that "
                    f"divides {count}, because every process gets whole heads. {start} `device_map=auto`."
                )


def begin_tensor_parallel(device: torch.device) -> Any:
    """Join the processes of torchrun into one group; returns the `distributed_config` of `from_pretrained`.

    Raises:
        ConfigError: there is only one process.
        ModelError: this version of transformers cannot split a model.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world < 2:
        raise ConfigError(
            "`tensor_parallel`: found one process, expected several to split the model over. Start N processes with "
            "torchrun."
        )
    try:
        from transformers.distributed import DistributedConfig
    except ImportError as error:
        raise ModelError(
            "`tensor_parallel`: this version of transformers cannot split a model. Install a newer one."
        ) from error
    if not torch.distributed.is_initialized():
        options = {"device_id": device} if device.type == "cuda" else {}
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=PATIENCE, **options)
    return DistributedConfig(tp_plan="auto", tp_size=world)
