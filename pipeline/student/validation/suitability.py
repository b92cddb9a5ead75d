"""Which losses and tail policies a cache's targets can serve, and warnings about those they serve badly.

Losses that are not linear in the teacher's probabilities ignore sampled entries: for them a position is its exact
entries and the tail. Bounds on the number of exact entries follow from the rule of the targets; its mean is measured on
the first rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from cache_format import Cache
from pipeline.errors import ConfigError
from pipeline.losses import UNBIASED, DivergenceSum, TailPolicy

PROBED_RECORD_BATCHES = 4


def default_tail(cache: Cache, divergence: str) -> TailPolicy:
    """The tail policy for a cache: `sampled` if it has a sample of the tail and the divergence can use one,
    `renormalise` if the tail mass is unknown, else `bucket`.

    Raises: ConfigError for a divergence that cannot be parsed, or that these targets cannot serve.
    """
    parsed = parse_divergence(divergence)
    if cache.metadata.sampled and "sampled" in parsed.tails:
        return "sampled"
    if exact_entries(cache)[0] == 0:
        raise ConfigError(
            f"`divergence` {parsed}: {cache.path} has {without_exact(cache)}, and only forward-kl is unbiased on a "
            "sample. Use `divergence=forward-kl`, or cache the text with `targets=top-k`."
        )
    return "renormalise" if cache.metadata.renormalised else "bucket"


def parse_divergence(divergence: str) -> DivergenceSum:
    """Raises: ConfigError if it cannot be parsed."""
    try:
        return DivergenceSum.parse(divergence)
    except ValueError as error:
        raise ConfigError(str(error)) from error


# ---- exact entries


def exact_entries(cache: Cache) -> tuple[int, float]:
    """Bounds on the number of exact entries of a position, from the rule of the targets."""
    targets = cache.metadata.targets
    k = targets.get("k")
    if targets["kind"] == "random":
        return 0, 0
    tau = targets.get("tail_threshold")
    if targets["kind"] == "threshold" and tau is not None:
        # Exact are tokens with p ≥ τ and the K likeliest. The likeliest has p ≥ 1/V; n with p ≥ τ have n·τ ≤ 1.
        k = k or 0
        return max(k, int(tau * cache.metadata.vocab_size < 1.0)), max(k, math.floor(1.0 / tau))
    return (1, cache.metadata.max_entries or math.inf) if k is None else (k, k)


def without_exact(cache: Cache) -> str:
    """Describes targets that may have no exact entry at a position."""
    if cache.metadata.targets["kind"] == "random":
        return "random targets, without exact entries"
    return "threshold targets with `top_k` 0, without exact entries at positions where no token reaches the threshold"


def check_exact_entries(cache: Cache, tail: TailPolicy, divergence: DivergenceSum) -> None:
    """Raises: ConfigError if the exact entries are too few for a loss under this policy, with the reason."""
    fewest, most = exact_entries(cache)
    random = cache.metadata.targets["kind"] == "random"
    if fewest == 0 and tail != "sampled" and (random or tail not in UNBIASED):
        instead = "" if random else ", or cache the text with `top_k` 1 or more"
        raise ConfigError(
            f"`tail` {tail}: {cache.path} has {without_exact(cache)}, and this policy is biased on a sample, because "
            f"it is not linear in the teacher's probabilities. Use `tail=sampled`{instead}."
        )
    compared = [term.name for term in divergence.terms if term.divergence.of_entries]
    if compared and most < 2:
        raise ConfigError(
            f"`divergence` {divergence}: {cache.path} has at most one exact entry per position, and {compared[0]} "
            "compares exact entries with one another, so it would be 0. Use another `divergence`, or cache more "
            "entries with `top_k`."
        )


def exact_entry_warnings(
    caches: Sequence[Cache], tail: TailPolicy, option: str, divergence: DivergenceSum
) -> list[str]:
    """Warnings if the loss ignores sampled entries that the targets have, or is 0 at positions with a single entry.

    Args:
        option: the option that chose the loss, with its value.
    """
    warnings = []
    compared = [term.name for term in divergence.terms if term.divergence.of_entries]
    for cache in caches:
        may_be_alone = bool(compared) and exact_entries(cache)[0] < 2
        if not (cache.metadata.sampled or may_be_alone):
            continue
        counts, rows = first_exact_counts(cache)
        parts = [f"{option}: {cache.path} has {np.mean(counts):.1f} exact entries per position (mean of {rows} rows)"]
        if cache.metadata.sampled:
            parts.append(f"the sampled entries are not used, because the loss has `tail={tail}`")
        if may_be_alone and (alone := float(np.mean(counts < 2))):
            parts.append(
                f"{' and '.join(compared)} teach nothing at positions with fewer than two ({alone:.0%} of all)"
            )
        if len(parts) > 1:
            warnings.append("; ".join(parts))
    return warnings


def first_exact_counts(cache: Cache) -> tuple[np.ndarray, int]:
    """[n] numbers of exact entries at the loss tokens of the first rows, and the number of those rows."""
    batches = list(itertools.islice(cache.iter_record_batches(), PROBED_RECORD_BATCHES))
    counts = [np.asarray(batch.exact_counts)[np.asarray(batch.loss_mask)] for batch in batches]
    found = np.concatenate(counts) if counts else np.zeros(0)
    return (found if len(found) else np.zeros(1)), sum(map(len, batches))


# ---- the teacher's own text


def drawn_from_teacher(cache: Cache) -> bool | None:
    """Whether the loss tokens are draws from the teacher's own distribution at T = 1; None: not recorded."""
    written = cache.metadata.corpus.get("generation")
    if written is None:
        return None
    if written.get("writer") is not None:
        return False
    settings = tuple(written.get(name) for name in ("temperature", "top_p", "top_k"))
    return None if None in settings else settings == (1.0, 1.0, 0)


def realized_warnings(cache: Cache) -> list[str]:
    """Warnings about assumptions of the policy `realized` that the cache does not confirm."""
    written = cache.metadata.corpus.get("generation")
    if written is None or drawn_from_teacher(cache) is None:
        return [
            f"`tail` realized: {cache.path} does not record that its teacher wrote the text (distill cache-teacher "
            "with `generate`). On any other text this policy is wrong."
        ]
    if (written.get("passed") or 0) < (written.get("answers") or 0) or written.get("keep") == "best":
        return [
            f"`tail` realized: the answers in {cache.path} were filtered (`gen_keep_if`, `gen_keep`), so they are not "
            "exactly draws from the teacher's own distribution."
        ]
    return []


def label_warnings(cache: Cache) -> list[str]:
    """Warnings about labels that are the tokens of another model than the teacher."""
    writer = (cache.metadata.corpus.get("generation") or {}).get("writer")
    if writer is None:
        return []
    return [
        f"{cache.path}: its labels are tokens that {writer['name']} wrote, mistakes included, and with `kd_weight` "
        "below 1 the student learns them too. Use `kd_weight=1` to learn from the teacher only."
    ]


# ---- several samples of the tail


def check_resample(caches: Sequence[Cache], tail: TailPolicy, learns_from_teacher: bool) -> None:
    """Raises: ConfigError if `resample` would have no effect, with the reason."""
    for cache in caches:
        if cache.metadata.num_samples == 1:
            raise ConfigError(
                f"`resample`: {cache.path} has only one tail sample per position. Leave `resample` out, or cache the "
                "text with `samples` 2 or more."
            )
    if not learns_from_teacher:
        raise ConfigError(
            "`resample`: with `kd_weight=0`, training uses only the labels, not the samples. Leave `resample` out."
        )
    if tail != "sampled":
        raise ConfigError(
            f"`resample`: `tail={tail}` ignores sampled entries. Leave `resample` out, or use `tail=sampled` with "
            "`divergence=forward-kl`."
        )


def resample_warnings(passes: Sequence[tuple[Cache, float]]) -> list[str]:
    """Warnings about caches with more samples than the run makes passes."""
    return [
        f"`resample`: the run makes {times:.3g} pass{'es' * (times != 1.0)} over {cache.path}, which has "
        f"{cache.metadata.num_samples} samples: some are never used, and each pass has up to "
        f"{cache.metadata.num_samples} times the variance of all of them together. Train for "
        f"{cache.metadata.num_samples} epochs or more, or leave `resample` out"
        for cache, times in passes
        if times < cache.metadata.num_samples
    ]
