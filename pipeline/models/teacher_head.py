"""The teacher's vocabulary head as read from a cache with hidden targets: states in, logits out.

    logits = c·tanh(s·(W·x + b) / c)          (see `head_export`, which writes it)

It is not part of any model, so a student in training is neither wrapped nor saved nor sharded with it. W keeps its
stored dtype, V·D numbers on the device, and is widened one block of the vocabulary at a time. Products are fp32 even if
the student computes in bfloat16, where logits of 30 would be off by 0.1. TF32, the default on GPUs with it, changes
no factor of a float16 or bfloat16 W and float16 states, whose significands fit into its 11 bits; sums are fp32. All
users of a head in one process share it, and if the student's own head is the teacher's and frozen, that tensor is used.

Shapes: n positions, D width of x, V vocabulary.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import cache_format as cf
from pipeline.models.devices.buffers import empty_rows
from pipeline.models.devices.placement import is_here
from pipeline.models.head import Head
from pipeline.models.head_export import TORCH_DTYPES, scaled_and_capped

VOCAB_BLOCK = 8192


@dataclass(eq=False)
class _Weights:
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


_loaded: weakref.WeakValueDictionary[tuple[str, torch.device], _Weights] = weakref.WeakValueDictionary()


class TeacherHead:
    """Loaded on first use, to the device of the states.

    Args:
        cache: a cache with hidden targets.
    """

    def __init__(self, cache: cf.Cache) -> None:
        assert cache.metadata.head is not None
        self.cache, self.spec = cache, cache.metadata.head
        self._weights: _Weights | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """[n, D] → [n, V] logits, in float64 for float64 states and float32 otherwise."""
        weights = self.load(states.device)
        dtype = torch.promote_types(states.dtype, torch.float32)
        states = states.to(dtype)
        vocab_size = len(weights.weight)
        if weights.weight.dtype == dtype:
            logits = states @ weights.weight.T
        else:
            logits = empty_rows(len(states), vocab_size, dtype, states.device)
            for start in range(0, vocab_size, VOCAB_BLOCK):
                here = slice(start, start + VOCAB_BLOCK)
                logits[:, here] = states @ weights.weight[here].to(dtype).T
        if weights.bias is not None:
            logits += weights.bias
        return scaled_and_capped(logits, self.spec.logit_scale, self.spec.softcap)

    def load(self, device: torch.device | str) -> _Weights:
        """W [V, D] and b [V] on `device`.

        Raises:
            FormatError: the file of the head is missing or damaged.
        """
        device = torch.device(device)
        if self._weights is None or self._weights.weight.device != device:
            key = self.spec.sha256, device
            found = _loaded.get(key)
            if found is None:
                stored = self.cache.head()
                assert stored is not None
                bias = None if stored.bias is None else _tensor(stored.bias, self.spec.dtype).to(device)
                found = _loaded[key] = _Weights(_tensor(stored.weight, self.spec.dtype).to(device), bias)
            self._weights = found
        return self._weights

    @torch.no_grad()
    def share(self, head: Head) -> bool:
        """Use the matrix of `head` instead of an own copy, if it is frozen and has the same values; return whether."""
        weight, weights = head.weight, self._weights
        if weights is None or weight.requires_grad or not is_here(weight) or weight.device != weights.weight.device:
            return False
        weight = weight[: head.vocab_size]
        same = weight.shape == weights.weight.shape and all(
            torch.equal(ours.float(), theirs.float())
            for ours, theirs in zip(weight.split(VOCAB_BLOCK), weights.weight.split(VOCAB_BLOCK), strict=True)
        )
        if same:
            weights.weight = weight.detach()
        return same


def _tensor(values: np.ndarray, dtype: str) -> Tensor:
    """A copy, because a memory-mapped file may change."""
    bits = torch.from_numpy(np.array(values))
    return bits.view(TORCH_DTYPES[dtype]) if dtype == "bfloat16" else bits
