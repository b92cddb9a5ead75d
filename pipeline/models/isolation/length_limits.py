"""Models that compute differently beyond some length: every document by its own length, whatever shares its batch.

    longrope      one set of rotary frequencies up to `original_max_position_embeddings`, another beyond it (Phi-3)
    dynamic NTK   frequencies of each length beyond `max_position_embeddings`, kept until a shorter batch resets them

transformers (`modeling_rope_utils.dynamic_rope_update`) takes the largest position of a batch for the length of all its
documents, padding included. Inside `by_document` these embeddings are computed once for each kind of length in the
batch, and every document gets the values that it has alone, so that documents on both sides of a limit may share a
batch and a row. It costs a few operations on [B, T, rotary width] and no pass of the model. Models without such
embeddings are not touched.

Shapes: B rows of T positions.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig


@dataclass(frozen=True, kw_only=True)
class LengthLimit:
    """A length beyond which a rotary embedding changes.

    Attributes:
        tokens: the longest document that it does not change for.
        every_length: it differs between any two lengths beyond the limit.
    """

    tokens: int
    every_length: bool = False

    def separates(self, shorter: int, longer: int) -> bool:
        """Whether a token has other values in a document of `longer` tokens than in one of `shorter`."""
        return longer > self.tokens and (self.every_length or shorter <= self.tokens) and longer != shorter

    def kinds(self, lengths: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Places [B, T] of the documents whose lengths count as one, and the position to give to all other places."""
        beyond = lengths > self.tokens
        yield (lengths > 0) & ~beyond, 0
        if not self.every_length:
            yield beyond, self.tokens  # selects the frequencies beyond the limit, without asking whether any is
            return
        for length in lengths[beyond].unique().tolist():
            yield lengths == length, 0


@dataclass(frozen=True)
class LimitedRotary:
    """A rotary embedding with limits, by the type of layers that it is called for; None if it does not tell them."""

    module: nn.Module
    limits: Mapping[str | None, LengthLimit]


def limited_rotaries(model: nn.Module) -> tuple[LimitedRotary, ...]:
    """The rotary embeddings of a model that depend on the length of a document; usually none."""
    found = ((module, _limits(module)) for module in model.modules())
    return tuple(LimitedRotary(module, limits) for module, limits in found if limits)


def _limits(module: nn.Module) -> dict[str | None, LengthLimit]:
    kinds = getattr(module, "rope_type", None)  # what `dynamic_rope_update` reads
    limits: dict[str | None, LengthLimit] = {}
    for layer_type, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
        if kind == "longrope":
            parameters: Any = module.config.rope_parameters
            own = parameters if layer_type is None else parameters[layer_type]
            limits[layer_type] = LengthLimit(tokens=own["original_max_position_embeddings"])
        elif isinstance(kind, str) and "dynamic" in kind:
            limits[layer_type] = LengthLimit(tokens=int(module.original_max_seq_len), every_length=True)
    return limits


def separated(rotaries: Sequence[LimitedRotary], shorter: int, longer: int) -> bool:
    """Whether a model computes a token differently in a document of `longer` tokens than in one of `shorter`."""
    return any(limit.separates(shorter, longer) for each in rotaries for limit in each.limits.values())


@contextlib.contextmanager
def by_document(
    rotaries: Sequence[LimitedRotary], position_ids: Tensor, attention_mask: Tensor | None = None
) -> Iterator[None]:
    """Inside the block a model's forward pass embeds the positions of every document as if it were alone.

    Args:
        rotaries: of the model.
        position_ids: [B, T] of that pass, where a document begins wherever they do not go on by 1.
        attention_mask: [B, T], 0 at padding. Default: no padding.
    """
    if not rotaries:
        yield
        return
    lengths = document_lengths(position_ids, attention_mask)
    hooks = [
        each.module.register_forward_hook(
            functools.partial(_embed_by_document, limits=each.limits, lengths=lengths), with_kwargs=True
        )
        for each in rotaries
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def document_lengths(position_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """[B, T] the length of the document at each place, counted from its position 0; 0 at padding."""
    begins = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1
    document = begins.cumsum(dim=1)
    reached = position_ids + 1 if attention_mask is None else (position_ids + 1) * attention_mask
    lengths = torch.zeros_like(position_ids).scatter_reduce(1, document, reached, "amax").gather(1, document)
    return lengths if attention_mask is None else lengths * attention_mask


def _embed_by_document(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    *,
    limits: Mapping[str | None, LengthLimit],
    lengths: Tensor,
) -> Any:
    """Forward hook of a rotary embedding. Its own output, for the largest position of all, is kept at padding only."""
    call = inspect.signature(module.forward).bind(*args, **kwargs)
    limit = limits.get(call.arguments.get("layer_type"))
    if limit is None:
        return None
    positions = call.arguments["position_ids"]
    values = output if isinstance(output, tuple) else (output,)  # cos and sin, or complex numbers
    for here, elsewhere in limit.kinds(lengths.to(positions.device)):
        if limit.every_length:  # grown frequencies stay for shorter documents, unless all are within the limit
            call.arguments["position_ids"] = torch.zeros_like(positions)
            module.forward(*call.args, **call.kwargs)
        call.arguments["position_ids"] = torch.where(here, positions, elsewhere)
        found = module.forward(*call.args, **call.kwargs)
        found = found if isinstance(found, tuple) else (found,)
        # With a device map, the module may compute on another device than its positions come from.
        values = tuple(
            torch.where(here.unsqueeze(-1).to(new.device), new, old) for new, old in zip(found, values, strict=True)
        )
    return values if isinstance(output, tuple) else values[0]


def longest_packed_row(config: PreTrainedConfig) -> int | None:
    """The longest row that several documents may share; None if there is no limit.

    Llama 4 scales the queries of layers without rotary embeddings by the place in the row, counted in steps of
    `floor_scale` tokens, instead of the position in the document.
    """
    text = config.get_text_config()
    tuned = getattr(text, "attn_temperature_tuning", False) and not all(getattr(text, "no_rope_layers", [1]))
    return text.floor_scale - 1 if tuned else None
