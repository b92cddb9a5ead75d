"""What a cache's targets can serve: which tail policies, which text, which ways of using several samples."""

from __future__ import annotations

from collections.abc import Sequence

from cache_format import Cache
from pipeline.errors import ConfigError
from pipeline.losses import Mixture, TailPolicy


def default_tail(cache: Cache, divergence: str) -> TailPolicy:
    """What goes with a cache's targets: unbiased if they are and the divergence can be.

    Raises: ConfigError for a divergence that cannot be read, or that nothing of these targets serves.
    """
    mixture = parse_divergence(divergence)
    if cache.metadata.sampled and "sampled" in mixture.tails:
        return "sampled"
    if cache.metadata.targets["kind"] == "random":
        raise ConfigError(
            f"--divergence {mixture}: {cache.path} has random targets, without any exact entry, and of a "
            "sample only forward-kl is unbiased. Use --divergence forward-kl, or cache with --targets top-k."
        )
    return "bucket"


def parse_divergence(divergence: str) -> Mixture:
    """Raises: ConfigError if it names none."""
    try:
        return Mixture.parse(divergence)
    except ValueError as error:
        raise ConfigError(f"--{error}.") from error


def drawn_from_teacher(cache: Cache) -> bool | None:
    """Whether the tokens that count are draws from the teacher's own distribution at T = 1; None: not recorded."""
    written = cache.metadata.corpus.get("generation")
    if written is None:
        return None
    return (written["temperature"], written["top_p"], written["top_k"]) == (1.0, 1.0, 0)


def realized_warnings(cache: Cache) -> list[str]:
    """What `--tail realized` takes for granted and the cache does not vouch for."""
    written = cache.metadata.corpus.get("generation")
    if written is None:
        return [
            f"--tail realized: {cache.path} does not say that its teacher wrote the text (cache-teacher --generate). "
            "On any other text this is wrong."
        ]
    if written["passed"] < written["answers"] or written["keep"] == "best":
        return [
            f"--tail realized: of the answers in {cache.path} some were chosen (--keep-if, --keep), so they are not "
            "quite draws from the teacher's own distribution."
        ]
    return []


# ---- several samples of the tail


def check_resample(caches: Sequence[Cache], tail: TailPolicy, learns_from_teacher: bool) -> None:
    """Raises: ConfigError if `--resample` could make no difference, with the reason."""
    for cache in caches:
        if cache.metadata.num_samples == 1:
            raise ConfigError(
                f"--resample: {cache.path} has one sample of the tail at each position. Leave it out, or cache with "
                "--samples 2 or more."
            )
    if not learns_from_teacher:
        raise ConfigError(
            "--resample: with --kd-weight 0 labels alone are learned from, and no sample is looked at. Leave it out."
        )
    if tail != "sampled":
        raise ConfigError(
            f"--resample: --tail {tail} leaves sampled entries out, so every sample is the same to it. Leave it out, "
            "or use --tail sampled with --divergence forward-kl."
        )


def resample_warnings(passes: Sequence[tuple[Cache, float]]) -> list[str]:
    """Of caches that a run goes through less often than they have samples."""
    return [
        f"--resample: {cache.path} is gone through {times:.3g} time{'s' * (times != 1.0)} and has "
        f"{cache.metadata.num_samples} samples: some are never used, and each pass has up to "
        f"{cache.metadata.num_samples} times the variance of all of them together. Train for "
        f"{cache.metadata.num_samples} epochs or more, or leave it out"
        for cache, times in passes
        if times < cache.metadata.num_samples
    ]
