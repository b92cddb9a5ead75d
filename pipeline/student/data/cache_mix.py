"""The caches of a run, and the share of each. `validation.mix_checks` checks that they can be trained on together.

    cache=("A:0.7", "B:0.3")      70 % of the loss tokens are A's
    cache=("A", "B")              in proportion to their sizes: their union

**Shares are of loss tokens**: the loss of a step is a mean over them, so these are the shares of the objective. Each
cache contributes a fixed number of rows, computed from the average number of loss tokens per row in its manifest.

**An epoch** has as many loss tokens as all the caches together, whatever the weights: it passes more than once over a
cache whose weight exceeds its share of them, and less than once over another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.student.cache_paths import parse_weight


@dataclass(frozen=True)
class Portion:
    """One of the caches of a run."""

    cache: cf.Cache
    weight: float | None  # as the user gave it
    share: float  # of the loss tokens
    rows: int  # per epoch

    def passes(self, rows: float) -> float:
        """Number of passes over the cache in `rows` rows of it."""
        return rows / len(self.cache)


@dataclass(frozen=True)
class Mix:
    """All caches of a run; a single cache is a mix of one."""

    portions: tuple[Portion, ...]

    @property
    def caches(self) -> list[cf.Cache]:
        return [portion.cache for portion in self.portions]

    @property
    def first(self) -> cf.Cache:
        """The first cache, for facts on which all agree."""
        return self.portions[0].cache

    @property
    def rows(self) -> int:
        """Rows per epoch."""
        return sum(portion.rows for portion in self.portions)

    @property
    def tokens(self) -> float:
        """Tokens per epoch, without padding; on average, if an epoch holds part of a cache."""
        return sum(portion.passes(portion.rows) * portion.cache.num_tokens for portion in self.portions)

    @property
    def loss_tokens(self) -> float:
        """Loss tokens per epoch, likewise."""
        return sum(portion.passes(portion.rows) * portion.cache.num_loss_tokens for portion in self.portions)

    def with_states(self, layers: Sequence[int]) -> Mix:
        """`cf.Cache.with_states` on every cache."""
        return Mix(tuple(replace(portion, cache=portion.cache.with_states(layers)) for portion in self.portions))

    def seen(self, rows: int) -> list[dict[str, Any]]:
        """The part of each cache in the first `rows` rows of a run: passes, rounded rows, tokens on average."""
        found = []
        for portion in self.portions:
            own_rows = rows * portion.rows / self.rows
            passes = portion.passes(own_rows)
            found.append(
                {
                    "cache": portion.cache.path,
                    "weight": portion.weight,
                    "share": portion.share,
                    "rows_per_epoch": portion.rows,
                    "rows": round(own_rows),
                    "passes": passes,
                    "tokens": round(passes * portion.cache.num_tokens),
                    "loss_tokens": round(passes * portion.cache.num_loss_tokens),
                }
            )
        return found


def open_mix(given: str | Sequence[str], **options: Any) -> Mix:
    """The caches of the option `cache`, and the share of each.

    Args:
        given: PATH or PATH:WEIGHT, one or several.
        options: as for `cf.open_cache`.

    Raises: ConfigError for unusable weights; CacheError if a cache cannot be opened.
    """
    named = [parse_weight(text) for text in ([given] if isinstance(given, str) else given)]
    if not named:
        raise ConfigError(
            "`cache`: found none, expected at least one. Name the directory that distill cache-teacher wrote."
        )
    with_weight = [path for path, weight in named if weight is not None]
    if 0 < len(with_weight) < len(named):
        without = next(path for path, weight in named if weight is None)
        raise ConfigError(
            f"`cache` {without}: has no weight, but {with_weight[0]} has one. Give every cache a weight, as in "
            f"{without}:1, or none, which mixes them in proportion to their sizes."
        )
    caches = [cf.open_cache(path, **options) for path, _ in named]
    for i, cache in enumerate(caches):
        for other in caches[:i]:
            if _shards(cache) == _shards(other):
                raise ConfigError(
                    f"`cache` {cache.path}: holds the same shards as {other.path}. Name it once, with the sum of the "
                    "weights."
                )
    return mix_of(caches, [weight for _, weight in named])


def mix_of(caches: Sequence[cf.Cache], weights: Sequence[float | None]) -> Mix:
    """The share and the rows per epoch of each cache.

    Raises: ConfigError for a weight on a cache without loss tokens, or one that gives less than a row per epoch.
    """
    everything = sum(cache.num_loss_tokens for cache in caches)
    if len(caches) == 1 or any(weight is None for weight in weights):
        total_tokens = max(1, everything)
        shares = [cache.num_loss_tokens / total_tokens if len(caches) > 1 else 1.0 for cache in caches]
        rows = [len(cache) for cache in caches]
    else:
        given = [weight for weight in weights if weight is not None]
        largest = max(given)
        total = sum(weight / largest for weight in given)  # scaled: cannot overflow
        shares = [weight / largest / total for weight in given]
        rows = []
        for cache, share in zip(caches, shares, strict=True):
            if not cache.num_loss_tokens:
                raise ConfigError(
                    f"`cache` {cache.path}: it has no loss tokens, so it cannot have a share. Leave it out."
                )
            rows.append(round(share * everything * len(cache) / cache.num_loss_tokens))
            if not rows[-1]:
                raise ConfigError(
                    f"`cache` {cache.path}: a share of {share:.2g} is less than one row in an epoch of {everything:,} "
                    "loss tokens. Give it a larger weight, or leave it out."
                )
    parts = zip(caches, weights, shares, rows, strict=True)
    return Mix(tuple(Portion(*part) for part in parts))


def _shards(cache: cf.Cache) -> list[str]:
    return [shard.sidecar_sha256 for shard in cache.manifest.shards]
