"""What a student is trained on: the loss in one frozen object, checked against the cache before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cache_format import Cache
from pipeline.errors import ConfigError
from pipeline.losses import POSITION_WEIGHTINGS, TAIL_POLICIES, UNBIASED, Mixture, PositionWeighting, TailPolicy
from pipeline.losses.divergence_sum import FORWARD_KL
from pipeline.models.teacher_head import TeacherHead
from pipeline.student.training.schedules import Schedule
from pipeline.student.validation.suitability import (
    check_exact_entries,
    default_tail,
    drawn_from_teacher,
    exact_entries,
    parse_divergence,
)

KlIs = Literal["full", "estimate", "lower bound"]


@dataclass(frozen=True, kw_only=True)
class LossRecipe:
    """L = w·[(1 − kd_weight)·CE + kd_weight·temperature²·D], with the teacher's tail treated by policy.

    With a schedule, `kd_weight` or `temperature` is the value of the last step, and `at` gives that of any other.
    """

    kd_weight: float = 0.9
    temperature: float = 1.0
    tail: TailPolicy = "bucket"
    capture_temperature: float = 1.0  # of the cache
    divergence: str = FORWARD_KL  # D: a specification of pipeline.losses.divergence_sum
    position_weighting: PositionWeighting = "uniform"  # w
    kd_schedule: Schedule | None = None
    temperature_schedule: Schedule | None = None
    teacher: TeacherHead | None = field(default=None, repr=False)  # of hidden targets: D is of whole distributions
    uld: bool = False  # D is universal logit distillation, of pipeline.losses.uld
    sampled: bool = False  # what is read has a sample of the tail, whether D uses it or not

    def __post_init__(self) -> None:
        weights = self.kd_weights
        given = f"--kd-weight {self.kd_weight}" if self.kd_schedule is None else f"--kd-schedule {self.kd_schedule}"
        if not all(0.0 <= weight <= 1.0 for weight in weights):
            numbers = "a number" if self.kd_schedule is None else "numbers"
            raise ConfigError(f"{given}: expected {numbers} from 0 (labels only) to 1 (teacher only).")
        temperatures, given = (self.temperature,), f"--temperature {self.temperature}"
        if self.temperature_schedule is not None:
            temperatures, given = (
                self.temperature_schedule.values,
                f"--temperature-schedule {self.temperature_schedule}",
            )
        if not all(0.0 < temperature < math.inf for temperature in temperatures):
            numbers = "a positive number" if self.temperature_schedule is None else "positive numbers"
            raise ConfigError(f"{given}: expected {numbers}.")
        if self.tail not in TAIL_POLICIES:
            raise ConfigError(f"--tail {self.tail}: expected one of {', '.join(TAIL_POLICIES)}.")
        if self.position_weighting not in POSITION_WEIGHTINGS:
            raise ConfigError(
                f"--position-weighting {self.position_weighting}: expected one of {', '.join(POSITION_WEIGHTINGS)}."
            )
        try:
            self.mixture.check_tail(self.tail)
        except ValueError as error:  # it begins with the name of the option
            raise ConfigError(f"--{error}.") from error

    @property
    def mixture(self) -> Mixture:
        return Mixture.parse(self.divergence)

    @property
    def kd_weights(self) -> tuple[float, ...]:
        """All that α is or comes from; zero throughout: labels only."""
        return (self.kd_weight,) if self.kd_schedule is None else self.kd_schedule.values

    @property
    def kl_tail(self) -> TailPolicy:
        """Of what is logged as kl: the most that the targets can say of the true one, whatever is trained."""
        return "sampled" if self.sampled or self.tail == "sampled" else "bucket"

    @property
    def resolved(self) -> dict[str, Any]:
        """What became of what was left open: of hidden targets there is no tail."""
        tails = (
            {"tail": self.tail, "kl_tail": self.kl_tail} if self.teacher is None else {"tail": None, "kl_tail": None}
        )
        return {"temperature": self.temperature, **tails}

    @property
    def kl_is(self) -> KlIs:
        """How what is logged as kl relates to the divergence of the whole distributions."""
        if self.teacher is not None:
            return "full"
        return "estimate" if self.kl_tail == "sampled" else "lower bound"

    @property
    def trains_kl(self) -> bool:
        """Whether D is what is logged as kl."""
        return self.mixture.is_forward_kl and self.tail == self.kl_tail and not self.uld

    def at(self, step: int, max_steps: int) -> LossRecipe:
        """The recipe for the optimizer step number `step`, counted from 0, of `max_steps`."""
        if self.kd_schedule is None and self.temperature_schedule is None:
            return self
        kd, temperature = self.kd_schedule, self.temperature_schedule
        return replace(
            self,
            kd_weight=self.kd_weight if kd is None else kd.at(step, max_steps),
            temperature=self.temperature if temperature is None else temperature.at(step, max_steps),
            kd_schedule=None,
            temperature_schedule=None,
        )

    @classmethod
    def for_cache(
        cls,
        cache: Cache,
        *,
        kd_weight: float,
        temperature: float | None = None,
        tail: TailPolicy | None = None,
        divergence: str = FORWARD_KL,
        position_weighting: PositionWeighting = "uniform",
        kd_schedule: str | None = None,
        temperature_schedule: str | None = None,
        exact_alone: bool = False,
    ) -> LossRecipe:
        """The recipe on a cache's targets; None: what goes with them, unbiased if they are and the divergence can be.

        Args:
            kd_schedule: specification of pipeline.student.training.schedules, takes the place of `kd_weight`.
            temperature_schedule: likewise, of `temperature`.
            exact_alone: sampled entries do not reach the loss: rows are converted to another tokenizer's.

        Raises: ConfigError for a loss that these targets cannot serve, with the reason.
        """
        targets = cache.metadata.targets
        teacher = None if cache.metadata.head is None else TeacherHead(cache)
        if teacher is not None and tail is not None:
            raise ConfigError(
                f"--tail {tail}: {cache.path} has hidden targets, from which the teacher's whole distribution is "
                "rebuilt: nothing is outside of it. Leave it out."
            )
        captured, sampled = float(targets["temperature"]), cache.metadata.sampled
        mixture = parse_divergence(divergence)
        tail = tail or default_tail(cache, divergence)
        of_kd = None if kd_schedule is None else Schedule.parse(kd_schedule, "--kd-schedule")
        of_temperature = None
        if temperature_schedule is not None:
            if temperature is not None:
                raise ConfigError(
                    f"--temperature-schedule {temperature_schedule}: found --temperature {temperature} beside it, "
                    "expected one of them. Leave one out."
                )
            of_temperature = Schedule.parse(temperature_schedule, "--temperature-schedule")
            temperature = of_temperature.at(1, 1)
        recipe = cls(
            kd_weight=kd_weight if of_kd is None else of_kd.at(1, 1),
            temperature=captured if temperature is None else temperature,
            tail=tail,
            capture_temperature=captured,
            divergence=str(mixture),
            position_weighting=position_weighting,
            kd_schedule=of_kd,
            temperature_schedule=of_temperature,
            teacher=teacher,
            sampled=sampled and not exact_alone,
        )
        if recipe.tail == "sampled" and not sampled:
            raise ConfigError(
                f"--tail sampled: {cache.path} has {targets['kind']} targets, exact entries without a sample of the "
                "tail. Use --tail bucket, or cache with --targets threshold."
            )
        check_exact_entries(cache, recipe.tail, mixture)
        if recipe.tail == "realized" and cache.metadata.alignment != "next":
            raise ConfigError(
                f"--tail realized: {cache.path} has targets about masked tokens, which are those of a text, not draws "
                "from what the teacher expects in their place. Use another --tail."
            )
        if recipe.tail == "realized" and drawn_from_teacher(cache) is False:
            written = cache.metadata.corpus["generation"]
            raise ConfigError(
                f"--tail realized: the text of {cache.path} was drawn at --gen-temperature {written['temperature']:g}, "
                f"--gen-top-p {written['top_p']:g}, --gen-top-k {written['top_k']}, so its tokens are no sample of the "
                "teacher's own distribution. Use another --tail, or generate with 1, 1 and 0."
            )
        used = (recipe.temperature,) if of_temperature is None else of_temperature.values
        if recipe.tail == "realized" and captured != 1.0:
            raise ConfigError(
                f"--tail realized: {cache.path} was captured at temperature {captured}, where the teacher's own text "
                "is no sample of its distribution. Use --tail bucket, or cache with --temperature 1."
            )
        other = next((value for value in used if value != captured), None)
        if other is not None and (recipe.tail in UNBIASED or captured != 1.0):
            what = "a sample" if recipe.tail in UNBIASED else "truncated targets"
            option = f"--temperature {other}"
            instead = f"Use --temperature {captured}, or cache with --temperature {other}."
            if of_temperature is not None:
                option, instead = f"--temperature-schedule {of_temperature}", f"Use --temperature {captured}."
            raise ConfigError(
                f"{option}: {cache.path} was captured at temperature {captured}, and {what} "
                f"cannot be tempered afterwards. {instead}"
            )
        return recipe

    def for_held_out(self, cache: Cache, *, exact_alone: bool = False) -> LossRecipe:
        """The same loss on other targets, by the same policy if they can serve it.

        Evaluations are to be compared with one another: all of them use the last values of a schedule, and positions
        count alike, since a student's entropy falls as it learns.
        """
        if self.tail == "realized":
            serves = drawn_from_teacher(cache) is True and cache.metadata.targets["kind"] != "random"
        else:
            serves = cache.metadata.sampled if self.tail == "sampled" else exact_entries(cache)[0] > 0
        serves = serves and self.teacher is None and cache.metadata.head is None  # for which it means nothing
        recipe = LossRecipe.for_cache(
            cache,
            kd_weight=self.kd_weight,
            temperature=self.temperature,
            tail=self.tail if serves else None,
            divergence=self.divergence,
            exact_alone=exact_alone,
        )
        return replace(recipe, uld=self.uld)
