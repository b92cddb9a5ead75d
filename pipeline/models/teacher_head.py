"""The teacher's vocabulary head, from a cache of hidden targets: what makes distributions of its states again.

    logits = c·tanh(s·(W·x + b) / c)          (`cache_format.manifest.stored_head`)

It is no part of any model: a student in training is not wrapped, saved or sharded with it. W stays in the dtype that it
is stored in, V·D numbers on the device, and is widened a block of the vocabulary at a time; products are float32, also
where the student computes in bfloat16, whose logits of 30 would be off by .1. Several students in one process share it;
and where the student's own head is the teacher's and not trained, it is that tensor.

Shapes: n positions, D width of x, V vocabulary.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import cache_format as cf
from pipeline.models.head import Head
from pipeline.models.head_form import TORCH_DTYPES, finished
from pipeline.models.placement import is_here

VOCAB_BLOCK = 8192


@dataclass(eq=False)
class _Numbers:
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


_loaded: weakref.WeakValueDictionary[tuple[str, torch.device], _Numbers] = weakref.WeakValueDictionary()


class TeacherHead:
    """Loaded when it is first used, on the device of the states that it is given.

    Args:
        cache: of hidden targets.
    """

    def __init__(self, cache: cf.Cache) -> None:
        assert cache.metadata.head is not None
        self.cache, self.spec = cache, cache.metadata.head
        self._numbers: _Numbers | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """[n, D] → [n, V] logits, in float32, or float64 of float64 states."""
        numbers = self.load(states.device)
        dtype = torch.promote_types(states.dtype, torch.float32)
        states = states.to(dtype)
        vocab_size = len(numbers.weight)
        if numbers.weight.dtype == dtype:
            logits = states @ numbers.weight.T
        else:
            logits = torch.empty((len(states), vocab_size), dtype=dtype, device=states.device)
            for start in range(0, vocab_size, VOCAB_BLOCK):
                here = slice(start, start + VOCAB_BLOCK)
                logits[:, here] = states @ numbers.weight[here].to(dtype).T
        if numbers.bias is not None:
            logits += numbers.bias
        return finished(logits, self.spec.logit_scale, self.spec.softcap)

    def load(self, device: torch.device | str) -> _Numbers:
        """Raises: FormatError if its file is missing or damaged."""
        device = torch.device(device)
        if self._numbers is None or self._numbers.weight.device != device:
            key = self.spec.sha256, device
            found = _loaded.get(key)
            if found is None:
                stored = self.cache.head()
                assert stored is not None
                bias = None if stored.bias is None else _tensor(stored.bias, self.spec.dtype).to(device)
                found = _loaded[key] = _Numbers(_tensor(stored.weight, self.spec.dtype).to(device), bias)
            self._numbers = found
        return self._numbers

    @torch.no_grad()
    def share(self, head: Head) -> bool:
        """Makes the matrix of a head its own, if that is not trained and the same numbers; whether it is."""
        weight, numbers = head.weight, self._numbers
        if numbers is None or weight.requires_grad or not is_here(weight) or weight.device != numbers.weight.device:
            return False
        weight = weight[: head.vocab_size]
        same = weight.shape == numbers.weight.shape and all(
            torch.equal(ours.float(), theirs.float())
            for ours, theirs in zip(weight.split(VOCAB_BLOCK), numbers.weight.split(VOCAB_BLOCK), strict=True)
        )
        if same:
            numbers.weight = weight.detach()
        return same


def _tensor(values: np.ndarray, dtype: str) -> Tensor:
    """A copy: what is mapped from a file may change under it."""
    bits = torch.from_numpy(np.array(values))
    return bits.view(TORCH_DTYPES[dtype]) if dtype == "bfloat16" else bits
