"""Create a student: load it, keep fewer layers of a larger model, or initialise a configuration at random.

`layer_selection` keeps layers, `pruning` makes students narrower; `pipeline.models.adapters` adds adapters.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from cache_format.json_object import json_object
from pipeline.errors import ConfigError, ModelError
from pipeline.models.loading import load_config, load_model, model_name, reason
from pipeline.models.objective import NAMES, Objective, auto_class, objective_of
from pipeline.student.model.layer_selection import keep_layers, with_layers
from pipeline.student.model.pruning import Sizes, resized


def check_one_origin(student: str | PreTrainedModel | None, config_file: str | None) -> None:
    """Raises ConfigError unless exactly one of `student` and `student_config` is given."""
    if (student is None) == (config_file is None):
        found = "neither `student` nor" if student is None else "both `student` and"
        raise ConfigError(
            f"found {found} `student_config`, expected one of them, which decides the initial weights. "
            + ("Set `student` to a model directory or hub name." if student is None else "Leave one out.")
        )


def load_student(
    student: str | PreTrainedModel | None,
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
    """A student in float32, in evaluation mode, on the CPU.

    A loaded model is converted to float32 in place and returned, on its own device; with `layers`, `sizes` or `random`
    it is left alone and a new model is returned.

    Args:
        student: transformers directory, hub name, .gguf file or loaded model; None with `config_file`.
        layers: number of layers to keep, evenly spaced, including the first and the last.
        config_file: a transformers `config.json`, initialised at random with `seed`.
        random: use only the architecture of `student`, initialised at random with `seed`.
        sizes: narrower sizes for `random`. Trained weights are narrowed later, by `pruning.prune`.
        vocab_size: used if the configuration has none.
        objective: causal or masked; selects the model class.

    Raises:
        ConfigError: contradictory options.
        ModelError: the model cannot be loaded.
    """
    check_one_origin(student, config_file)
    if config_file is not None:
        model = _from_config(configuration(config_file, vocab_size), seed, config_file, trust_remote_code=False)
        return model if layers is None else keep_layers(model, layers)
    assert student is not None
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if random:
        # The configuration of a .gguf file is known only after loading it.
        config = load_config(student, **options) or load_model(student, dtype="float32", **options).config
        config = copy.deepcopy(config)  # of a loaded model, to which it belongs
        config = config if layers is None else with_layers(config, layers)
        config = resized(config, sizes) if sizes else config
        return _from_config(config, seed, model_name(student), trust_remote_code)
    if isinstance(student, PreTrainedModel):
        if layers is not None:
            return keep_layers(load_model(student, objective=objective), layers)
        student = copy.deepcopy(student) if sizes else student
        return load_model(student, objective=objective, dtype="float32", convert=True)
    model = load_model(student, objective=objective, dtype="float32", **options)
    _check_loadable(model, student, objective)
    return model if layers is None else keep_layers(model, layers)


def _check_loadable(model: PreTrainedModel, name: str, objective: Objective) -> None:
    """Raise ModelError if transformers could not load again what it saves of the model.

    Emu3 and Mllama are loaded with the configuration of all their parts, and saved with that of their text part.
    """
    config = model.config
    if type(config) not in auto_class(objective)._model_mapping and not hasattr(config, "auto_map"):
        raise ModelError(
            f"{name}: {type(model).__name__} is saved with the configuration of a {config.model_type}, which "
            f"transformers cannot load as a {NAMES[objective]}, so the trained student would be lost. Use another one."
        )


def freeze_embeddings(model: PreTrainedModel) -> None:
    """Excludes the token embeddings from training, and with them a tied head, which is the same tensor."""
    model.get_input_embeddings().requires_grad_(False)


def configuration(config_file: str, vocab_size: int) -> PreTrainedConfig:
    """The configuration in a transformers `config.json`, given as the file or its directory.

    Args:
        vocab_size: used if the file has none.

    Raises:
        ConfigError: the file is missing or not a model configuration.
    """
    path = Path(config_file)
    path = path / "config.json" if path.is_dir() else path
    expected = "expected a transformers config.json"
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file, {expected}. Check `student_config`.") from error
    given = json_object(
        data, str(path), expected="a transformers config.json", next_step="Check `student_config`.", error=ConfigError
    )
    if "model_type" not in given:
        raise ConfigError(f"{path}: has no model_type, {expected}. Check `student_config`.")
    try:
        return AutoConfig.for_model(**{"vocab_size": vocab_size, **given})
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise _not_a_model(config_file, error) from error


def build(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model in float32 with random weights."""
    # Without trust_remote_code given, transformers asks on the terminal whether to run code.
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
        f"{config_file}: no causal or masked language model can be built from it: {reason(error)}. Correct the "
        "configuration, or start from the config.json of a similar model."
    )
