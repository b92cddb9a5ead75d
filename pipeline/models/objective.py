"""What a language model was trained to predict, causal or masked, and what follows from it.

    causal   the next token, from the tokens before it       alignment next   AutoModelForCausalLM
    masked   a masked token, from both sides of it           alignment same   AutoModelForMaskedLM

The configuration decides: its architectures if it names any, else the type of the model. The other objective is
refused: a masked model has seen the token that a causal one predicts, and a causal model has never seen a mask.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from cache_format.rows.types import Alignment
from pipeline.errors import ConfigError

Objective = Literal["causal", "masked"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

ALIGNMENT: dict[Objective, Alignment] = {"causal": "next", "masked": "same"}
NAMES: dict[Objective, str] = {"causal": "causal language model", "masked": "masked language model"}

# Class names of causal checkpoints in families that have both kinds of heads.
CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")

# Names of the number of positions in configurations: of most, of a Whisper's decoder, of an MPT.
LIMITS = ("max_position_embeddings", "max_target_positions", "max_seq_len")


def objective_of(config: PreTrainedConfig) -> Objective:
    """The objective of a configuration; causal if the type of the model is unknown."""
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or config.is_encoder_decoder:
        return "causal"
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "masked"
    is_causal = any(name.endswith(CAUSAL_ENDINGS) for name in config.architectures or ())
    return "causal" if is_causal or getattr(config, "is_decoder", False) else "masked"


def objective_for(alignment: Alignment) -> Objective:
    """The objective whose targets have this alignment."""
    return "masked" if alignment == "same" else "causal"


def check_objective(asked: str | None, config: PreTrainedConfig, name: str) -> Objective:
    """The objective of the model `name`, which must be the one that is asked for, if any.

    Raises:
        ConfigError: the model has another objective.
    """
    if asked not in (None, "auto", *OBJECTIVES):
        raise ConfigError(f"`objective` {asked}: expected auto, {' or '.join(OBJECTIVES)}.")
    found = objective_of(config)
    if asked in (None, "auto", found):
        return found
    architecture = (config.architectures or [config.model_type])[0]
    why = {
        "causal": "it attends to both sides of a token, so it has seen the one that it would have to predict",
        "masked": "it has no head for masked tokens, and attends only to the tokens before one",
    }[str(asked)]
    raise ConfigError(f"`objective` {asked}: {name} is a {NAMES[found]} ({architecture}): {why}. Leave it out.")


def auto_class(objective: Objective) -> Any:
    """The transformers class that loads models of this objective."""
    return AutoModelForMaskedLM if objective == "masked" else AutoModelForCausalLM


def most_positions(config: PreTrainedConfig) -> int | None:
    """The length of the longest row that a model takes, in tokens; None if there is no limit (an XLNet says -1).

    RoBERTa and its relatives number positions from the padding token's id + 1, so 514 positions take 512 tokens.
    """
    text = config.get_text_config(decoder=True)
    given = (getattr(text, name, None) for name in LIMITS)
    limit = next((each for each in given if each is not None and each > 0), None)
    if limit is None or objective_of(config) == "causal" or type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        return limit  # the last condition: a model with code of its own
    with torch.device("meta"):  # the modules without their weights
        model: PreTrainedModel = AutoModelForMaskedLM.from_config(config, trust_remote_code=False)
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    first = next((table.padding_idx for table in tables if isinstance(table, nn.Embedding)), None)
    return limit if first is None else limit - first - 1
