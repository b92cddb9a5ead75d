"""One byte per log-probability: rounding to a table of at most 256 float32 values.

Each shard holds the table as an Arrow dictionary, so that any Arrow reader shows log-probabilities; the manifest
repeats it. Rounding takes the nearest value **in the square root of the probability**, where the Fisher metric of a
categorical distribution is Euclidean: uniform steps there put the levels where a KL divergence is sensitive. Levels:

    sqrt(p) = i / n   for i = 2 .. n,   and below 2/n geometric with ratio 2/3, down to `smallest`

With the geometric levels no p above `smallest` changes by more than a factor of 1.57 (2 ln 1.25 = 0.45 nats). Weights
of an unbiased estimate need small errors of p near 1 as well, so `weight_codebook` has levels uniform in arcsin(√p).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cache_format.manifest.fields import CODEBOOK, check_fields

MAX_LEVELS = 256
Domain = Literal["sqrt_probability", "sqrt_value"]
ROUNDING = 1e-3  # nats by which a float32 log-softmax or entropy may overshoot its range
JOIN = 2  # uniform level at which the geometric tail starts

Float64 = NDArray[np.float64]
TO_DOMAIN: dict[Domain, Callable[[Float64], Float64]] = {
    "sqrt_probability": lambda logprob: np.exp(logprob / 2),
    "sqrt_value": np.sqrt,
}
FROM_DOMAIN: dict[Domain, Callable[[Float64], Float64]] = {
    "sqrt_probability": lambda root: 2 * np.log(root),
    "sqrt_value": np.square,
}


@dataclass(frozen=True, eq=False)
class Codebook:
    """An ascending table of float32 values, and the domain in which the nearest value is chosen."""

    name: str
    domain: Domain
    values: NDArray[np.float32]  # [L], L <= 256

    def __post_init__(self) -> None:
        values = np.array(self.values, np.float32)
        if self.domain not in TO_DOMAIN:
            raise ValueError(f"codebook {self.name}: unknown domain {self.domain!r}")
        if values.ndim != 1 or not 1 <= len(values) <= MAX_LEVELS:
            raise ValueError(f"codebook {self.name}: {values.shape} values, expected up to 256")
        if np.isnan(values).any() or not (values[1:] > values[:-1]).all():
            raise ValueError(f"codebook {self.name}: values must ascend, without NaN")
        if self.domain == "sqrt_probability" and values[-1] > 0:
            raise ValueError(f"codebook {self.name}: log-probability {values[-1]} above 0")
        if self.domain == "sqrt_value" and not (values[0] >= 0 and np.isfinite(values[-1])):
            raise ValueError(f"codebook {self.name}: values must be finite and not negative")
        values.setflags(write=False)
        object.__setattr__(self, "values", values)

    @cached_property
    def _levels(self) -> Float64:
        return TO_DOMAIN[self.domain](self.values.astype(np.float64))

    @cached_property
    def _thresholds(self) -> NDArray[np.float32]:
        # Both domains are monotone, so midpoints are mapped back once: no exp per value.
        midpoints = (self._levels[1:] + self._levels[:-1]) / 2
        return FROM_DOMAIN[self.domain](midpoints).astype(np.float32)

    @cached_property
    def max_error(self) -> float:
        """Largest |x - decode(encode(x))| in the domain, rounded up to three digits."""
        half_gap = float(np.diff(self._levels).max(initial=0.0)) / 2
        error = max(half_gap, float(self._levels[0]))  # lower values take the lowest level
        if not error:  # 0 is the only value
            return 0.0
        digit = 10.0 ** (math.floor(math.log10(error)) - 2)
        return float(f"{math.ceil(error / digit + 1e-3) * digit:.3g}")

    def invalid(self, values: NDArray[np.float32]) -> NDArray[np.bool_]:
        """[n] True where a value is NaN, or out of range by more than float32 rounding explains."""
        inside: NDArray[np.bool_] = values <= self.values[-1] + ROUNDING  # False for NaN
        if self.domain == "sqrt_value":
            inside &= values >= self.values[0] - ROUNDING
        return ~inside

    def encode(self, values: ArrayLike) -> NDArray[np.uint8]:
        """Codes of the nearest values; values below the lowest level take the lowest.

        Raises: ValueError for NaN and for values above the highest level.
        """
        values = np.asarray(values, np.float32)
        if (invalid := self.invalid(values)).any():
            raise ValueError(f"codebook {self.name}: {values[invalid][0]} is out of range")
        return np.searchsorted(self._thresholds, values).astype(np.uint8)

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.values.take(codes)

    def rounded_from(self, values: ArrayLike) -> tuple[Float64, Float64]:
        """(low, high): bounds before rounding of values of this table."""
        codes = np.searchsorted(self._thresholds, np.asarray(values, np.float32))
        lowest = -np.inf if self.domain == "sqrt_probability" else 0.0
        edges = np.concatenate([[lowest], self._thresholds, [self.values[-1] + ROUNDING]]).astype(np.float64)
        return edges[codes], edges[codes + 1]

    def including(self, value: float) -> Codebook:
        """The codebook with `value` added. In a full table it replaces the nearest value, but never the last one."""
        new, kept = np.float32(value), self.values
        if new in kept:
            return self
        if len(kept) == MAX_LEVELS:
            kept = np.delete(kept, min(int(self.encode(new)), len(kept) - 2))
        return replace(self, values=np.sort(np.append(kept, new)))

    def to_json(self) -> dict[str, Any]:
        # str() of a float32 is the shortest decimal that reads back as the same float32.
        values = [float(str(v)) if np.isfinite(v) else "-inf" for v in self.values]
        return {
            "name": self.name,
            "domain": self.domain,
            "max_error": self.max_error,
            "values": values,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Codebook:
        """Raises: ValueError."""
        check_fields(data, CODEBOOK, "codebook")
        values = np.array([float(value) for value in data["values"]], np.float32)
        return cls(data["name"], data["domain"], values)


def sqrt_probability_codebook(levels: int = MAX_LEVELS, *, smallest: float | None = 1e-12) -> Codebook:
    """Log-probabilities uniform in sqrt(p), p = 1 included.

    Args:
        levels: number of values, at most 256.
        smallest: lowest probability, reached with geometric levels; None for uniform levels only.
    """
    return Codebook("sqrt-probability", "sqrt_probability", _logprobs(levels, smallest))


def weight_codebook(levels: int, weight: float) -> Codebook:
    """Codebook of an unbiased estimate: `weight` exactly, the others uniform in arcsin(sqrt(p)), p = 1 included.

    Args:
        levels: number of values, at most 256.
        weight: weight of a sampled entry, in (0, 1].
    """
    if levels > MAX_LEVELS:
        raise ValueError(f"too many, expected up to {MAX_LEVELS}")
    values = _logprobs(levels - 1, 1e-12, lambda share: np.sin(np.pi / 2 * share))
    return Codebook("arcsine", "sqrt_probability", values).including(math.log(weight))


def residual_codebook(levels: int = MAX_LEVELS, *, smallest: float | None = 1e-12) -> Codebook:
    """Log of the tail mass m, uniform in sqrt(m), with m = 0 (-inf) as the first value."""
    values = np.concatenate([[-np.inf], _logprobs(levels - 1, smallest)])
    return Codebook("sqrt-residual", "sqrt_probability", values.astype(np.float32))


def entropy_codebook(vocab_size: int, levels: int = MAX_LEVELS) -> Codebook:
    """Entropies from 0 to log(vocab_size) nats, uniform in their square root."""
    values = math.log(vocab_size) * np.linspace(0, 1, levels) ** 2
    return Codebook("sqrt-entropy", "sqrt_value", values.astype(np.float32))


def _logprobs(
    levels: int, smallest: float | None, spacing: Callable[[Float64], Float64] = lambda share: share
) -> NDArray[np.float32]:
    """[levels] log p; `spacing` maps i/n to sqrt(p), 0 to 0 and 1 to 1."""
    if smallest is None:
        roots = spacing(np.arange(1, levels + 1) / levels)
    else:
        ratio = JOIN / (JOIN + 1)
        for tail in range(levels - JOIN):
            uniform = levels - tail + JOIN - 1
            roots = spacing(np.arange(JOIN, uniform + 1) / uniform)
            if (roots[0] * ratio**tail) ** 2 <= smallest:
                break
        else:
            raise ValueError(f"too few to reach down to probability {smallest}")
        roots = np.concatenate([roots[0] * ratio ** np.arange(tail, 0, -1), roots])
    return (2 * np.log(roots)).astype(np.float32)
