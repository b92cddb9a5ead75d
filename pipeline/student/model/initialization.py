"""Where a student comes from: a checkpoint, fewer layers of a larger model, or a configuration and random weights.

Narrower ones are cut out in `pruning`, adapters put on in `pipeline.models.adapters`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from pipeline.errors import ConfigError, ModelError
from pipeline.models.loading import load_config, load_model, reason
from pipeline.models.objective import Objective, auto_class, objective_of
from pipeline.student.model.pruning import Sizes, resized


def check_one_origin(student: str | None, config_file: str | None) -> None:
    """Raises ConfigError unless exactly one of --student and --student-config is given."""
    if (student is None) == (config_file is None):
        found = "neither --student nor" if student is None else "both --student and"
        raise ConfigError(
            f"{found} --student-config: expected one of them, which says where the student's weights come from. "
            + ("Give a model directory as --student." if student is None else "Leave one out.")
        )


def load_student(
    student: str | None,
    *,
    layers: int | None = None,
    config_file: str | None = None,
    random: bool = False,
    sizes: Sizes | None = None,
    vocab_size: int,
    seed: int,
    objective: Objective = "causal",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A student in float32 on the CPU.

    Args:
        student: transformers directory, hub name or .gguf file; None with `config_file`.
        layers: keep this many of its layers, evenly spaced, first and last included; embeddings and head are kept.
        config_file: a transformers `config.json`; random weights from `seed`.
        random: of `student` only the architecture is taken, with random weights from `seed`.
        sizes: with `random`, a narrower one of it. What is to be kept of weights is for `pruning.prune` to find out.
        vocab_size: used where the configuration does not say.
        objective: what it is to predict, which decides the class that it is loaded as.

    Raises:
        ConfigError, ModelError: contradictory options; a model that cannot be loaded.
    """
    check_one_origin(student, config_file)
    if config_file is not None:
        model = _from_config(configuration(config_file, vocab_size), seed, config_file, trust_remote_code=False)
        return model if layers is None else keep_layers(model, layers)
    assert student is not None
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    if random:
        # What a .gguf file holds is known only once it is loaded.
        config = load_config(student, **options) or load_model(student, dtype="float32", **options).config
        config = config if layers is None else with_layers(config, layers)
        return _from_config(resized(config, sizes) if sizes else config, seed, student, trust_remote_code)
    model = load_model(student, objective=objective, dtype="float32", **options)
    return model if layers is None else keep_layers(model, layers, trust_remote_code)


def freeze_embeddings(model: PreTrainedModel) -> None:
    """Takes the token embeddings out of training; a head that is tied to them is the same tensor and goes with them."""
    model.get_input_embeddings().requires_grad_(False)


def kept_layers(total: int, keep: int) -> list[int]:
    """`keep` of the layers 0 … total − 1, evenly spaced, with the first and the last."""
    return [round(float(i)) for i in np.linspace(0, total - 1, keep)]


def keep_layers(model: PreTrainedModel, keep: int, trust_remote_code: bool = False) -> PreTrainedModel:
    """A new model of the same architecture with `keep` of `model`'s layers and everything else of it."""
    total = model.config.num_hidden_layers
    config = with_layers(model.config, keep)
    kept = kept_layers(total, keep)
    prefix = _layer_list(model, total)
    smaller = build(config, trust_remote_code)

    renamed = {f"{prefix}.{old}.": f"{prefix}.{new}." for new, old in enumerate(kept)}
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(f"{prefix}."):
            layer = name[: name.index(".", len(prefix) + 1) + 1]
            if layer not in renamed:
                continue
            name = renamed[layer] + name[len(layer) :]
        weights[name] = tensor
    smaller.load_state_dict(weights, strict=True)
    smaller.tie_weights()
    if hasattr(model, "generation_config"):  # masked models generate nothing
        smaller.generation_config = model.generation_config
    return smaller.eval()


def with_layers(config: PreTrainedConfig, keep: int) -> PreTrainedConfig:
    """A copy of a configuration with `keep` of its layers."""
    total = config.num_hidden_layers
    if not 1 <= keep <= total:
        raise ConfigError(f"--student-layers {keep}: the model has {total} layers. Give a number from 1 to {total}.")
    kept = kept_layers(total, keep)
    config = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == total:  # one item per layer, such as layer_types
            setattr(config, name, [value[i] for i in kept])
    config.num_hidden_layers = keep
    return config


def _layer_list(model: PreTrainedModel, total: int) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            return name
    raise ModelError(
        f"{type(model).__name__}: found no list of {total} layers, so --student-layers cannot choose among them"
    )


def configuration(config_file: str, vocab_size: int) -> PreTrainedConfig:
    """A transformers `config.json`, given as a file or the directory that holds it.

    Args:
        vocab_size: used where the file does not say.

    Raises:
        ConfigError: there is none, or it is something else.
    """
    path = Path(config_file)
    path = path / "config.json" if path.is_dir() else path
    expected = "expected a transformers config.json, such as a model's own"
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file, {expected}. Check --student-config.") from error
    except ValueError as error:  # JSON or UTF-8
        raise ConfigError(f"{path}: not JSON ({error}), {expected}. Correct it.") from error
    if not isinstance(given, dict) or "model_type" not in given:
        raise ConfigError(f"{path}: has no model_type, {expected}. Check --student-config.")
    try:
        return AutoConfig.for_model(**{"vocab_size": vocab_size, **given})
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise _not_a_model(config_file, error) from error


def build(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model with random weights. Left to itself transformers asks on the terminal whether to run code."""
    kind = auto_class(objective_of(config))
    model: PreTrainedModel = kind.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    return model


def _from_config(config: PreTrainedConfig, seed: int, name: str, trust_remote_code: bool) -> PreTrainedModel:
    torch.manual_seed(seed)
    try:
        return build(config, trust_remote_code)
    except (ValueError, TypeError, KeyError) as error:
        raise _not_a_model(name, error) from error


def _not_a_model(config_file: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{config_file}: no causal or masked language model can be built: {reason(error)}. "
        "Correct the configuration, or take that of a model like it."
    )
