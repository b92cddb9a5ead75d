"""Held-out metrics from sums over loss tokens.

    kl          KL(teacher‖student), nats per token, whatever the student was trained on. On hidden targets the full
                divergence; on sampled ones an estimate of it, unbiased up to the rounding of the stored entropy; on
                exact entries with the rest of the vocabulary as one class: a lower bound, tight if they hold most of
                the mass
    ce          cross-entropy with the true token, nats; perplexity = exp(ce)
    agreement   share of positions where the student's most likely token is the teacher's

The evaluation during training and `distill evaluate` both use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.evaluation import intervals
from pipeline.evaluation.evaluate_config import MOST_NATS
from pipeline.evaluation.groups import Group, compare_groups
from pipeline.evaluation.intervals import Metric, Supported, Table
from pipeline.evaluation.tasks import TaskScore
from pipeline.losses import HeadOutput, KlEstimateKind


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over `tokens` loss tokens; nats.

    `metrics` has every metric by name with its confidence interval (`intervals.py`), in an evaluation of a whole cache.
    `perplexity` is capped at exp(700), and cannot be compared between tokenizers; `metrics` has it only where neither
    applies.
    """

    kl: float
    ce: float
    perplexity: float
    agreement: float
    tokens: int
    kl_estimate_kind: KlEstimateKind  # relation of `kl` to the KL of the full distributions
    compared: float | None = None  # with another tokenizer: share of tokens with teacher targets; others add no KL
    metrics: dict[str, Metric] = field(default_factory=dict)
    tasks: dict[str, TaskScore] = field(default_factory=dict)  # by "task metric", if tasks were asked for
    teacher_tasks: dict[str, TaskScore] = field(default_factory=dict)  # the teacher's, if one was named
    few: bool = False  # too few loss tokens, or rows that hold them, to rely on
    groups: dict[str, Group] = field(default_factory=dict)  # by value of a column, if one was asked for
    rows: Table | None = field(default=None, repr=False, compare=False)  # sums by row, [R, columns]
    supported: Supported | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Everything but the sums by row, and a perplexity that `metrics` does not have."""
        hidden = {"rows", "supported"}
        if self.metrics and "perplexity" not in self.metrics:
            hidden.add("perplexity")
        plain = {name: value for name, value in vars(self).items() if name not in hidden}
        return plain | {
            "metrics": {name: asdict(metric) for name, metric in self.metrics.items()},
            "tasks": {name: asdict(score) for name, score in self.tasks.items()},
            "teacher_tasks": {name: asdict(score) for name, score in self.teacher_tasks.items()},
            "groups": {value: group.to_json() for value, group in self.groups.items()},
        }

    @classmethod
    def from_sums(cls, kl: float, ce: float, agreement: float, count: float, kind: KlEstimateKind) -> Evaluation:
        count = count or math.nan
        return cls(
            kl=kl / count,
            ce=ce / count,
            perplexity=math.exp(min(ce / count, MOST_NATS)),
            agreement=agreement / count,
            tokens=0 if math.isnan(count) else int(count),
            kl_estimate_kind=kind,
        )


def compare(a: Evaluation, b: Evaluation) -> dict[str, dict[str, Any]]:
    """b − a by metric: value, error (half width of the 95 % interval, paired over rows) and which is better.

    Empty for evaluations that were not made by `evaluate`, or of students whose tokenizers differ.
    """
    if a.rows is None or b.rows is None or a.supported is None or not intervals.same_rows(a.rows, b.rows):
        return {}
    return {name: asdict(each) for name, each in intervals.compare(a.rows, b.rows, a.supported).items()}


def compare_by_value(a: Evaluation, b: Evaluation) -> dict[str, dict[str, dict[str, Any]]]:
    """`compare` for each value of the column that both were evaluated by."""
    return {} if a.supported is None else compare_groups(a.groups, b.groups, a.supported)


@torch.no_grad()
def sum_over(forward: Callable[[Any], tuple[Tensor, ...]], batches: Iterable[Any]) -> list[float]:
    """Totals in float64 of the outputs of `forward`, which begin with those of `HeadOutput`."""
    totals: list[float] = []
    for batch in batches:
        values = torch.stack([value.float() for value in forward(batch)]).tolist()
        totals = [total + value for total, value in zip(totals or [0.0] * len(values), values, strict=True)]
    return totals or [0.0] * len(HeadOutput._fields)
