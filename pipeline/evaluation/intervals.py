"""From sums by row to metrics with confidence intervals, and the paired comparison of two students.

Positions of a row are correlated, so rows are the units: intervals come from a bootstrap over rows (1,000 samples of R
out of R with replacement, fixed seed), as ± t·√(R/(R−1)) standard deviations of the metric over the samples. The root
undoes that a resample varies by 1/R too little; t is the 97.5 % quantile of Student's distribution with R − 1 degrees
of freedom, 1.96 for many rows. Two students are compared on the same samples, which cancels what makes a row hard for
both.

Cost: 1,000 products [R] · [R, columns].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.evaluate_config import MOST_NATS
from pipeline.evaluation.measures import BIN_SUMS, BINS, DRAFTS, column_names
from pipeline.losses import KlEstimateKind

SAMPLES = 1000
Z95 = 1.959964
T95 = (12.7062, 4.3027, 3.1824, 2.7764)  # of 1 to 4 degrees of freedom
COLUMN = {name: i for i, name in enumerate(column_names())}
HIGHER_IS_BETTER = ("agreement", "top5_agreement", "acceptance", "tokens_")

Table = NDArray[np.float64]
Relation = KlEstimateKind | Literal["upper bound"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """value ± error is the 95 % confidence interval over rows; None with fewer than two rows that the metric is over.

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
        perplexity: whether it can be compared with that of others; not over the tokens of another tokenizer.
    """

    kl: KlEstimateKind
    sampled: bool = False
    ranks: bool = True
    calibrates: bool = True
    accepts: bool = True
    perplexity: bool = True


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
        exact = supported.kl == "full"
        # Rounding makes a position's most likely entries equal: one of m equal ones counts as 1/m.
        ranked: Relation = "full" if exact and supported.ranks else "estimate"
        found: dict[str, tuple[Table, Relation]] = {
            "kl": (column("kl") / count, supported.kl),
            "ce": (ce, "full"),
            **({"perplexity": (_perplexity(ce), "full")} if supported.perplexity else {}),
            "agreement": (column("agreement") / count, ranked),
        }
        if supported.ranks:
            found["top5_agreement"] = (column("top5_agreement") / count, ranked)
        found["ece"] = (np.abs(correct - confidence).sum(axis=1) / count, "full")
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


def _perplexity(ce: Table) -> Table:
    return np.where(ce > MOST_NATS, np.inf, np.exp(np.minimum(ce, MOST_NATS)))


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
        name: Metric(
            value=float(value[0]),
            error=_error(spread[name][0], _units(table, name)) if spread else None,
            relation=relation,
        )
        for name, (value, relation) in whole.items()
        if math.isfinite(value[0])
    }


def mean_with_error(sums: Table) -> tuple[float, float | None]:
    """Mean and half width of its interval, from [R, 2]: sum of a quantity and number of loss tokens of each row."""
    total, count = sums.sum(axis=0)
    spread = resampled(sums)[0] if len(sums) > 1 else None
    units = int(np.count_nonzero(sums[:, 1]))
    with np.errstate(invalid="ignore"):  # a sample may have no rows with loss tokens
        return float(total / count), None if spread is None else _error(spread[:, 0] / spread[:, 1], units)


Better = Literal["a", "b", ""]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """b − a, with its 95 % half-width over the same rows.

    Attributes:
        better: "a", "b", or "" where the rows or the targets do not tell. Bounds from both sides tell if the range of
            one student is above that of the other beyond the error. A bound from one side alone never does.
        relation: of both values to the metric of the full distributions.
    """

    value: float
    error: float | None
    better: Better
    relation: Relation


def same_rows(a: Table, b: Table) -> bool:
    """Whether two students were evaluated on the same loss tokens; not if their tokenizers differ."""
    return a.shape == b.shape and np.array_equal(a[:, COLUMN["count"]], b[:, COLUMN["count"]])


def compare(a: Table, b: Table, supported: Supported) -> dict[str, Difference]:
    """Paired comparison of two students on the same rows, by metric; of bounds the difference of the lower ones.

    Raises: ValueError for tables of different rows.
    """
    if not same_rows(a, b):
        raise ValueError(f"found {len(a)} and {len(b)} rows with different loss tokens, expected the same rows.")
    whole = [values(table.sum(axis=0, keepdims=True), supported) for table in (a, b)]
    spread = [values(sums, supported) for sums in resampled(a, b)] if len(a) > 1 else None
    units = {name: _units(a, name) for name in whole[0]}

    def minus(name: str, other: str) -> tuple[float, float | None]:
        """`name` of b − `other` of a, and its error."""
        value = float(whole[1][name][0][0] - whole[0][other][0][0])
        if spread is None:
            return value, None
        return value, _error(spread[1][name][0] - spread[0][other][0], units[name])

    found = {}
    for name, (_, relation) in whole[0].items():
        value, error = minus(name, name)
        if name.endswith("_high") or not math.isfinite(value):
            continue
        higher: Better = ""
        if f"{name}_high" in whole[0]:
            higher = _higher(minus(name, f"{name}_high"), minus(f"{name}_high", name))
        elif relation in ("full", "estimate"):
            higher = _higher((value, error), (value, error))
        better: Better = higher
        if higher and not name.startswith(HIGHER_IS_BETTER):
            better = "a" if higher == "b" else "b"
        found[name] = Difference(value=value, error=error, better=better, relation=relation)
    return found


def _higher(least: tuple[float, float | None], most: tuple[float, float | None]) -> Better:
    """Which of two students has the higher value, from the least and the greatest b − a, each ± its error."""
    if least[1] is not None and least[0] > least[1]:
        return "b"
    return "a" if most[1] is not None and -most[0] > most[1] else ""


def _units(table: Table, name: str) -> int:
    """Number of rows that a metric is over."""
    counted = name.removesuffix("_high").replace("tokens_", "runs_") if name.startswith("tokens_") else "count"
    return int(np.count_nonzero(table[:, COLUMN[counted]]))


def _error(samples: Table, units: int) -> float | None:
    """Half width of the 95 % interval, from the values on samples of this many rows."""
    kept = samples[np.isfinite(samples)]
    if units < 2 or len(kept) < 2:
        return None
    return t_quantile(units - 1) * math.sqrt(units / (units - 1)) * float(kept.std())


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's distribution, within 0.0005 (Abramowitz & Stegun 26.7.5 above 4)."""
    if freedom <= len(T95):
        return T95[freedom - 1]
    z, n = Z95, float(freedom)
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )
