"""The softmax of a chunk of teacher logits, as far as `selection` looks at it, in two ways that differ by rounding.

    plain torch       [n, V] probabilities in a buffer; block maxima, softmax, block sums and Σp·z are separate passes
    kernels           probabilities only where they are asked for; one read for the block maxima and Σ exp, one for the
                      block sums and Σ p·log p over the tokens outside the exact entries

**Top-K without looking at everything twice.** The K largest of V values lie in the K blocks with the largest maxima.
So: maxima of V/b blocks, the K best blocks, and a selection among their K·b values. With b = 32 and K = 64 the
selection sees 3,600 values instead of 49,152; exact, ties included in the sense that some valid top-K is returned,
and a function of the row alone, whatever shares the chunk.

Shapes: n positions, V vocabulary, C candidates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from pipeline.models.devices import kernels

BLOCK = 32

CPU_POSITIONS = 64
"""Positions that a CPU looks at together: its caches still hold their logits at the second pass."""


class Outside(Protocol):
    """The probabilities of a softmax with zeros at the exact entries."""

    def block_sums(self) -> Tensor:
        """[n, ⌈V/BLOCK⌉] sums of consecutive tokens."""
        ...

    def sum(self) -> Tensor:
        """[n]"""
        ...

    def of(self, ids: Tensor) -> Tensor:
        """[n, k] probabilities of tokens `ids` [n, k]."""
        ...

    def expected_logit(self) -> Tensor:
        """[n] Σ p·z, z the logits divided by T. Called last: it may overwrite the probabilities."""
        ...


class Softmax(Protocol):
    """softmax(logits / T) of [n, V] logits."""

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        """[n, C] largest logits divided by T, float32, largest first; and their ids."""
        ...

    def probabilities(self, values: Tensor, ids: Tensor) -> Tensor:
        """[n, C] of what `top` has found. They sum to one within rounding; `Outside` has the same normaliser."""
        ...

    def outside(self, ids: Tensor, probabilities: Tensor, keep: Tensor) -> contextlib.AbstractContextManager[Outside]:
        """
        Args:
            ids, probabilities: [n, C] of `top`. keep: [n, C] bool, which of them are exact entries.
        """
        ...


def softmax_of(logits: Tensor, temperature: float, scratch: Tensor | None) -> Softmax:
    """
    Args:
        logits: [n, V] of any dtype; unchanged in the end.
        scratch: [≥n, V] of `scratch_for`.
    """
    by = kernels.kernels_for(logits)
    return PlainSoftmax(logits, temperature, scratch) if by is None else KernelSoftmax(by, logits, temperature)


def scratch_for(vocab_size: int, device: torch.device) -> Tensor | None:
    """Buffer for `softmax_of` on a CPU, where a fresh tensor of this size costs more in page faults than the softmax
    that fills it; None for a GPU, whose allocator hands out again what was freed."""
    shape = CPU_POSITIONS, vocab_size
    return torch.empty(shape, dtype=torch.float32, device=device) if device.type == "cpu" else None


class PlainSoftmax:
    """See `Softmax`."""

    def __init__(self, logits: Tensor, temperature: float, scratch: Tensor | None) -> None:
        logits = logits.float()
        self._logits = logits if temperature == 1.0 else logits / temperature
        self._scratch = scratch

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        return top_k(self._logits, count)

    def probabilities(self, values: Tensor, ids: Tensor) -> Tensor:
        out = None if self._scratch is None else self._scratch[: len(values)]
        self._probs = torch.softmax(self._logits, dim=1, out=out)  # [n, V]
        return self._probs.gather(1, ids)

    @contextlib.contextmanager
    def outside(self, ids: Tensor, probabilities: Tensor, keep: Tensor) -> Iterator[Outside]:
        left = probabilities.masked_fill(keep, 0.0)
        yield PlainOutside(self._probs.scatter_(1, ids, left), self._logits)


class PlainOutside:
    """See `Outside`."""

    def __init__(self, probs: Tensor, logits: Tensor) -> None:
        self._probs, self._logits = probs, logits

    def block_sums(self) -> Tensor:
        return block_sums(self._probs)

    def sum(self) -> Tensor:
        return self._probs.sum(dim=1)

    def of(self, ids: Tensor) -> Tensor:
        return self._probs.gather(1, ids)

    def expected_logit(self) -> Tensor:
        # In place: the product of a `vecdot` is a fresh [n, V] tensor, whose page faults cost more than all the rest.
        return self._probs.mul_(self._logits).sum(dim=1)


class KernelSoftmax:
    """See `Softmax`. While there is an `outside`, the exact entries are -inf in the logits."""

    def __init__(self, by: ModuleType, logits: Tensor, temperature: float) -> None:
        self._by, self._logits, self._temperature = by, logits.detach(), temperature
        self._sums = by.sums(self._logits, temperature=temperature, block=BLOCK)

    def top(self, count: int) -> tuple[Tensor, Tensor]:
        values, ids = top_k(self._logits, count, self._sums.block_maxima)
        return values.float() / self._temperature, ids

    def probabilities(self, values: Tensor, ids: Tensor) -> Tensor:
        return self._probabilities(self._logits.gather(1, ids))

    @contextlib.contextmanager
    def outside(self, ids: Tensor, probabilities: Tensor, keep: Tensor) -> Iterator[Outside]:
        before = self._logits.gather(1, ids)
        self._logits.scatter_(1, ids, before.masked_fill(keep, -torch.inf))
        try:
            yield KernelOutside(self)
        finally:
            self._logits.scatter_(1, ids, before)

    def _probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities of the tokens with these k logits [n, k]."""
        below = logits.float() - self._sums.largest[:, None]
        return (below / self._temperature).exp() / self._sums.tempered[:, None]


