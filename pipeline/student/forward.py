"""The student's forward pass for distillation: token ids and sparse targets in, sums of the loss out.

Installed as the model's own `forward`. Trainer wraps the model (DDP, FSDP, autocast) and calls the wrapper; a loss
computed beside the wrapped module would leave data-parallel ranks with gradients that are never averaged, or find a
sharded weight. Here hidden states, head and loss are all inside that one call.
"""

from __future__ import annotations

import types
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import ConfigError
from pipeline.heads import Head
from pipeline.losses import TAIL_POLICIES, HeadOutput, TailPolicy, fused_head, general_head
from pipeline.student.data import Batch, targets_of


@dataclass(frozen=True, kw_only=True)
class LossRecipe:
    """L = (1 − kd_weight)·CE + kd_weight·temperature²·KL, with the teacher's tail treated by policy."""

    kd_weight: float = 0.9
    temperature: float = 1.0
    tail: TailPolicy = "bucket"

    def __post_init__(self) -> None:
        if not 0.0 <= self.kd_weight <= 1.0:
            raise ConfigError(
                f"--kd-weight {self.kd_weight}: expected a number from 0 (labels only) to 1 (teacher only)."
            )
        if self.temperature <= 0.0:
            raise ConfigError(f"--temperature {self.temperature}: expected a positive number.")
        if self.tail not in TAIL_POLICIES:
            raise ConfigError(f"--tail {self.tail}: expected one of {', '.join(TAIL_POLICIES)}.")


def distillation_output(head: Head, batch: Batch, recipe: LossRecipe, scale: float | Tensor = 1.0) -> HeadOutput:
    """Sums over the counted positions of a collated batch; `loss` times `scale` carries the gradient."""
    hidden = head.hidden_states(batch["input_ids"], batch["position_ids"])
    options = {
        "kd_weight": recipe.kd_weight,
        "temperature": recipe.temperature,
        "tail": recipe.tail,
        "scale": scale,
        "vocab_size": head.vocab_size,
    }
    if head.linear:
        return fused_head(hidden, head.weight, head.bias, targets_of(batch), **options)
    return general_head(hidden, head.own_logits, targets_of(batch), **options)


def install_distillation_forward(model: PreTrainedModel, head: Head, recipe: LossRecipe) -> None:
    """Makes `model(scale=…, **batch)` return a `HeadOutput`; `remove_distillation_forward` undoes it."""

    def forward(self: PreTrainedModel, scale: float | Tensor = 1.0, **batch: Tensor) -> HeadOutput:
        return distillation_output(head, batch, recipe, scale)

    # On the instance, as a method, so that accelerate can wrap it and the class still saves and loads as itself.
    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]


def remove_distillation_forward(model: torch.nn.Module) -> None:
    """Gives the model its class's own forward back."""
    model.__dict__.pop("forward", None)
