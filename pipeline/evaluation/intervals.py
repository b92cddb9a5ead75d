"""From sums by row to metrics with confidence intervals, and the paired comparison of two students.

Positions of a row are correlated, so rows are the units: intervals come from a bootstrap over rows (1,000 samples of R
out of R with replacement, fixed seed), as ± 1.96 standard deviations of the metric over the samples. Two students are
compared on the same samples, which cancels what makes a row hard for both.

Cost: 1,000 products [R] · [R, columns].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.measures import BIN_SUMS, BINS, DRAFTS, column_names
from pipeline.losses import KlEstimateKind

SAMPLES = 1000
Z95 = 1.96
COLUMN = {name: i for i, name in enumerate(column_names())}
HIGHER_IS_BETTER = ("agreement", "top5_agreement", "acceptance", "tokens_")

Table = NDArray[np.float64]
Relation = KlEstimateKind | Literal["upper bound"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """value ± error is the 95 % confidence interval over rows; None with fewer than two rows.

    relation: of the value to that of the full distributions.
    """

    value: float
    error: float | None
    relation: Relation


@dataclass(frozen=True, kw_only=True)
class Supported:
    """Which metrics the targets of a cache can give.

    Attributes:
        kl: relation of the KL.
        sampled: whether entries are a sample.
        ranks: whether the teacher's most likely token is known.
        calibrates: whether its probability of one token at temperature 1 is.
        accepts: whether the acceptance can be bounded.
    """

    kl: KlEstimateKind
    sampled: bool = False
    ranks: bool = True
    calibrates: bool = True
    accepts: bool = True


def values(sums: Table, supported: Supported) -> dict[str, tuple[Table, Relation]]:
    """Metrics of sums over rows, [S, columns] → [S] each. Means over loss tokens; nats."""

    def column(name: str) -> Table:
        return sums[:, COLUMN[name]]

    def bins(name: str) -> Table:
        return sums[:, [COLUMN[f"{name}_{i}"] for i in range(BINS)]]

    with np.errstate(divide="ignore", invalid="ignore"):
        count = column("count")
        confidence, correct, teacher, _ = map(bins, BIN_SUMS)
        ce = column("ce") / count
        found: dict[str, tuple[Table, Relation]] = {
            "kl": (column("kl") / count, supported.kl),
            "ce": (ce, "full"),
            "perplexity": (np.exp(np.minimum(ce, 700.0)), "full"),
            "agreement": (column("agreement") / count, "full" if supported.ranks else "estimate"),
        }
        if supported.ranks:
            found["top5_agreement"] = (column("top5_agreement") / count, "full")
        found["ece"] = (np.abs(correct - confidence).sum(axis=1) / count, "full")
        exact = supported.kl == "full"
        if supported.calibrates:
            error = np.abs(teacher - confidence).sum(axis=1) / count
            if exact or supported.sampled:
                found["ece_teacher"] = (error, supported.kl)
            else:  # p of unlisted tokens counts as 0; it may be larger by hidden_p
                hidden = column("hidden_p") / count
                found["ece_teacher"] = (np.maximum(error - hidden, 0.0), "lower bound")
                found["ece_teacher_high"] = (error + hidden, "upper bound")
        if supported.accepts:
            found["acceptance"] = (column("accepted_low") / count, "full" if exact else "lower bound")
            if not exact:
                found["acceptance_high"] = (column("accepted_high") / count, "upper bound")
            for k in DRAFTS:
                runs = column(f"runs_{k}")
                found[f"tokens_{k}"] = (column(f"tokens_low_{k}") / runs, "full" if exact else "lower bound")
                if not exact:
                    found[f"tokens_{k}_high"] = (column(f"tokens_high_{k}") / runs, "upper bound")
    return found


def reliability(table: Table) -> list[tuple[float, float]]:
    """Mean confidence and share of correct predictions, of each bin of confidence that has loss tokens."""
    totals = table.sum(axis=0)
    sums = {name: [float(totals[COLUMN[f"{name}_{i}"]]) for i in range(BINS)] for name in BIN_SUMS}
    bins = zip(sums["bin_confidence"], sums["bin_correct"], sums["bin_count"], strict=True)
    return [(confidence / count, correct / count) for confidence, correct, count in bins if count]


def resampled(*tables: Table) -> list[Table]:
    """[R, columns] of several students on the same rows → sums [SAMPLES, columns] of each, over the same samples."""
    rows = len(tables[0])
    generator = np.random.default_rng(0)
    found = [np.empty((SAMPLES, table.shape[1])) for table in tables]
    for i in range(SAMPLES):
        weights = np.bincount(generator.integers(rows, size=rows), minlength=rows)
        for sums, table in zip(found, tables, strict=True):
            sums[i] = weights @ table
    return found


def metrics_of(table: Table, supported: Supported) -> dict[str, Metric]:
    """The metrics of a student from its sums by row [R, columns]; without those that have no positions."""
    whole = values(table.sum(axis=0, keepdims=True), supported)
    spread = values(resampled(table)[0], supported) if len(table) > 1 else {}
    return {
        name: Metric(value=float(value[0]), error=_error(spread[name][0]) if spread else None, relation=relation)
        for name, (value, relation) in whole.items()
        if math.isfinite(value[0])
    }


def mean_with_error(sums: Table) -> tuple[float, float | None]:
    """Mean and half width of its interval, from [R, 2]: sum of a quantity and number of loss tokens of each row."""
    total, count = sums.sum(axis=0)
    spread = resampled(sums)[0] if len(sums) > 1 else None
    return float(total / count), None if spread is None else _error(spread[:, 0] / spread[:, 1])


@dataclass(frozen=True, kw_only=True)
class Difference:
    """b − a, with its 95 % half-width over the same rows. better: "a", "b", or "" within the error."""

    value: float
    error: float | None
    better: Literal["a", "b", ""]


def same_rows(a: Table, b: Table) -> bool:
    """Whether two students were evaluated on the same loss tokens; not if their tokenizers differ."""
    return a.shape == b.shape and np.array_equal(a[:, COLUMN["count"]], b[:, COLUMN["count"]])


def compare(a: Table, b: Table, supported: Supported) -> dict[str, Difference]:
    """Paired comparison of two students on the same rows, by metric; bounds are not compared with each other.

    Raises: ValueError for tables of different rows.
    """
    if not same_rows(a, b):
        raise ValueError(f"found {len(a)} and {len(b)} rows with different loss tokens, expected the same rows.")
    whole = [values(table.sum(axis=0, keepdims=True), supported) for table in (a, b)]
    spread = [values(sums, supported) for sums in resampled(a, b)] if len(a) > 1 else None
    found = {}
    for name, (first, _) in whole[0].items():
        value = float(whole[1][name][0][0] - first[0])
        if name.endswith("_high") or not math.isfinite(value):
            continue
        error = None if spread is None else _error(spread[1][name][0] - spread[0][name][0])
        better: Literal["a", "b", ""] = ""
        if error is not None and abs(value) > error:
            better = "b" if (value > 0) == name.startswith(HIGHER_IS_BETTER) else "a"
        found[name] = Difference(value=value, error=error, better=better)
    return found


def _error(samples: Table) -> float | None:
    kept = samples[np.isfinite(samples)]
    return None if len(kept) < 2 else Z95 * float(kept.std())
