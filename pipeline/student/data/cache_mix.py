"""Which caches a run trains on, how much of each, and whether they can be trained on together.

    --cache A:0.7 --cache B:0.3       70 % of the counted tokens are A's
    --cache A --cache B               in proportion to what there is: their union

**Shares are of counted tokens**, those that a loss is computed at: a step's loss is a mean over them, so these are the
shares of the objective. Rows are drawn, by fixed numbers of each cache, from what its manifest says of all its rows.

**An epoch** is as long as one pass over all the caches together, in counted tokens, whatever the weights: a cache
whose weight is more than its part of them is gone through more than once in it, another less than once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.inspection import describe_targets
from pipeline.losses import TailPolicy
from pipeline.models.tokenizers import check_same_tokenizer
from pipeline.student.cache_paths import parse_weight
from pipeline.student.model.hidden_state_matching import HiddenStateLoss, states_everywhere
from pipeline.student.training.recipe import LossRecipe
from pipeline.student.validation.compatibility import load_cache_tokenizer
from pipeline.student.validation.suitability import default_tail, exact_entries


@dataclass(frozen=True)
class Portion:
    """One of the caches that a run trains on."""

    cache: cf.Cache
    weight: float | None  # as given
    share: float  # of the counted tokens that training sees
    rows: int  # in an epoch

    def passes(self, rows: float) -> float:
        """How often so many rows go through the cache."""
        return rows / len(self.cache)


@dataclass(frozen=True)
class Mix:
    """All of them; one cache is a mix of one."""

    portions: tuple[Portion, ...]

    @property
    def caches(self) -> list[cf.Cache]:
        return [portion.cache for portion in self.portions]

    @property
    def first(self) -> cf.Cache:
        """For everything in which they agree."""
        return self.portions[0].cache

    @property
    def rows(self) -> int:
        """In an epoch."""
        return sum(portion.rows for portion in self.portions)

    @property
    def tokens(self) -> float:
        """In an epoch, without padding; of a cache that it holds a part of, as many as are there on average."""
        return sum(portion.passes(portion.rows) * portion.cache.num_tokens for portion in self.portions)

    @property
    def counted_tokens(self) -> float:
        """Likewise."""
        return sum(portion.passes(portion.rows) * portion.cache.num_counted_tokens for portion in self.portions)

    def with_states(self, layers: Sequence[int]) -> Mix:
        """As `cf.Cache.with_states`, all of them."""
        return Mix(tuple(replace(portion, cache=portion.cache.with_states(layers)) for portion in self.portions))

    def seen(self, rows: int) -> list[dict[str, Any]]:
        """What of each cache the first `rows` rows of a run are: passes, rows to the nearest, tokens on average."""
        found = []
        for portion in self.portions:
            of_it = rows * portion.rows / self.rows
            passes = portion.passes(of_it)
            found.append(
                {
                    "cache": portion.cache.path,
                    "weight": portion.weight,
                    "share": portion.share,
                    "rows_per_epoch": portion.rows,
                    "rows": round(of_it),
                    "passes": passes,
                    "tokens": round(passes * portion.cache.num_tokens),
                    "counted_tokens": round(passes * portion.cache.num_counted_tokens),
                }
            )
        return found


def open_mix(given: str | Sequence[str], **options: Any) -> Mix:
    """The caches of `--cache`, opened with `options`, and how much of each.

    Raises: ConfigError for weights that make no mixture; CacheError if one cannot be opened.
    """
    named = [parse_weight(text) for text in ([given] if isinstance(given, str) else given)]
    if not named:
        raise ConfigError("--cache: found none, expected at least one. Name the directory that cache-teacher wrote.")
    with_weight = [path for path, weight in named if weight is not None]
    if 0 < len(with_weight) < len(named):
        without = next(path for path, weight in named if weight is None)
        raise ConfigError(
            f"--cache {without}: has no weight, {with_weight[0]} has one. Give every cache one, as in {without}:1, or "
            "none: then they are mixed in proportion to their size."
        )
    caches = [cf.open_cache(path, **options) for path, _ in named]
    for i, cache in enumerate(caches):
        for other in caches[:i]:
            if _shards(cache) == _shards(other):
                raise ConfigError(
                    f"--cache {cache.path}: holds the same shards as {other.path}. Name it once, with the sum of the "
                    "weights."
                )
    return mix_of(caches, [weight for _, weight in named])


def mix_of(caches: Sequence[cf.Cache], weights: Sequence[float | None]) -> Mix:
    """Shares and rows of each.

    Raises: ConfigError for a weight that no row, or less than one in an epoch, could have.
    """
    everything = sum(cache.num_counted_tokens for cache in caches)
    if len(caches) == 1 or any(weight is None for weight in weights):
        of_all = max(1, everything)
        shares = [cache.num_counted_tokens / of_all if len(caches) > 1 else 1.0 for cache in caches]
        rows = [len(cache) for cache in caches]
    else:
        given = [weight for weight in weights if weight is not None]
        largest = max(given)
        total = sum(weight / largest for weight in given)  # does not overflow
        shares = [weight / largest / total for weight in given]
        rows = []
        for cache, share in zip(caches, shares, strict=True):
            if not cache.num_counted_tokens:
                raise ConfigError(
                    f"--cache {cache.path}: no token of it counts, so it cannot have a share. Leave it out."
                )
            rows.append(round(share * everything * len(cache) / cache.num_counted_tokens))
            if not rows[-1]:
                raise ConfigError(
                    f"--cache {cache.path}: a share of {share:.2g} is less than one row in an epoch of {everything:,} "
                    "counted tokens. Give it a larger weight, or leave it out."
                )
    parts = zip(caches, weights, shares, rows, strict=True)
    return Mix(tuple(Portion(*part) for part in parts))


def recipe_for(
    mix: Mix, *, tail: TailPolicy | None, divergence: str, features: HiddenStateLoss | None = None, **options: Any
) -> tuple[LossRecipe, list[str]]:
    """`LossRecipe.for_cache` of every one of the caches, which is the same, and the warnings of `check_agreement`.

    Raises: as both.
    """
    tails = [tail or default_tail(cache, divergence) for cache in mix.caches]
    warnings = check_agreement(mix, tails=tails, features=features)
    recipes = [LossRecipe.for_cache(cache, tail=tail, divergence=divergence, **options) for cache in mix.caches]
    # Rows of all of them stand in one batch: one without a sample leaves what all have, exact entries and the rest.
    return replace(recipes[0], sampled=all(recipe.sampled for recipe in recipes)), warnings


def check_agreement(mix: Mix, *, tails: Sequence[TailPolicy], features: HiddenStateLoss | None = None) -> list[str]:
    """Warnings about caches that differ where it is no hindrance.

    Args:
        tails: the policy that goes with each cache.

    Raises: MismatchError if they differ in what the loss of a batch depends on, with every difference.
    """
    facts = [_facts(cache, tail, features) for cache, tail in zip(mix.caches, tails, strict=True)]
    found, names = [], set()
    for cache, own in zip(mix.caches[1:], facts[1:], strict=True):
        different = [name for name in own if own[name] != facts[0][name]]
        if different == ["segmentation"] and _same_tokens(mix.first, cache):
            different = []  # in the words of another version of the library
        if different:
            listed = "; ".join(f"{name} {facts[0][name]} against {own[name]}" for name in different)
            found.append(f"{mix.first.path} and {cache.path} differ in {listed}")
            names |= set(different)
    if found:
        remedy = "Cache the texts with the same teacher and settings, or train on one of them."
        if names == {"tail policy"} and all(exact_entries(cache)[0] for cache in mix.caches):
            remedy = "Give --tail bucket, which serves them all, or cache them with the same --targets."
        raise cf.MismatchError(
            f"--cache: {'. '.join(found)}. Rows of all caches stand in one batch, which has one loss. {remedy}"
        )
    return _differences(mix, tails)


def _facts(cache: cf.Cache, tail: TailPolicy, features: HiddenStateLoss | None) -> dict[str, Any]:
    """What the loss of a batch depends on, by name."""
    about, targets = cache.metadata, cache.metadata.targets
    facts: dict[str, Any] = {
        "vocabulary size": f"{about.vocab_size:,}",
        "vocabulary": _short(about.tokenizer.get("vocabulary")),
        "segmentation": _short(about.tokenizer.get("segmentation")),
        "alignment": f"{about.alignment} ({'causal' if about.alignment == 'next' else 'masked'})",
        "temperature": float(targets["temperature"]),
        "tail policy": tail,
    }
    head, states = about.head, about.hidden
    of_head = (None, None) if head is None or states is None else (_short(head.sha256), states.dtype)
    facts |= {"head of hidden targets": of_head[0] or "none", "states of hidden targets": of_head[1] or "none"}
    if features is not None:
        spec = about.hidden
        used = features.teacher_layers
        facts |= {
            "hidden layers": "none" if spec is None else str([layer for layer in spec.layers if layer in used]),
            "teacher layers": None if spec is None else spec.teacher_layers,
            "hidden width": None if spec is None else spec.width,
            "hidden dtype": None if spec is None else spec.dtype,
            "hidden every": None if spec is None else spec.every,
            "hidden positions": "all" if states_everywhere(cache) else "counted",
        }
    return facts


def _differences(mix: Mix, tails: Sequence[TailPolicy]) -> list[str]:
    """Of what does not hinder, what is worth knowing."""
    first, *others = mix.caches
    warnings = []
    for cache in others:
        if first.metadata.teacher.get("weights_fingerprint") != cache.metadata.teacher.get("weights_fingerprint"):
            warnings.append(f"{cache.path} was made with another teacher than {first.path}")
        ours, theirs = (describe_targets(_kept(each)) for each in (first, cache))
        if ours != theirs and tails[0] not in ("sampled", "realized"):
            warnings.append(
                f"{cache.path} has {theirs}, {first.path} {ours}: with --tail {tails[0]} the loss of each is off by "
                "another amount"
            )
    return warnings


def _same_tokens(one: cf.Cache, other: cf.Cache) -> bool:
    try:
        check_same_tokenizer(load_cache_tokenizer(one), load_cache_tokenizer(other))
    except cf.MismatchError:
        return False
    return True


def _kept(cache: cf.Cache) -> Mapping[str, Any]:
    """The targets without what decides the sample alone."""
    return {name: value for name, value in cache.metadata.targets.items() if name != "samples"}


def _shards(cache: cf.Cache) -> list[str]:
    return [shard.sidecar_sha256 for shard in cache.manifest.shards]


def _short(digest: str | None) -> str:
    return "unknown" if digest is None else f"{digest[:8]}…"