class KernelOutside:
    """See `Outside`."""

    def __init__(self, softmax: KernelSoftmax) -> None:
        self._softmax = softmax

    @cached_property
    def _walk(self) -> tuple[Tensor, Tensor]:
        """Block sums of probabilities, and Σ p·(z − max z)/T; NaN where a logit is not finite."""
        by, logits, sums = self._softmax._by, self._softmax._logits, self._softmax._sums
        blocks, logarithms = by.block_sums(logits, sums.largest, temperature=self._softmax._temperature, block=BLOCK)
        logarithms = torch.where(sums.finite, logarithms / sums.tempered, torch.nan)
        return blocks / sums.tempered[:, None], logarithms

    def block_sums(self) -> Tensor:
        return self._walk[0]

    def sum(self) -> Tensor:
        return self._walk[0].sum(dim=1)

    def of(self, ids: Tensor) -> Tensor:
        return self._softmax._probabilities(self._softmax._logits.gather(1, ids))

    def expected_logit(self) -> Tensor:
        return self._walk[1] + self.sum() * (self._softmax._sums.largest / self._softmax._temperature)


def block_sums(values: Tensor) -> Tensor:
    """[n, ⌈V/BLOCK⌉] sums of consecutive columns of [n, V]."""
    whole = values.shape[1] // BLOCK * BLOCK
    sums = values[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=2)
    if whole == values.shape[1]:
        return sums
    return torch.cat([sums, values[:, whole:].sum(dim=1, keepdim=True)], dim=1)


def top_k(values: Tensor, k: int, maxima: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`values.topk(k)` over rows of [n, V], by blocks: largest first.

    Args:
        maxima: [n, ≥V//BLOCK] of the blocks, if they are known.
    """
    n, width = values.shape
    blocks = width // BLOCK
    if k * BLOCK * 2 >= width:
        return values.topk(k, dim=1)
    blocked = values[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))
    maxima = blocked.amax(dim=2) if maxima is None else maxima[:, :blocks]
    best = maxima.topk(k, dim=1, sorted=False).indices  # [n, k]
    candidates = blocked[torch.arange(n, device=values.device)[:, None], best].flatten(1)  # [n, k·BLOCK]
    if blocks * BLOCK < width:  # the ragged end is always looked at, as one more block
        candidates = torch.cat([candidates, values[:, blocks * BLOCK :]], dim=1)
        best = torch.nn.functional.pad(best, (0, 1), value=blocks)
    top, where = candidates.topk(k, dim=1)
    return top, best.gather(1, where // BLOCK) * BLOCK + where % BLOCK
