"""Early stopping: conditions on the held-out evaluations.

    METRIC:MIN_DELTA:PATIENCE     holds if METRIC has not improved by MIN_DELTA in PATIENCE evaluations
    MIN_DELTA                     0.01 absolute, 0.5% of the reference, or noise (see `paired_noise`)
    default                       kl:0.5%:3 and ce:noise:3

The reference is the first value, then each value that is better than the reference by more than MIN_DELTA, so that
small gains add up. With mode `all` the run stops at the first evaluation where every condition holds, with `any` where
one does. NaN never improves. The state is saved in every checkpoint, so a resumed run continues to count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState

from pipeline.errors import ConfigError

Mode = Literal["all", "any"]
MODES: tuple[Mode, ...] = ("all", "any")
Unit = Literal["absolute", "relative", "noise"]

DEFAULT = ("kl:0.5%:3", "ce:noise:3")
FORM = "METRIC:MIN_DELTA:PATIENCE such as kl:0.5%:3, ce:noise:3 or agreement:0.001:5, or default"
STANDARD_ERRORS = 2.0
HIGHER_IS_BETTER = {"agreement"}
BY_ROW = ("loss", "kl", "ce", "agreement")
"""Metrics that are a sum over rows divided by the loss tokens; only their noise can be estimated."""


@dataclass(frozen=True)
class Condition:
    """One condition. `min_delta` is a fraction if `unit` is relative, and unused if it is noise."""

    metric: str
    min_delta: float
    unit: Unit
    patience: int

    def __str__(self) -> str:
        delta = {"absolute": f"{self.min_delta:.12g}", "relative": f"{100 * self.min_delta:.12g}%", "noise": "noise"}
        return f"{self.metric}:{delta[self.unit]}:{self.patience}"

    @classmethod
    def parse(cls, text: str) -> Condition:
        """The condition in `text`; a prefix eval_ of the metric is dropped.

        Raises: ConfigError if `text` is not a condition.
        """
        problem = ConfigError(f"`early_stopping` {text}: expected {FORM}.")
        parts = [part.strip() for part in text.split(":")]
        if len(parts) != 3 or not parts[0]:
            raise problem
        metric, delta, patience = parts[0].removeprefix("eval_"), parts[1], parts[2]
        if not patience.isdecimal() or int(patience) < 1:
            raise ConfigError(
                f"`early_stopping` {text}: patience {patience!r}, expected a number of evaluations, 1 or more."
            )
        if delta == "noise":
            if metric not in BY_ROW:
                raise ConfigError(
                    f"`early_stopping` {text}: noise can be estimated for {', '.join(BY_ROW)}, not for {metric}. Use a "
                    "number or a percentage."
                )
            return cls(metric, 0.0, "noise", int(patience))
        unit: Unit = "relative" if delta.endswith("%") else "absolute"
        try:
            number = float(delta.removesuffix("%"))
        except ValueError:
            raise problem from None
        if not 0.0 <= number < math.inf:
            raise ConfigError(f"`early_stopping` {text}: min_delta {delta}, expected a number, 0 or more.")
        return cls(metric, number / 100.0 if unit == "relative" else number, unit, int(patience))


def parse_conditions(texts: Sequence[str]) -> list[Condition]:
    """The conditions, with `default` (or `auto`) replaced by its two.

    Raises: ConfigError if one is not a condition.
    """
    expanded = [each for text in texts for each in (DEFAULT if text in ("default", "auto") else (text,))]
    return [Condition.parse(text) for text in expanded]


def check_conditions(
    texts: Sequence[str], mode: str, *, metrics: Sequence[str], held_out_rows: int | None
) -> list[Condition]:
    """The conditions of a run, checked against its evaluations.

    Args:
        metrics: metrics that its evaluations report, without eval_.
        held_out_rows: None without a held-out cache.

    Raises: ConfigError if a condition can never be evaluated.
    """
    if mode not in MODES:
        raise ConfigError(f"`early_stopping_mode` {mode}: expected {' or '.join(MODES)}.")
    conditions = parse_conditions(texts)
    if not conditions:
        if mode != "all":
            raise ConfigError(
                f"`early_stopping_mode` {mode}: found no `early_stopping`, so there is no condition. Add "
                "`early_stopping=default`, or leave it out."
            )
        return []
    if held_out_rows is None:
        raise ConfigError(
            f"`early_stopping` {texts[0]}: found no `eval_cache`, but conditions need held-out evaluations. Set "
            "`eval_cache` to a held-out cache, and `eval_steps` to the steps between evaluations."
        )
    for condition in conditions:
        if condition.metric not in metrics:
            raise ConfigError(
                f"`early_stopping` {condition}: evaluations of this run report {', '.join(metrics)}, not "
                f"{condition.metric}. Choose one of them."
            )
        if condition.unit == "noise" and held_out_rows < 2:
            raise ConfigError(
                f"`early_stopping` {condition}: the held-out cache has {held_out_rows} row, but noise is estimated "
                "from the differences between rows. Use a larger cache, or a number instead of noise."
            )
    return conditions


def too_few_evaluations(conditions: Sequence[Condition], mode: Mode, *, steps: int, every: float) -> str | None:
    """A warning if a run of `steps` steps ends before its conditions can hold.

    Args:
        every: steps between evaluations; below 1, a fraction of `steps`.
    """
    if not conditions:
        return None
    every = math.ceil(steps * every) if every < 1 else every
    evaluations = int((steps - 1) // every)
    needed = 1 + (max if mode == "all" else min)(condition.patience for condition in conditions)
    if evaluations >= needed:
        return None
    return (
        f"`early_stopping` can never stop this run: {evaluations} evaluations before the last of {steps:,} steps, "
        f"expected at least {needed}. Lower `eval_steps`."
    )


def paired_noise(now: np.ndarray, before: np.ndarray, counts: np.ndarray) -> float:
    """Standard error of the mean difference per loss token between two evaluations of the same rows.

        m = Σx / Σn        SE² = R/(R−1) · Σ (x_r − m·n_r)² / (Σn)²

    with x_r the difference and n_r the loss tokens of row r: a ratio estimator over clusters (Cochran 1977, §6), since
    tokens of a row are not independent. It is far below the noise of either evaluation, because both have the same
    rows. With a threshold of 2·SE an unchanged student passes for a better one in 2 % of comparisons.

    Args:
        now, before: [R] sums over the loss tokens of each row.
        counts: [R] loss tokens.
    """
    kept = counts > 0
    differences, counts = (now - before)[kept], counts[kept]
    rows = len(counts)
    if rows < 2:
        return math.inf
    residuals = differences - differences.sum() / counts.sum() * counts
    return math.sqrt(rows / (rows - 1) * float(residuals @ residuals)) / float(counts.sum())


class EarlyStopping(TrainerCallback, ExportableState):
    """Stops a run when its conditions hold.

    Attributes:
        rows: sums per row of the evaluation about to be reported: [R] for each metric and for "count". The trainer
            sets it if `needs_rows`.
        stopped: None, or why the run was stopped: {"step", "reasons"}.
    """

    def __init__(self, conditions: Sequence[str], mode: Mode = "all") -> None:
        self.conditions, self.mode = [Condition.parse(text) for text in conditions], mode
        self.rows: dict[str, np.ndarray] | None = None
        self.progress: list[dict[str, Any]] = [{"waited": 0} for _ in self.conditions]
        self.stopped: dict[str, Any] | None = None

    @property
    def needs_rows(self) -> bool:
        return any(condition.unit == "noise" for condition in self.conditions)

    def state(self) -> dict[str, Any]:
        return {
            "args": {"conditions": [str(condition) for condition in self.conditions], "mode": self.mode},
            "attributes": {"progress": self.progress, "stopped": self.stopped},
        }

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        # A resumed run finds the state of its checkpoint here, a new one the result of `state`.
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is not None:
            self.progress, self.stopped = saved["attributes"]["progress"], saved["attributes"]["stopped"]
        control.should_training_stop = self.stopped is not None
        return control

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any
    ) -> TrainerControl:
        holds = [
            self._observe(condition, progress, metrics[f"eval_{condition.metric}"], state.global_step)
            for condition, progress in zip(self.conditions, self.progress, strict=True)
        ]
        self.rows = None
        # The last step ends the run anyway.
        if state.global_step < state.max_steps and (all(holds) if self.mode == "all" else any(holds)):
            parts = zip(self.conditions, self.progress, holds, strict=True)
            reasons = [_reason(condition, progress) for condition, progress, held in parts if held]
            self.stopped = {"step": state.global_step, "reasons": reasons}
            control.should_training_stop = True
            control.should_save = True  # so that a run killed after this still knows that it was stopped
        return control

    def _observe(self, condition: Condition, progress: dict[str, Any], value: float, step: int) -> bool:
        reference = progress.get("reference")
        gain = math.nan if reference is None else (reference - value)
        gain = -gain if condition.metric in HIGHER_IS_BETTER else gain
        delta = condition.min_delta
        if condition.unit == "relative" and reference is not None:
            delta *= abs(reference)
        rows = None
        if condition.unit == "noise":
            assert self.rows is not None, "the trainer sets rows if needs_rows"
            rows = self.rows[condition.metric]
            if reference is not None:
                before = np.asarray(progress["rows"], np.float64)
                delta = STANDARD_ERRORS * paired_noise(rows, before, self.rows["count"])
        if (reference is None and not math.isnan(value)) or gain > delta:
            progress.update(reference=value, step=step, waited=0)
            if rows is not None:
                progress["rows"] = rows.tolist()
        else:
            progress["waited"] += 1
        progress |= {"last": value, "delta": delta}
        return progress["waited"] >= condition.patience


def _reason(condition: Condition, progress: Mapping[str, Any]) -> str:
    reference = progress.get("reference")
    if reference is None:
        return f"{condition}: {condition.metric} is not a number"
    unit = {"absolute": "", "relative": f", {100 * condition.min_delta:g} %", "noise": ", 2 standard errors"}
    return (
        f"{condition}: {condition.metric} {progress['last']:.4f} against {reference:.4f} at step "
        f"{progress['step']}, {progress['waited']} evaluations without a gain above {progress['delta']:.2g}"
        f"{unit[condition.unit]}"
    )


def stopped_by(state: TrainerState) -> dict[str, Any] | None:
    """`EarlyStopping.stopped` of the run that saved this state."""
    saved = state.stateful_callbacks.get(EarlyStopping.__name__) if state.stateful_callbacks else None
    return None if saved is None else saved["attributes"]["stopped"]
