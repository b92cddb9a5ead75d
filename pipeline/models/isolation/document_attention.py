"""Attention over documents that lie end to end, without padding and without a mask.

    rows [B, T] ─▶ the tokens of all documents [1, N] ─▶ body; its attention layers are told where documents begin
                ─▶ states [B, T, D]

A mask that keeps the documents of a row apart has T² entries, and flash attention takes none. Attention is computed

    in one kernel         `torch.nn.attention.varlen`, on CUDA in float16 and bfloat16
    document by document  elsewhere, by `scaled_dot_product_attention`; windows, soft caps and attention sinks by blocks
                          of queries, so that no tensor has T² elements there either

The models of transformers look up their attention by name (`AttentionInterface`) and pass on the arguments that they do
not know; `Documents` is such an argument. Calls without it, such as those of `generate`, get the attention that the
model had before. Whether a model takes part is found by running it (`attends_by_document`).

Shapes: N tokens of S documents, H heads of queries, G heads of keys and values, C width of a head.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from pipeline.models.padding import PackedRow

QUERIES = 512
"""Queries per block where a window, a soft cap or sinks are computed here."""

NAMES = {"sdpa": "distill_sdpa", "eager": "distill_eager"}
"""Attention of a model: its name once documents may be given."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Documents:
    """The documents of a padded batch [B, T], in the order of rows.

    Attributes:
        lengths: of each, known to the host.
        starts: [S + 1] int32, where each begins among the N tokens, and N.
        places: [N] int64, of each token among the B·T of the batch.
    """

    lengths: tuple[int, ...]
    starts: Tensor
    places: Tensor

    @classmethod
    def of_rows(cls, rows: Sequence[PackedRow]) -> Documents:
        """Of rows that are padded to the longest one."""
        longest = max(len(row.input_ids) for row in rows)
        lengths = np.concatenate([np.asarray(row.segment_lengths, np.int64) for row in rows])
        lengths = lengths[lengths > 0]
        places = [i * longest + np.arange(len(row.input_ids)) for i, row in enumerate(rows)]
        return cls(
            lengths=tuple(lengths.tolist()),
            starts=torch.from_numpy(np.append(0, lengths.cumsum()).astype(np.int32)),
            places=torch.from_numpy(np.concatenate(places)),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Documents:
        starts, places = (each.to(device, non_blocking=non_blocking) for each in (self.starts, self.places))
        return Documents(lengths=self.lengths, starts=starts, places=places)

    def pin_memory(self) -> Documents:
        return Documents(lengths=self.lengths, starts=self.starts.pin_memory(), places=self.places.pin_memory())

    def flat(self, values: Tensor) -> Tensor:
        """[B, T, …] → [1, N, …]"""
        return values.flatten(0, 1)[self.places.to(values.device)][None]

    def padded(self, states: Tensor, shape: tuple[int, ...]) -> Tensor:
        """[1, N, D] → [B, T, D], 0 at padding."""
        batch = states.new_zeros((shape[0] * shape[1], states.shape[-1]))
        return batch.index_copy(0, self.places.to(states.device), states[0]).view(*shape, -1)

    def arguments(self, device: torch.device) -> dict[str, Any]:
        """What the model's body gets besides tokens and positions.

        A mask of four dimensions is passed on as it is: no other one is made, which would take T² elements and, to find
        out whether documents are packed, make the host wait.
        """
        return {"documents": self, "attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)}


def attends_by_document(model: PreTrainedModel) -> bool:
    """Lets the attention layers of a model take `Documents`; False if they are not ones that can.

    Whether the numbers are right is for the caller to test.
    """
    configs = _configs(model)
    if not all(config._attn_implementation in (*NAMES, *NAMES.values()) for config in configs):
        return False
    for config in configs:
        config._attn_implementation = NAMES.get(config._attn_implementation, config._attn_implementation)
    return True


def forget_documents(model: PreTrainedModel) -> None:
    """Gives a model its own attention back."""
    before = {name: given for given, name in NAMES.items()}
    for config in _configs(model):
        config._attn_implementation = before.get(config._attn_implementation, config._attn_implementation)


def longest_reach(config: PreTrainedConfig) -> int:
    """The largest window or chunk of attention that a configuration mentions; 0: none."""
    values = config.get_text_config().to_dict().items()
    reaches = [value for name, value in values if isinstance(value, int) and ("window" in name or "chunk" in name)]
    return max(reaches, default=0)


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    found = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    return list(found.values())


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    otherwise: Callable[..., tuple[Tensor, Tensor | None]],
    documents: Documents | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a layer, as transformers calls it: [1, H, N, C], [1, G, N, C] → [1, N, H, C].

    Args:
        otherwise: computes it when there are no documents.

    Raises:
        NotImplementedError: the layer asks for what is not computed here.
    """
    if documents is None:
        return otherwise(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    return _by_document(module, query, key, value, documents, dropout, scaling, options)


@torch.compiler.disable  # compiled code would be that of these lengths alone
def _by_document(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    dropout: float,
    scaling: float | None,
    options: dict[str, Any],
) -> tuple[Tensor, None]:
    """[1, H, N, C], [1, G, N, C] → [1, N, H, C]"""
    window, softcap, sinks = (options.get(name) for name in ("sliding_window", "softcap", "s_aux"))
    causal = options.get("is_causal")
    if options.get("position_bias") is not None or not (
        getattr(module, "is_causal", True) if causal is None else causal
    ):
        raise NotImplementedError("attention that is not causal, or has a position bias")
    if torch.is_autocast_enabled(query.device.type):  # as for scaled_dot_product_attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    heads = [each[0] for each in (query, key, value)]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None and sinks is None and not dropout and _takes_kernel(query, value):
        found = _in_one_kernel((heads[0], heads[1], heads[2]), documents, scale, window)
    else:
        compute = partial(_document, scale=scale, dropout=dropout, window=window, softcap=softcap, sinks=sinks)
        pieces = zip(*(each.split(documents.lengths, dim=1) for each in heads), strict=True)
        found = torch.cat([compute(*piece) for piece in pieces], dim=1).transpose(0, 1)
    return found[None], None


@functools.cache
def _kernel() -> Callable[..., Tensor] | None:
    """torch's kernel for documents that lie end to end, if this version has one with windows and grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= known.keys() else None


def _takes_kernel(query: Tensor, value: Tensor) -> bool:
    width = query.shape[-1]
    if _kernel() is None or not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16) or width % 8:
        return False
    return width == value.shape[-1] <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _in_one_kernel(
    heads: tuple[Tensor, Tensor, Tensor], documents: Documents, scale: float, window: int | None
) -> Tensor:
    """Queries, keys and values [H, N, C] → [N, H, C]"""
    kernel = _kernel()
    assert kernel is not None
    query, key, value = (each.transpose(0, 1) for each in heads)
    starts, longest = documents.starts.to(query.device), max(documents.lengths)
    return kernel(
        query,
        key,
        value,
        starts,
        starts,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of one document: [H, T, C], [G, T, C] → [H, T, C].

    Args:
        window: number of tokens that a token attends to, itself included.
        softcap: scores s become softcap · tanh(s / softcap).
        sinks: [H] scores that take part in the softmax and add nothing.
    """
    length, groups = query.shape[1], len(query) // len(key)
    within = window is None or length <= window
    if within and softcap is None and sinks is None:
        batch = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        grouped = groups > 1 and _takes_groups(*batch, dropout)
        if groups > 1 and not grouped:
            batch = batch[0], *(each.repeat_interleave(groups, dim=1) for each in batch[1:])
        options = {"dropout_p": dropout, "is_causal": length > 1, "scale": scale, "enable_gqa": grouped}
        return scaled_dot_product_attention(*batch, **options).squeeze(0)
    key, value = (each.repeat_interleave(groups, dim=0) for each in (key, value))
    return torch.cat([*_blocks(query, key, value, scale, dropout, None if within else window, softcap, sinks)], dim=1)


def _takes_groups(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether several heads of queries may share keys and values without a tensor of H·T² scores.

    On CUDA only flash attention can: float32, a GPU before Ampere and values of another width get the plain kernel.
    """
    return not query.is_cuda or can_use_flash_attention(SDPAParams(query, key, value, None, dropout, True, True))


def _blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Iterator[Tensor]:
    for start in range(0, query.shape[1], QUERIES):
        stop = min(start + QUERIES, query.shape[1])
        first = 0 if window is None else max(0, start + 1 - window)
        behind = torch.arange(start, stop, device=query.device)[:, None] - torch.arange(
            first, stop, device=query.device
        )
        seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        q, k, v = query[:, start:stop], key[:, first:stop], value[:, first:stop]
        if softcap is None and sinks is None:
            batch = q[None], k[None], v[None]
            yield scaled_dot_product_attention(*batch, attn_mask=seen, dropout_p=dropout, scale=scale)[0]
        else:  # its scores are computed again for the gradient instead of being kept
            yield checkpoint(_scored, q, k, v, seen, scale, dropout, softcap, sinks, use_reentrant=False)


def _scored(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scale: float,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with its scores written out: [H, n, C], [H, m, C], seen [n, m] → [H, n, C]."""
    scores = query @ key.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(-1, 1, 1).expand(-1, scores.shape[1], 1)], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights[..., : key.shape[1]], p=dropout)
    return weights @ value


def _eager(module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """The plain attention of a model, which each has in its own file."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **options)  # type: ignore[no-any-return]


AttentionInterface.register(NAMES["sdpa"], partial(attention, otherwise=sdpa_attention_forward))
AttentionInterface.register(NAMES["eager"], partial(attention, otherwise=_eager))
AttentionMaskInterface.register(NAMES["sdpa"], sdpa_mask)
AttentionMaskInterface.register(NAMES["eager"], eager_mask)
