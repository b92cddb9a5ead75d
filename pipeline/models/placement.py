"""Models that do not fit one device: where their parts lie, and how to get at their weights.

    device_map         accelerate gives every layer a device, or the disk, and moves states along (one process)
    tensor parallel    transformers splits every layer over the processes of torchrun (one model, all of them)

With a device map a weight that was left on the CPU or on disk is a "meta" tensor without values; a hook loads it for
each call of its module. Split over processes it is a `DTensor`. Either way the module computes, and its weight cannot
be used without it: see `is_here`.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.modeling import align_module_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline.errors import ConfigError, ModelError

BALANCED = ("auto", "balanced", "balanced_low_0", "sequential")
# One process may wait for others to write their shards, and the rest of its group for it.
PATIENCE = datetime.timedelta(days=7)


def compute_device(module: nn.Module) -> torch.device:
    """Where a module with a weight computes, wherever that lies meanwhile."""
    hook = getattr(module, "_hf_hook", None)
    weight: Tensor = module.weight
    if weight.is_meta and hook is not None:
        return torch.device(hook.execution_device)
    return weight.device


def is_here(weight: Tensor) -> bool:
    """Whether a weight can be multiplied with, rather than only by way of its module."""
    return not weight.is_meta and not isinstance(weight, DTensor)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the state dict by name, ascending, with its values. Of a model that is split over processes, all
    of them must ask for all."""
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
    """A parameter of a module with its values, wherever they lie meanwhile; None if it has none of that name."""
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
    """Where the layers of a model compute: what is left on CPU or disk on the first GPU, if there is one."""
    places = set(getattr(model, "hf_device_map", {"": device}).values()) - {"cpu", "disk", torch.device("cpu")}
    return sorted((torch.device(place) for place in places), key=str) or [torch.device("cpu")]


def place_of(model: nn.Module, module: nn.Module) -> Any:
    """What the device map says of a module, by its name or that of what it is part of; None if there is no map."""
    name = next(name for name, found in model.named_modules() if found is module)
    places = getattr(model, "hf_device_map", {})
    parents = [name.rsplit(".", drop)[0] for drop in range(name.count(".") + 1)]
    return next((places[part] for part in [*parents, ""] if part in places), None)


def parse_device_map(text: str) -> str | dict[str, Any]:
    """A strategy of accelerate, or a JSON file of module -> device. Raises: ConfigError."""
    if text in BALANCED:
        return text
    path = Path(text)
    if not path.is_file():
        raise ConfigError(f"--device-map {text}: expected {', '.join(BALANCED)}, or a JSON file. Check the path.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"--device-map {text}: not JSON: {error}. Correct it.") from error
    if not isinstance(found, dict) or not all(isinstance(place, int | str) for place in found.values()):
        raise ConfigError(f"--device-map {text}: expected an object of module names and devices. Correct it.")
    return found


def check_split(name: str, config: Any) -> None:
    """Whether the processes of torchrun can split a model: transformers finds out in the middle of the first pass.

    Args:
        config: of transformers; None if it is known only once the model is loaded.

    Raises: ConfigError.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config is None or world < 2:
        return
    text = config.get_text_config()
    if not (getattr(config, "base_model_tp_plan", None) or getattr(text, "base_model_tp_plan", None)):
        raise ConfigError(
            f"--tp: transformers has no plan (tp_plan) for splitting {name}, a {config.model_type}. Use --device-map."
        )
    heads = getattr(text, "num_attention_heads", None)
    for what, count in (
        ("key-value heads", getattr(text, "num_key_value_heads", None) or heads),
        ("attention heads", heads),
    ):
        if count is not None and count % world:
            fit = [n for n in range(2, count + 1) if count % n == 0 and (heads or count) % n == 0]
            use = f"Use --nproc-per-node {' or '.join(map(str, fit))}, or --device-map." if fit else "Use --device-map."
            raise ConfigError(
                f"--tp: {name} has {count} {what}, found {world} processes, expected a number of them that divides "
                f"these: whole heads are split. {use}"
            )


def begin_tensor_parallel(device: torch.device) -> Any:
    """Joins the processes that torchrun has started into one group. Returns: what `from_pretrained` takes as
    `distributed_config`. Raises: ConfigError, ModelError."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world < 2:
        raise ConfigError(
            "--tp: found one process, expected several to split the teacher over. Start them with torchrun "
            "--nproc-per-node N --no-python distill cache-teacher …"
        )
    try:
        from transformers.distributed import DistributedConfig
    except ImportError as error:
        raise ModelError("--tp: this version of transformers cannot split a model. Install a newer one.") from error
    if not torch.distributed.is_initialized():
        options = {"device_id": device} if device.type == "cuda" else {}
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=PATIENCE, **options)
    return DistributedConfig(tp_plan="auto", tp_size=world)
