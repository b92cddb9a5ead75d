"""The student's forward pass for distillation: token ids and sparse targets in, sums of the loss out.

Installed as the model's own `forward`. Trainer wraps the model (DDP, FSDP, autocast) and calls the wrapper; a loss
computed beside the wrapped module would leave data-parallel ranks with gradients that are never averaged, or find a
sharded weight. Here hidden states, head and loss are all inside that one call.
"""

from __future__ import annotations

import types

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.heads import Head
from pipeline.losses import HeadOutput, fused_head, general_head
from pipeline.student.data import Batch, targets_of
from pipeline.student.recipe import LossRecipe


def distillation_output(head: Head, batch: Batch, recipe: LossRecipe, scale: float | Tensor = 1.0) -> HeadOutput:
    """Sums over the counted positions of a collated batch; `loss` times `scale` carries the gradient."""
    hidden = head.hidden_states(batch["input_ids"], batch["position_ids"], batch.get("attention_mask"))
    options = {
        "kd_weight": recipe.kd_weight,
        "temperature": recipe.temperature,
        "tail": recipe.tail,
        "divergence": recipe.mixture,
        "position_weighting": recipe.position_weighting,
        "scale": scale,
        "vocab_size": head.vocab_size,
    }
    targets = targets_of(batch, recipe.capture_temperature)
    if head.linear:
        return fused_head(hidden, head.weight, head.bias, targets, **options)
    return general_head(hidden, head.own_logits, targets, **options)


def install_distillation_forward(model: PreTrainedModel, head: Head, recipe: LossRecipe) -> None:
    """Makes `model(scale=…, recipe=…, **batch)` return a `HeadOutput`; `remove_distillation_forward` undoes it.

    Args:
        recipe: where a call names none.
    """
    default = recipe

    def forward(
        self: PreTrainedModel, scale: float | Tensor = 1.0, recipe: LossRecipe | None = None, **batch: Tensor
    ) -> HeadOutput:
        return distillation_output(head, batch, recipe or default, scale)

    # On the instance, as a method, so that accelerate can wrap it and the class still saves and loads as itself.
    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]


def remove_distillation_forward(model: torch.nn.Module) -> None:
    """Gives the model its class's own forward back."""
    model.__dict__.pop("forward", None)
