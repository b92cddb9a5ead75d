"""What a language model was trained to predict, and what follows from it: causal or masked.

    causal   from each token the next one                            alignment next   AutoModelForCausalLM
    masked   from both sides a token that is hidden in the input     alignment same   AutoModelForMaskedLM

Found from a model's configuration: its architectures if it names some, else by its type. A model that sees both sides
of a token has seen the next one, and a causal one has never seen a mask: the other objective is refused, not tried.
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

# What a checkpoint of a family that has both kinds of heads calls itself if it is the causal one.
CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")


def objective_of(config: PreTrainedConfig) -> Objective:
    """The objective of the model that a configuration describes; causal also where nothing is known of its type."""
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or config.is_encoder_decoder:
        return "causal"
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "masked"
    says_causal = any(name.endswith(CAUSAL_ENDINGS) for name in config.architectures or ())
    return "causal" if says_causal or getattr(config, "is_decoder", False) else "masked"


def objective_for(alignment: Alignment) -> Objective:
    """The objective that targets of this alignment come from."""
    return "masked" if alignment == "same" else "causal"


def check_objective(asked: str | None, config: PreTrainedConfig, name: str) -> Objective:
    """What is asked for, or, for None or auto, what the configuration of `name` says.

    Raises: ConfigError if they contradict one another, with the reason.
    """
    if asked not in (None, "auto", *OBJECTIVES):
        raise ConfigError(f"--objective {asked}: expected auto, {' or '.join(OBJECTIVES)}.")
    found = objective_of(config)
    if asked in (None, "auto", found):
        return found
    architecture = (config.architectures or [config.model_type])[0]
    why = {
        "causal": "it attends to both sides of a token, so it has seen the one that it would have to predict",
        "masked": "it has no head for masked tokens, and sees only what stands before one",
    }[str(asked)]
    raise ConfigError(f"--objective {asked}: {name} is a {NAMES[found]} ({architecture}): {why}. Leave it out.")


def auto_class(objective: Objective) -> Any:
    """The class of transformers that loads models of an objective."""
    return AutoModelForMaskedLM if objective == "masked" else AutoModelForCausalLM


def most_positions(config: PreTrainedConfig) -> int | None:
    """The longest row that a model of this configuration takes; None where there is no limit.

    RoBERTa and its relatives number positions from the padding token's id + 1 on, so that 514 of them take 512 tokens.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit is None or objective_of(config) == "causal" or type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        return limit  # the last: with code of its own
    with torch.device("meta"):  # no weights: only what it is made of
        model: PreTrainedModel = AutoModelForMaskedLM.from_config(config, trust_remote_code=False)
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    first = next((table.padding_idx for table in tables if isinstance(table, nn.Embedding)), None)
    return limit if first is None else limit - first - 1
