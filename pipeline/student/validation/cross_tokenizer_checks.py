"""Which losses re-tokenised targets can serve: see `pipeline.student.data.cross_tokenizer`."""

from __future__ import annotations

from cache_format import Cache
from pipeline.errors import ConfigError
from pipeline.losses import TailPolicy
from pipeline.student.data.cross_tokenizer import METHODS
from pipeline.student.validation.suitability import exact_entries, without_exact


def check_cross_tokenizer(
    cache: Cache,
    method: str = "project",
    *,
    tail: TailPolicy | None = None,
    divergence: str = "forward-kl",
    temperature: float | None = None,
    scheduled_temperature: bool = False,
    position_weighting: str = "uniform",
    resample: bool = False,
) -> TailPolicy:
    """The tail policy to use.

    Raises: ConfigError for a loss that re-tokenised targets cannot serve, with the reason.
    """
    option, targets = f"`cross_tokenizer` {method}", cache.metadata.targets
    if method not in METHODS:
        raise ConfigError(f"{option}: expected {' or '.join(METHODS)}.")
    if cache.metadata.alignment != "next":
        raise ConfigError(
            f"{option}: {cache.path} has targets at masked tokens, and the student's tokens cannot be masked at the "
            "same places. Use a student with the teacher's tokenizer."
        )
    if exact_entries(cache)[0] == 0:
        raise ConfigError(
            f"{option}: {cache.path} has {without_exact(cache)}, and a sample is no longer unbiased if tokens have no "
            "counterpart. Cache the text with `targets=top-k`."
        )
    if targets["kind"] == "hidden":
        raise ConfigError(
            f"{option}: {cache.path} has hidden targets, without entries to project on other tokens. Make a cache with "
            "entries of it: distill convert with `top_k=64`."
        )
    allowed = ("bucket", "renormalise") if method == "project" else ("bucket",)
    if tail is not None and tail not in allowed:
        raise ConfigError(
            f"{option}: `tail` {tail} needs the entries that have no counterpart. Use "
            f"{' or '.join(f'`tail={each}`' for each in allowed)}."
        )
    if resample:
        raise ConfigError(f"{option}: sampled entries are not used, so `resample` has no effect. Leave `resample` out.")
    if position_weighting == "teacher-entropy":
        raise ConfigError(
            f"{option}: `position_weighting` teacher-entropy is unknown at positions that are not aligned. Use "
            "`position_weighting=student-entropy`."
        )
    if method == "uld":
        captured = float(targets["temperature"])
        if divergence != "forward-kl":
            raise ConfigError(
                f"{option}: found `divergence` {divergence} as well, expected only one of them. Leave one out."
            )
        if (
            captured != 1.0
            or temperature not in (None, 1.0)
            or scheduled_temperature
            or position_weighting != "uniform"
        ):
            raise ConfigError(
                f"{option}: it compares probabilities at temperature 1, with uniform weights. Use targets captured at "
                f"temperature 1 (found {captured:g}), and neither `temperature` nor `position_weighting`."
            )
    default: TailPolicy = "renormalise" if cache.metadata.renormalised else "bucket"
    if default not in allowed:
        raise ConfigError(
            f"{option}: {cache.path} has renormalised targets, whose tail mass is unknown, and this method compares "
            "it. Use `cross_tokenizer=project`."
        )
    return tail or default
