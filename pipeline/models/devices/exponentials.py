"""Sums of exp(z − max z) over the tokens that a sparse loss does not gather, and the gradient through them.

All passes of such a loss over [n, V] logits are here, in two ways with the same results within rounding. Bytes for each
float32 logit with a bfloat16 gradient, beside the 4 that the product writes and the 4 of the two products that read it
(`benchmarks/loss_counts.py`; T is the temperature):

    plain torch       38 at T = 1, 86 at others: maximum, difference, exp, sum, product, rounding, each a pass
    kernels           10 at any T: the sums in one read, the gradient in one read and one write
"""

from __future__ import annotations

from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from pipeline.models.devices import kernels
from pipeline.models.devices.buffers import empty_rows


class Exponentials(Protocol):
    """Sums over z [n, V] that leave out some tokens of each row, and the gradient through them.

    Attributes:
        largest: [n] max z of all tokens.
        lse: [n] log Σ exp(z) of the others.
        tempered_lse: [n] log Σ exp(z/T) of the others.
    """

    largest: Tensor
    lse: Tensor
    tempered_lse: Tensor

    def sum_and_surprise(self) -> tuple[Tensor, Tensor]:
        """[n] Σ e and [n] −Σ e·log e of the others, e = exp(z − largest)."""
        ...

    def gradient(self, d_lse: Tensor, d_tempered_lse: Tensor, dtype: torch.dtype) -> Tensor:
        """[n, V] of a loss with these derivatives [n], and 0 at the tokens that are left out.

        Called once and last: it may overwrite the logits. At T = 1 `d_tempered_lse` is not read.
        """
        ...


def exponentials(logits: Tensor, without: Tensor, temperature: float, smallest: float) -> Exponentials:
    """
    Args:
        logits: [n, V], float32 or wider; is overwritten.
        without: [n, k] tokens that are left out; may name one several times.
        smallest: lower bound of the sums, relative to exp(max z).
    """
    by = kernels.kernels_for(logits)
    if by is None:
        return PlainExponentials(logits, without, temperature, smallest)
    return KernelExponentials(by, logits, without, temperature, smallest)


class PlainExponentials:
    """See `Exponentials`. The exponentials are written over the logits, at T ≠ 1 also over a copy of them."""

    def __init__(self, logits: Tensor, without: Tensor, temperature: float, smallest: float) -> None:
        self._temperature = temperature
        self.largest = largest = logits.amax(dim=1)
        at_1 = logits if temperature == 1.0 else logits.clone()
        self._others, self._total, self.lse = _others(at_1, largest, without, smallest)
        self._at_t, self._total_t, self.tempered_lse = self._others, self._total, self.lse
        if temperature != 1.0:
            tempered = logits.div_(temperature), largest / temperature
            self._at_t, self._total_t, self.tempered_lse = _others(*tempered, without, smallest)

    def sum_and_surprise(self) -> tuple[Tensor, Tensor]:
        # entr(e) = −e·log e = −e·(z − max z), and 0 where e has underflowed.
        return self._others.sum(dim=1), torch.special.entr(self._others).sum(dim=1)

    def gradient(self, d_lse: Tensor, d_tempered_lse: Tensor, dtype: torch.dtype) -> Tensor:
        found = self._others.mul_((d_lse / self._total)[:, None])
        if self._temperature != 1.0:
            found.addcmul_(self._at_t, (d_tempered_lse / (self._temperature * self._total_t))[:, None])
        return found.to(dtype)


class KernelExponentials:
    """See `Exponentials`. The tokens that are left out become -inf in the logits."""

    def __init__(self, by: ModuleType, logits: Tensor, without: Tensor, temperature: float, smallest: float) -> None:
        self._by, self._logits, self._temperature = by, logits, temperature
        at_least = logits.gather(1, without).amax(dim=1)
        logits.scatter_(1, without, -torch.inf)
        self._sums = by.sums(logits, temperature=temperature, at_least=at_least)
        self.largest = self._sums.largest
        self._total, self._total_t = (each.clamp(min=smallest) for each in (self._sums.total, self._sums.tempered))
        self.lse = self._total.log() + self.largest
        self.tempered_lse = self._total_t.log() + self.largest / temperature

    def sum_and_surprise(self) -> tuple[Tensor, Tensor]:
        return self._sums.total, self._sums.surprise

    def gradient(self, d_lse: Tensor, d_tempered_lse: Tensor, dtype: torch.dtype) -> Tensor:
        z = self._logits
        out = z if dtype == z.dtype else empty_rows(len(z), z.shape[1], dtype, z.device)
        tempered = None if self._temperature == 1.0 else d_tempered_lse / (self._temperature * self._total_t)
        self._by.write_gradient(z, self.largest, d_lse / self._total, tempered, self._temperature, out)
        return out


def _others(logits: Tensor, largest: Tensor, without: Tensor, smallest: float) -> tuple[Tensor, Tensor, Tensor]:
    """exp(z − largest) with zeros at `without`, written over the logits [n, V]; its sum [n]; log Σ exp(z) [n]."""
    others = logits.sub_(largest[:, None]).exp_().scatter_(1, without, 0.0)
    total = others.sum(dim=1).clamp_(min=smallest)
    return others, total, total.log() + largest
