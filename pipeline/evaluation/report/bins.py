"""Means over bins of loss tokens: by teacher entropy, by frequency of the true token, by confidence.

Pure numpy; every bin has its number of tokens, since a mean over few says little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVELS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Boundaries in nats, of bins and of the shades of text."""

LEVEL_NAMES = (
    f"< {LEVELS[0]:g}",
    *(f"{a:g}–{b:g}" for a, b in zip(LEVELS, LEVELS[1:], strict=False)),
    f"≥ {LEVELS[-1]:g}",
)
CONFIDENCE_BINS = 10


@dataclass(frozen=True, eq=False, kw_only=True)
class Bins:
    """B bins.

    Attributes:
        names, edges: [B] the range of each, and its lower end.
        counts: [B] loss tokens.
        means: name of a quantity -> [B] its mean over them; NaN without any.
    """

    names: tuple[str, ...]
    edges: tuple[str, ...]
    counts: NDArray[np.int64]
    means: Mapping[str, NDArray[np.float64]]


def level(nats: NDArray[Any]) -> NDArray[np.int64]:
    """The bin from 0 to 7 of each value; estimates of a KL below 0 are in the first."""
    return np.digitize(nats, LEVELS).astype(np.int64)


def by_entropy(entropy: NDArray[Any], values: Mapping[str, NDArray[Any]]) -> Bins:
    """Means of `values` [L] by the teacher's entropy [L]."""
    return _means(LEVEL_NAMES, ["0", *(f"{edge:g}" for edge in LEVELS)], level(entropy), values)


def by_frequency(labels: NDArray[np.int64], values: Mapping[str, NDArray[Any]]) -> Bins:
    """Means of `values` [L] by how often the true token is the true token of any of these L loss tokens.

    The bins are 1, 2–3, 4–7, 8–15, … times.
    """
    occurrences = np.bincount(labels)[labels] if len(labels) else labels
    index = np.log2(occurrences).astype(np.int64)
    edges = [2**i for i in range(int(index.max(initial=0)) + 1)]
    names = [f"{edge:,}–{2 * edge - 1:,}" if edge > 1 else "1" for edge in edges]
    return _means(names, [f"{edge:,}" for edge in edges], index, values)


def by_confidence(confidence: NDArray[Any], right: NDArray[np.bool_]) -> Bins:
    """Mean confidence and share of right predictions in ten equal bins of confidence; NaN confidences are left out."""
    known = ~np.isnan(confidence)
    confidence, right = confidence[known], right[known]
    index = np.minimum((confidence * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
    edges = [f"{i / CONFIDENCE_BINS:.1f}" for i in range(CONFIDENCE_BINS + 1)]
    names = [f"{a}–{b}" for a, b in zip(edges, edges[1:], strict=False)]
    return _means(names, edges[:-1], index, {"confidence": confidence, "right": right})


def _means(
    names: Sequence[str], edges: Sequence[str], index: NDArray[np.int64], values: Mapping[str, NDArray[Any]]
) -> Bins:
    counts = np.bincount(index, minlength=len(names))
    with np.errstate(invalid="ignore"):
        means = {name: np.bincount(index, value, len(names)) / counts for name, value in values.items()}
    return Bins(names=tuple(names), edges=tuple(edges), counts=counts, means=means)
