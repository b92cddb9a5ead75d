"""Schedules for the weight of the soft loss and for the temperature.

    constant:V                         V
    linear:FROM:TO                     from FROM at the first step to TO at the last
    wsd:FROM:PEAK:TO[:WARMUP:DECAY]    up to PEAK in the first WARMUP of all steps, down to TO in the last DECAY of them
                                       (fractions, default 0.1 and 0.1)

A value depends only on the step number and the number of steps, so that it is the same after a resume, in every
micro-batch and on every process. Source of wsd (warm-up, stable, decay) for the weight of the soft loss: Peng et al.,
2024, https://arxiv.org/abs/2410.16215.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.errors import ConfigError

FORMS = "constant:V, linear:FROM:TO or wsd:FROM:PEAK:TO[:WARMUP:DECAY]"
WARMUP = DECAY = 0.1  # of all steps


@dataclass(frozen=True)
class Schedule:
    """Linear interpolation between points (progress from 0 to 1, value). `text` parses to the same schedule."""

    text: str
    points: tuple[tuple[float, float], ...]

    def __str__(self) -> str:
        return self.text

    @property
    def values(self) -> tuple[float, ...]:
        """Values at the points; all others lie between them."""
        return tuple(value for _, value in self.points)

    def at(self, step: int, max_steps: int) -> float:
        """The value at optimizer step `step` (from 0) of `max_steps`; after the last step its value."""
        progress = min(1.0, step / (max_steps - 1)) if max_steps > 1 else 1.0
        (x0, y0), *following = self.points
        for x, y in following:
            if progress < x:
                return y0 + (y - y0) * (progress - x0) / (x - x0)
            x0, y0 = x, y
        return y0

    @classmethod
    def parse(cls, text: str, option: str) -> Schedule:
        """The schedule in `text`.

        Args:
            option: how errors name the option, such as "`kd_schedule`".

        Raises: ConfigError if `text` is not a schedule.
        """
        kind, *words = text.split(":")
        try:
            numbers = [float(word) for word in words]
        except ValueError:
            numbers = []
        if not all(map(math.isfinite, numbers)):
            numbers = []
        if kind == "constant" and len(numbers) == 1:
            return cls(text, ((0.0, numbers[0]), (1.0, numbers[0])))
        if kind == "linear" and len(numbers) == 2:
            return cls(text, ((0.0, numbers[0]), (1.0, numbers[1])))
        if kind == "wsd" and len(numbers) in (3, 5):
            first, peak, last, warmup, decay = numbers if len(numbers) == 5 else [*numbers, WARMUP, DECAY]
            if warmup < 0.0 or decay < 0.0 or warmup + decay > 1.0 + 1e-9:
                raise ConfigError(
                    f"{option} {text}: WARMUP is {warmup:g} and DECAY is {decay:g}, expected fractions of all steps "
                    "with a sum of at most 1, such as 0.1:0.1."
                )
            rise, fall = ((0.0, first),) if warmup else (), ((1.0, last),) if decay else ()
            return cls(text, (*rise, (warmup, peak), (1.0 - decay, peak), *fall))
        raise ConfigError(f"{option} {text}: expected {FORMS}, such as linear:0.9:0.5.")
