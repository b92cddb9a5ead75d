"""The loss of stage two in one frozen object, from the configuration to the kernel.

    L = w·[(1 − kd_weight)·CE(label) + kd_weight·temperature²·D(teacher ‖ student)]

`pipeline.student.validation.loss_checks` makes one for a cache; the functions of this package make one of their keyword
arguments; `Targets.loss_and_dlogits` computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from torch import Tensor

from pipeline.losses.divergence_sum import FORWARD_KL, DivergenceSum
from pipeline.losses.tails import TailPolicy
from pipeline.losses.weighting import PositionWeighting, check_weighting

KlEstimateKind = Literal["full", "estimate", "lower bound", "entries only"]


class Schedule(Protocol):
    """A number that depends on the optimizer step, see `pipeline.student.training.schedules`."""

    @property
    def values(self) -> tuple[float, ...]:
        """Numbers between which all others lie."""
        ...

    def at(self, step: int, max_steps: int) -> float: ...


@dataclass(frozen=True, kw_only=True)
class DistillLoss:
    """What is minimised at a loss token; the defaults are KL(teacher ‖ student) under `bucket`.

    Attributes:
        kd_weight: weight of the divergence, from 0 (labels only) to 1 (teacher only).
        temperature: T, divides the logits of both sides in the divergence.
        tail: tail policy, see `tails.py`. Full distributions have no tail and ignore it.
        divergence: D; a specification such as "js(0.1):0.5,tvd" is parsed.
        position_weighting: w, see `weighting.py`.
        kl_tail: tail policy of the KL that is reported next to the loss; default: `tail`.
        kd_schedule, temperature_schedule: values per step; `kd_weight` and `temperature` are then those of the last
            step, and `at` gives those of any other.
        teacher_head: [n, D] stored states → [n, V] logits of the teacher, for targets that are read from a cache of
            hidden states. The loss is then on full distributions.
        uld: the targets are `SortedTargets`, which have their own D.

    Raises: ValueError for a value out of range, or a divergence that cannot use the tail policy.
    """

    kd_weight: float = 1.0
    temperature: float = 1.0
    tail: TailPolicy = "bucket"
    divergence: DivergenceSum = FORWARD_KL  # type: ignore[assignment]
    position_weighting: PositionWeighting = "uniform"
    kl_tail: TailPolicy = None  # type: ignore[assignment]
    kd_schedule: Schedule | None = None
    temperature_schedule: Schedule | None = None
    teacher_head: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    uld: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "divergence", DivergenceSum.parse(self.divergence))
        if self.kl_tail is None:
            object.__setattr__(self, "kl_tail", self.tail)
        if not all(0.0 <= weight <= 1.0 for weight in self.kd_weights):
            given = _option("kd_weight", self.kd_weight, "kd_schedule", self.kd_schedule)
            numbers = "a number" if self.kd_schedule is None else "numbers"
            raise ValueError(f"{given}: expected {numbers} from 0 (labels only) to 1 (teacher only).")
        if not all(0.0 < temperature < math.inf for temperature in self.temperatures):
            given = _option("temperature", self.temperature, "temperature_schedule", self.temperature_schedule)
            numbers = "a positive number" if self.temperature_schedule is None else "positive numbers"
            raise ValueError(f"{given}: expected {numbers}.")
        check_weighting(self.position_weighting)
        self.divergence.check_tail(self.tail)
        if self.kl_tail != self.tail and (self.kl_tail not in ("sampled", "bucket") or self.tail == "sampled"):
            raise ValueError(
                f"kl_tail={self.kl_tail} with `tail={self.tail}`: expected the same policy, sampled, or bucket (only "
                "without sampled entries)."
            )

    @property
    def full(self) -> bool:
        """Whether the targets of the cache are full distributions."""
        return self.teacher_head is not None

    @property
    def kd_weights(self) -> tuple[float, ...]:
        """All values between which `kd_weight` lies during a run; zero throughout: labels only."""
        return (self.kd_weight,) if self.kd_schedule is None else self.kd_schedule.values

    @property
    def temperatures(self) -> tuple[float, ...]:
        """All values between which `temperature` lies during a run."""
        return (self.temperature,) if self.temperature_schedule is None else self.temperature_schedule.values

    @property
    def kl_estimate_kind(self) -> KlEstimateKind:
        """How the reported KL relates to that of the full distributions."""
        if self.full:
            return "full"
        if self.kl_tail == "renormalise":
            return "entries only"
        return "estimate" if self.kl_tail == "sampled" else "lower bound"

    @property
    def trains_kl(self) -> bool:
        """Whether D is the reported KL."""
        return self.divergence.is_forward_kl and self.tail == self.kl_tail and not self.uld

    @property
    def resolved(self) -> dict[str, Any]:
        """The values of options that may be left to the cache."""
        tail, kl_tail = (None, None) if self.full else (self.tail, self.kl_tail)
        return {"temperature": self.temperature, "tail": tail, "kl_tail": kl_tail}

    def weighted(self, ce: Tensor, soft: Tensor) -> Tensor:
        """(1 − kd_weight)·CE + kd_weight·T²·D."""
        return (1.0 - self.kd_weight) * ce + self.kd_weight * self.temperature**2 * soft

    def at(self, step: int, max_steps: int) -> DistillLoss:
        """The loss at optimizer step `step`, counted from 0, of `max_steps`."""
        kd, temperature = self.kd_schedule, self.temperature_schedule
        if kd is None and temperature is None:
            return self
        return replace(
            self,
            kd_weight=self.kd_weight if kd is None else kd.at(step, max_steps),
            temperature=self.temperature if temperature is None else temperature.at(step, max_steps),
            kd_schedule=None,
            temperature_schedule=None,
        )


def _option(name: str, value: float, schedule_name: str, schedule: Schedule | None) -> str:
    return f"`{name}` {value}" if schedule is None else f"`{schedule_name}` {schedule}"
