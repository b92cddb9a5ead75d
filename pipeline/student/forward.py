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

from cache_format import Cache
from pipeline.errors import ConfigError
from pipeline.heads import Head
from pipeline.losses import TAIL_POLICIES, UNBIASED, HeadOutput, TailPolicy, fused_head, general_head
from pipeline.student.data import Batch, targets_of


@dataclass(frozen=True, kw_only=True)
class LossRecipe:
    """L = (1 − kd_weight)·CE + kd_weight·temperature²·KL, with the teacher's tail treated by policy."""

    kd_weight: float = 0.9
    temperature: float = 1.0
    tail: TailPolicy = "bucket"
    capture_temperature: float = 1.0  # of the cache

    def __post_init__(self) -> None:
        if not 0.0 <= self.kd_weight <= 1.0:
            raise ConfigError(
                f"--kd-weight {self.kd_weight}: expected a number from 0 (labels only) to 1 (teacher only)."
            )
        if self.temperature <= 0.0:
            raise ConfigError(f"--temperature {self.temperature}: expected a positive number.")
        if self.tail not in TAIL_POLICIES:
            raise ConfigError(f"--tail {self.tail}: expected one of {', '.join(TAIL_POLICIES)}.")

    @classmethod
    def for_cache(
        cls, cache: Cache, *, kd_weight: float, temperature: float | None = None, tail: TailPolicy | None = None
    ) -> LossRecipe:
        """The recipe on a cache's targets; None: what goes with them, unbiased if they are.

        Raises: ConfigError for a policy or temperature that these targets cannot serve, with the reason.
        """
        targets = cache.metadata.targets
        captured, sampled = float(targets["temperature"]), cache.metadata.sampled
        recipe = cls(
            kd_weight=kd_weight,
            temperature=captured if temperature is None else temperature,
            tail=tail or ("sampled" if sampled else "bucket"),
            capture_temperature=captured,
        )
        if recipe.tail == "sampled" and not sampled:
            raise ConfigError(
                f"--tail sampled: {cache.path} has {targets['kind']} targets, exact entries without a sample of the "
                "tail. Use --tail bucket, or cache with --targets threshold."
            )
        if recipe.tail != "sampled" and targets["kind"] == "random":
            raise ConfigError(
                f"--tail {recipe.tail}: {cache.path} has random targets, without any exact entry, and this policy is "
                "not linear in the teacher's probabilities: on a sample it is biased. Use --tail sampled."
            )
        if recipe.temperature != captured and (recipe.tail in UNBIASED or captured != 1.0):
            what = "a sample" if recipe.tail in UNBIASED else "truncated targets"
            raise ConfigError(
                f"--temperature {recipe.temperature}: {cache.path} was captured at temperature {captured}, and {what} "
                f"cannot be tempered afterwards. Use --temperature {captured}, or cache with --temperature "
                f"{recipe.temperature}."
            )
        return recipe

    def for_held_out(self, cache: Cache) -> LossRecipe:
        """The same loss on other targets, by the same policy if they can serve it."""
        serves = cache.metadata.sampled if self.tail == "sampled" else cache.metadata.targets["kind"] != "random"
        return LossRecipe.for_cache(
            cache,
            kd_weight=self.kd_weight,
            temperature=self.temperature,
            tail=self.tail if serves else None,
        )


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
    targets = targets_of(batch, recipe.capture_temperature)
    if head.linear:
        return fused_head(hidden, head.weight, head.bias, targets, **options)
    return general_head(hidden, head.own_logits, targets, **options)


def install_distillation_forward(model: PreTrainedModel, head: Head, recipe: LossRecipe) -> None:
    """Makes `model(scale=…, **batch)` return a `HeadOutput`; `remove_distillation_forward` undoes it."""
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
