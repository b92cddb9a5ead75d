"""Numbers that change in the course of a run: the weight of the soft loss, the temperature.

    constant:V                              V
    linear:FROM:TO                          from FROM at the first step to TO at the last
    wsd:FROM:PEAK:TO[:WARMUP:DECAY]         warm-up, stable, decay: up to PEAK in the first WARMUP of all steps, down
                                            to TO in the last DECAY of them (fractions, .1 and .1 unless given)

A value depends on the number of the step and on how many there are, and on nothing else: a resumed run has the values
of an uninterrupted one, and so has every micro-batch and every process.

Peng et al., 2024, found that in pre-training a weight of the soft loss which warms up, stays and decays, along with
such a learning rate, does better than constants: https://arxiv.org/abs/2410.16215.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.errors import ConfigError

FORMS = "constant:V, linear:FROM:TO or wsd:FROM:PEAK:TO[:WARMUP:DECAY]"
WARMUP = DECAY = 0.1  # of all steps


@dataclass(frozen=True)
class Schedule:
    """Straight lines between points (progress from 0 to 1, value); `text` parses to the same."""

    text: str
    points: tuple[tuple[float, float], ...]

    def __str__(self) -> str:
        return self.text

    @property
    def values(self) -> tuple[float, ...]:
        """Those between which all others lie."""
        return tuple(value for _, value in self.points)

    def at(self, step: int, max_steps: int) -> float:
        """The value for the optimizer step number `step`, counted from 0, of `max_steps`; beyond: that of the last."""
        progress = min(1.0, step / (max_steps - 1)) if max_steps > 1 else 1.0
        (x0, y0), *following = self.points
        for x, y in following:
            if progress < x:
                return y0 + (y - y0) * (progress - x0) / (x - x0)
            x0, y0 = x, y
        return y0

    @classmethod
    def parse(cls, text: str, option: str) -> Schedule:
        """The schedule that an option such as `--kd-schedule` was given.

        Raises: ConfigError, one line.
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
                    f"{option} {text}: WARMUP {warmup:g} and DECAY {decay:g} of all steps, expected fractions that add "
                    "up to at most 1, such as 0.1:0.1."
                )
            rise, fall = ((0.0, first),) if warmup else (), ((1.0, last),) if decay else ()
            return cls(text, (*rise, (warmup, peak), (1.0 - decay, peak), *fall))
        raise ConfigError(f"{option} {text}: expected {FORMS}, as in linear:0.9:0.5.")
