"""What a cache's targets can serve: which losses by which tail policies, and what is to be known of it.

Some losses take anything but a weighted sum of the teacher's probabilities, and of a sample see nothing: to them a
position is its exact entries and the rest. How many entries that is follows from the targets' rule as far as it is
certain, and from the first rows as far as it is not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from cache_format import Cache
from pipeline.errors import ConfigError
from pipeline.losses import UNBIASED, Mixture, TailPolicy

PROBED_RECORD_BATCHES = 4


def default_tail(cache: Cache, divergence: str) -> TailPolicy:
    """What goes with a cache's targets: unbiased if they are and the divergence can be.

    Raises: ConfigError for a divergence that cannot be read, or that nothing of these targets serves.
    """
    mixture = parse_divergence(divergence)
    if cache.metadata.sampled and "sampled" in mixture.tails:
        return "sampled"
    if exact_entries(cache)[0] == 0:
        raise ConfigError(
            f"--divergence {mixture}: {cache.path} has {without_exact(cache)}, and of a sample only forward-kl is "
            "unbiased. Use --divergence forward-kl, or cache with --targets top-k."
        )
    return "bucket"


def parse_divergence(divergence: str) -> Mixture:
    """Raises: ConfigError if it names none."""
    try:
        return Mixture.parse(divergence)
    except ValueError as error:
        raise ConfigError(f"--{error}.") from error


# ---- exact entries


def exact_entries(cache: Cache) -> tuple[int, float]:
    """The fewest and the most exact entries that a position can have by the rule of the targets."""
    targets = cache.metadata.targets
    k = targets.get("k")
    if targets["kind"] == "random":
        return 0, 0
    if targets["kind"] == "threshold" and "tail_threshold" in targets:
        # Those with p ≥ τ, and the K likeliest. The likeliest has at least 1/V; n of them have at least n·τ.
        k, tau = k or 0, targets["tail_threshold"]
        return max(k, int(tau * cache.metadata.vocab_size < 1.0)), max(k, math.floor(1.0 / tau))
    return (1, cache.metadata.max_entries or math.inf) if k is None else (k, k)


def without_exact(cache: Cache) -> str:
    """Words for targets of which a position may have no exact entry."""
    if cache.metadata.targets["kind"] == "random":
        return "random targets, without any exact entry"
    return "threshold targets with K = 0, without an exact entry where no token reaches the threshold"


def check_exact_entries(cache: Cache, tail: TailPolicy, mixture: Mixture) -> None:
    """Raises: ConfigError if the exact entries are too few for a loss under this policy, with the reason."""
    fewest, most = exact_entries(cache)
    random = cache.metadata.targets["kind"] == "random"
    if fewest == 0 and tail != "sampled" and (random or tail not in UNBIASED):
        instead = "" if random else ", or cache with --top-k 1 or more"
        raise ConfigError(
            f"--tail {tail}: {cache.path} has {without_exact(cache)}, and this policy is not linear in the teacher's "
            f"probabilities: on a sample it is biased. Use --tail sampled{instead}."
        )
    compared = [term.name for term in mixture.terms if term.divergence.of_entries]
    if compared and most < 2:
        raise ConfigError(
            f"--divergence {mixture}: {cache.path} has at most one exact entry at each position, and {compared[0]} "
            "compares exact entries with one another: it would be 0. Use another --divergence, or cache more entries "
            "(--top-k)."
        )


def exact_entry_warnings(caches: Sequence[Cache], tail: TailPolicy, loss: str, mixture: Mixture) -> list[str]:
    """What a loss that uses no sample makes of targets that have one, or of positions with a single entry.

    Args:
        loss: how it was asked for: an option and its value.
    """
    warnings = []
    compared = [term.name for term in mixture.terms if term.divergence.of_entries]
    for cache in caches:
        may_be_alone = bool(compared) and exact_entries(cache)[0] < 2
        if not (cache.metadata.sampled or may_be_alone):
            continue
        counts, rows = first_exact_counts(cache)
        parts = [f"{loss}: {cache.path} has {np.mean(counts):.1f} exact entries a position (mean of {rows} rows)"]
        if cache.metadata.sampled:
            parts.append(f"the sample of the tail is not used, the loss is by --tail {tail}")
        if may_be_alone and (alone := float(np.mean(counts < 2))):
            parts.append(
                f"{' and '.join(compared)} teach nothing where there is one or none, at {alone:.0%} of positions"
            )
        if len(parts) > 1:
            warnings.append("; ".join(parts))
    return warnings


def first_exact_counts(cache: Cache) -> tuple[np.ndarray, int]:
    """[n] exact entries of the counted positions of the first rows, and how many rows those are."""
    batches = list(itertools.islice(cache.iter_record_batches(), PROBED_RECORD_BATCHES))
    counts = [np.asarray(batch.exact_counts)[np.asarray(batch.loss_mask)] for batch in batches]
    found = np.concatenate(counts) if counts else np.zeros(0)
    return (found if len(found) else np.zeros(1)), sum(map(len, batches))


# ---- the teacher's own text


def drawn_from_teacher(cache: Cache) -> bool | None:
    """Whether the tokens that count are draws from the teacher's own distribution at T = 1; None: not recorded."""
    written = cache.metadata.corpus.get("generation")
    if written is None:
        return None
    settings = tuple(written.get(name) for name in ("temperature", "top_p", "top_k"))
    return None if None in settings else settings == (1.0, 1.0, 0)


def realized_warnings(cache: Cache) -> list[str]:
    """What `--tail realized` takes for granted and the cache does not vouch for."""
    written = cache.metadata.corpus.get("generation")
    if written is None or drawn_from_teacher(cache) is None:
        return [
            f"--tail realized: {cache.path} does not say that its teacher wrote the text (cache-teacher --generate). "
            "On any other text this is wrong."
        ]
    if (written.get("passed") or 0) < (written.get("answers") or 0) or written.get("keep") == "best":
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
