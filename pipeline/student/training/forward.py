"""The student's forward pass for distillation: token ids and targets in, sums of the loss out.

Installed as the model's own `forward`. Trainer wraps the model (DDP, FSDP, autocast) and calls the wrapper; if the loss
were computed outside the wrapped module, data-parallel processes would not average gradients, and sharded weights would
be missing. Here hidden states, head and loss are all inside that one call.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.losses import DistillLoss, HeadOutput, Targets, fused_head, general_head
from pipeline.models.head import Head
from pipeline.student.data.dataset import Batch, with_target_states
from pipeline.student.model.hidden_state_matching import HiddenStateMatching

SET_BY_RUN = ("forward", "_original_forward", "_is_accelerate_prepared")
"""Attributes of a model by which accelerate and `install_distillation_forward` change its forward pass."""


class FeatureOutput(NamedTuple):
    """`HeadOutput` of a student that is also trained on hidden states.

    loss: includes γ·features, times `scale`.
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
    loss: DistillLoss,
    scale: float | Tensor = 1.0,
    matching: HiddenStateMatching | None = None,
    *,
    by_row: bool = False,
) -> HeadOutput | FeatureOutput:
    """Sums over the loss tokens of a collated batch; `loss` of the output, times `scale`, carries the gradient.

    Args:
        matching: the hidden-state loss, used if the batch has the teacher's states.
        by_row: sums of each row, [B] instead of scalars: the head runs on one row at a time.
    """
    inputs = batch["input_ids"], batch["position_ids"], batch.get("attention_mask")
    documents = batch.get("documents")
    states: dict[int, Tensor] = {}
    if matching is not None:
        batch = with_target_states(batch)
    if matching is None or not matching.are_in(batch):
        matching, hidden = None, head.hidden_states(*inputs, documents=documents)
    else:
        hidden, states = head.states(matching.student_layers, *inputs, documents=documents)
    hidden, targets = hidden.flatten(0, 1), batch["targets"]

    def sums(hidden: Tensor, targets: Targets) -> HeadOutput:
        if head.linear:
            return fused_head(hidden, head.weight, head.bias, targets, loss, scale=scale, vocab_size=head.vocab_size)
        return general_head(hidden, head.own_logits, targets, loss, scale=scale, vocab_size=head.vocab_size)

    rows, length = batch["labels"].shape
    if by_row:
        places = [slice(i * length, (i + 1) * length) for i in range(rows)]
        outputs = [sums(hidden[here], targets[here]) for here in places]
        output = HeadOutput(*map(torch.stack, zip(*outputs, strict=True)))
    else:
        output = sums(hidden, targets)
    if matching is None:
        return output
    distance = matching(states, batch)  # [B]
    distance = distance if by_row else distance.sum()
    loss_sum = output.loss + matching.weight * scale * distance
    return FeatureOutput(loss_sum, output.kl, output.ce, output.agreement, output.count, distance.detach())


def install_distillation_forward(
    model: torch.nn.Module, head: Head, loss: DistillLoss, matching: HiddenStateMatching | None = None
) -> None:
    """Makes `model(scale=…, loss=…, by_row=…, **batch)` return a `HeadOutput`, or a `FeatureOutput` with `matching`.

    `own_forward` undoes it.

    Args:
        model: `head.model`, or a wrapper around it.
        loss: for calls without one.
        matching: already part of the model.
    """
    default = loss

    def forward(
        self: torch.nn.Module,
        scale: float | Tensor = 1.0,
        loss: DistillLoss | None = None,
        by_row: bool = False,
        **batch: Any,
    ) -> HeadOutput | FeatureOutput:
        return distillation_output(head, batch, loss or default, scale, matching, by_row=by_row)

    # On the instance, as a method, so that accelerate can wrap it and the class still saves and loads as itself.
    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]


@contextmanager
def own_forward(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block a model has no forward but its class's and is not prepared by accelerate, which would leave it
    as it is and ignore the precision of the run; afterwards it is as it was before."""
    own = vars(model)
    before = {name: own.pop(name) for name in SET_BY_RUN if name in own}
    try:
        yield
    finally:
        for name in SET_BY_RUN:
            own.pop(name, None)
        own.update(before)
