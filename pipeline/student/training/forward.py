"""The student's forward pass for distillation: token ids and targets in, sums of the loss out.

Installed as the model's own `forward`. Trainer wraps the model (DDP, FSDP, autocast) and calls the wrapper; a loss
computed beside the wrapped module would leave data-parallel ranks with gradients that are never averaged, or find a
sharded weight. Here hidden states, head and loss are all inside that one call.
"""

from __future__ import annotations

import types
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.losses import HeadOutput, fused_head, general_head
from pipeline.losses.uld import uld_head
from pipeline.models.head import Head
from pipeline.student.data.cross_tokenizer import sorted_targets_of
from pipeline.student.data.dataset import Batch, full_targets_of, targets_of
from pipeline.student.model.hidden_state_matching import HiddenStateMatching
from pipeline.student.training.recipe import LossRecipe


class FeatureOutput(NamedTuple):
    """`HeadOutput` of a student that is trained on features besides.

    loss: with γ·features in it, times `scale`.
    features: the sum that γ weights, see `pipeline.student.model.hidden_state_matching`.
    """

    loss: Tensor
    kl: Tensor
    ce: Tensor
    agreement: Tensor
    count: Tensor
    features: Tensor


def distillation_output(
    head: Head,
    batch: Batch,
    recipe: LossRecipe,
    scale: float | Tensor = 1.0,
    features: HiddenStateMatching | None = None,
    *,
    by_row: bool = False,
) -> HeadOutput | FeatureOutput:
    """Sums over the counted positions of a collated batch; `loss` times `scale` carries the gradient.

    Args:
        features: what hidden states are drawn together by, if the batch has the teacher's.
        by_row: sums of each row, [B] instead of scalars: the head runs on a row at a time.
    """
    inputs = batch["input_ids"], batch["position_ids"], batch.get("attention_mask")
    states: dict[int, Tensor] = {}
    if features is None or not features.are_in(batch):
        features, hidden = None, head.hidden_states(*inputs)
    else:
        hidden, states = head.states(features.student_layers, *inputs)
    options = {
        "kd_weight": recipe.kd_weight,
        "temperature": recipe.temperature,
        "tail": recipe.tail,
        "divergence": recipe.mixture,
        "position_weighting": recipe.position_weighting,
        "kl_tail": recipe.kl_tail,
        "scale": scale,
        "vocab_size": head.vocab_size,
    }
    if recipe.teacher is None:
        targets = targets_of(batch, recipe.capture_temperature)
    else:
        targets = full_targets_of(batch, recipe.teacher)

    hidden = hidden.flatten(0, 1)

    def sums(here: slice) -> HeadOutput:
        if recipe.uld:
            ordered = sorted_targets_of(batch)[here]
            return uld_head(hidden[here], head.logits, targets[here], ordered, kd_weight=recipe.kd_weight, scale=scale)
        if head.linear:
            return fused_head(hidden[here], head.weight, head.bias, targets[here], **options)
        return general_head(hidden[here], head.own_logits, targets[here], **options)

    rows, length = batch["labels"].shape
    if by_row:
        found = [sums(slice(i * length, (i + 1) * length)) for i in range(rows)]
        output = HeadOutput(*map(torch.stack, zip(*found, strict=True)))
    else:
        output = sums(slice(None))
    if features is None:
        return output
    drawn = features(states, batch)  # [B]
    drawn = drawn if by_row else drawn.sum()
    loss, *rest = output
    return FeatureOutput(loss + features.weight * scale * drawn, *rest, drawn.detach())


def install_distillation_forward(
    model: torch.nn.Module, head: Head, recipe: LossRecipe, features: HiddenStateMatching | None = None
) -> None:
    """Makes `model(scale=…, recipe=…, by_row=…, **batch)` return a `HeadOutput`, with features a `FeatureOutput`;
    undone by `remove_distillation_forward`.

    Args:
        model: `head.model`, or a wrapper around it.
        recipe: where a call names none.
        features: already part of the model.
    """
    default = recipe

    def forward(
        self: torch.nn.Module,
        scale: float | Tensor = 1.0,
        recipe: LossRecipe | None = None,
        by_row: bool = False,
        **batch: Tensor,
    ) -> HeadOutput | FeatureOutput:
        return distillation_output(head, batch, recipe or default, scale, features, by_row=by_row)

    # On the instance, as a method, so that accelerate can wrap it and the class still saves and loads as itself.
    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]


def remove_distillation_forward(model: torch.nn.Module) -> None:
    """Gives the model its class's own forward back."""
    model.__dict__.pop("forward", None)
