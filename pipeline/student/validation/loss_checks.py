"""The loss for a cache: options left open get the values that suit its targets, and losses they cannot serve are
refused before anything is loaded."""

from __future__ import annotations

from dataclasses import replace

from cache_format import Cache
from pipeline.errors import ConfigError
from pipeline.losses import UNBIASED, DistillLoss, PositionWeighting, TailPolicy
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


def loss_for_cache(
    cache: Cache,
    *,
    kd_weight: float,
    temperature: float | None = None,
    tail: TailPolicy | None = None,
    divergence: str = FORWARD_KL,
    position_weighting: PositionWeighting = "uniform",
    kd_schedule: str | None = None,
    temperature_schedule: str | None = None,
    exact_only: bool = False,
    uld: bool = False,
) -> DistillLoss:
    """The loss on a cache's targets.

    Args:
        temperature: default: that of the cache.
        tail: default: `default_tail`.
        kd_schedule, temperature_schedule: specifications of `pipeline.student.training.schedules`, which replace
            `kd_weight` and `temperature`.
        exact_only: sampled entries do not reach the loss, because rows are converted to another tokenizer.
        uld: targets are sorted probabilities, see `pipeline.losses.uld`.

    Raises: ConfigError for a loss that these targets cannot serve, with the reason.
    """
    if cache.metadata.head is not None and tail is not None:
        raise ConfigError(
            f"`tail` {tail}: {cache.path} has hidden targets, from which training computes the full distribution, so "
            "there is no tail. Leave `tail` out."
        )
    captured = float(cache.metadata.targets["temperature"])
    parsed = parse_divergence(divergence)
    tail = tail or default_tail(cache, divergence)
    kd = None if kd_schedule is None else Schedule.parse(kd_schedule, "`kd_schedule`")
    schedule = None
    if temperature_schedule is not None:
        if temperature is not None:
            raise ConfigError(
                f"`temperature_schedule` {temperature_schedule}: found `temperature` {temperature} as well, expected "
                "only one of them. Leave one out."
            )
        schedule = Schedule.parse(temperature_schedule, "`temperature_schedule`")
        temperature = schedule.at(1, 1)
    kl_tail = _kl_tail(cache, tail, exact_only=exact_only)
    if position_weighting == "teacher-entropy" and not cache.metadata.entropy_known:
        raise ConfigError(
            f"`position_weighting` teacher-entropy: {cache.path} has only lower bounds of the teacher's entropies, "
            "because it was made from lists of entries. Use `position_weighting=student-entropy` or leave it out."
        )
    try:
        loss = DistillLoss(
            kd_weight=kd_weight if kd is None else kd.at(1, 1),
            temperature=captured if temperature is None else temperature,
            tail=tail,
            divergence=parsed,
            position_weighting=position_weighting,
            kl_tail=kl_tail,
            kd_schedule=kd,
            temperature_schedule=schedule,
            teacher_head=None if cache.metadata.head is None else TeacherHead(cache),
            uld=uld,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _check_tail(cache, loss)
    _check_temperature(cache, loss, schedule)
    return loss


def loss_for_held_out(loss: DistillLoss, cache: Cache, *, exact_only: bool = False) -> DistillLoss:
    """The same loss on a held-out cache, with the same tail policy if its targets can serve it.

    Evaluations of a run are compared with one another: all of them use the last values of a schedule, and uniform
    weights, since the entropy of a student falls while it learns.
    """
    if loss.tail == "realized":
        serves = drawn_from_teacher(cache) is True and cache.metadata.targets["kind"] != "random"
    else:
        serves = cache.metadata.sampled if loss.tail == "sampled" else exact_entries(cache)[0] > 0
    serves = serves and not loss.full and cache.metadata.head is None  # full distributions have no tail
    serves = serves and (loss.tail == "renormalise" or not cache.metadata.renormalised)
    return loss_for_cache(
        cache,
        kd_weight=loss.kd_weight,
        temperature=loss.temperature,
        tail=loss.tail if serves else None,
        divergence=str(loss.divergence),
        exact_only=exact_only,
        uld=loss.uld,
    )


def loss_for_all(losses: list[DistillLoss]) -> DistillLoss:
    """One loss for rows of several caches, which agree except for their sampled entries.

    Rows of all caches share a batch, so the reported KL uses the sampled entries only if every cache has them, and the
    tail mass only if every cache has it.
    """
    kl_tails: set[TailPolicy] = {loss.kl_tail for loss in losses}
    kl_tail = kl_tails.pop() if len(kl_tails) == 1 else "renormalise" if "renormalise" in kl_tails else "bucket"
    return replace(losses[0], kl_tail=kl_tail)


def _kl_tail(cache: Cache, tail: TailPolicy, *, exact_only: bool) -> TailPolicy:
    """The tail policy of the reported KL. Raises: ConfigError for a loss on tail mass that is unknown."""
    if tail == "sampled" or (cache.metadata.sampled and not exact_only):
        return "sampled"
    if not cache.metadata.renormalised:
        return "bucket"
    if tail != "renormalise":
        raise ConfigError(
            f"`tail` {tail}: the entries of {cache.path} were rescaled to sum to 1 before they were imported, so the "
            "teacher's tail mass is unknown, and this policy would teach that it is 0. Use `tail=renormalise`."
        )
    return "renormalise"


def _check_tail(cache: Cache, loss: DistillLoss) -> None:
    tail, targets = loss.tail, cache.metadata.targets
    if tail == "sampled" and not cache.metadata.sampled:
        raise ConfigError(
            f"`tail` sampled: {cache.path} has {targets['kind']} targets, which do not include a sample of the tail. "
            "Use `tail=bucket`, or cache the text with `targets=threshold`."
        )
    check_exact_entries(cache, tail, loss.divergence)
    if tail != "realized":
        return
    if cache.metadata.alignment != "next":
        raise ConfigError(
            f"`tail` realized: {cache.path} has targets at masked tokens. The observed tokens come from a text and "
            "are not draws from the teacher's distribution. Use another `tail`."
        )
    if drawn_from_teacher(cache) is False:
        generation = cache.metadata.corpus["generation"]
        if (writer := generation.get("writer")) is not None:
            raise ConfigError(
                f"`tail` realized: the text of {cache.path} was written by {writer['name']}, so its tokens are not "
                "draws from the teacher's distribution. Use another `tail`."
            )
        raise ConfigError(
            f"`tail` realized: the text of {cache.path} was generated with `gen_temperature` "
            f"{generation['temperature']:g}, `gen_top_p` {generation['top_p']:g} and `gen_top_k` "
            f"{generation['top_k']}, so its tokens are not draws from the teacher's own distribution. Use another "
            "`tail`, or generate with `gen_temperature=1`, `gen_top_p=1` and `gen_top_k=0`."
        )
    if (captured := float(targets["temperature"])) != 1.0:
        raise ConfigError(
            f"`tail` realized: {cache.path} was captured at temperature {captured}, and the teacher's own text is "
            "not a sample from its distribution at that temperature. Use `tail=bucket`, or cache the text with "
            "`temperature=1`."
        )


def _check_temperature(cache: Cache, loss: DistillLoss, schedule: Schedule | None) -> None:
    captured = float(cache.metadata.targets["temperature"])
    used = (loss.temperature,) if schedule is None else schedule.values
    other = next((value for value in used if value != captured), None)
    if other is None or not (loss.tail in UNBIASED or captured != 1.0):
        return
    what = "a sample" if loss.tail in UNBIASED else "truncated targets"
    option = f"`temperature` {other}"
    instead = f"Use `temperature={captured}`, or cache the text with `temperature={other}`."
    if schedule is not None:
        option, instead = f"`temperature_schedule` {schedule}", f"Use `temperature={captured}`."
    raise ConfigError(
        f"{option}: {cache.path} was captured at temperature {captured}, and {what} cannot be converted "
        f"to another temperature. {instead}"
    )
