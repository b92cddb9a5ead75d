"""The caches of a run, the share of each, and whether they can be trained on together.

    cache=("A:0.7", "B:0.3")      70 % of the loss tokens are A's
    cache=("A", "B")              in proportion to their sizes: their union

**Shares are of loss tokens**: the loss of a step is a mean over them, so these are the shares of the objective. Each
cache contributes a fixed number of rows, computed from the average number of loss tokens per row in its manifest.

**An epoch** has as many loss tokens as all the caches together, whatever the weights: it passes more than once over a
cache whose weight exceeds its share of them, and less than once over another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.inspection import describe_targets
from pipeline.losses import DistillLoss, TailPolicy
from pipeline.models.tokenizers import check_same_tokenizer
from pipeline.student.cache_paths import parse_weight
from pipeline.student.model.hidden_state_matching import HiddenStateLoss, states_everywhere
from pipeline.student.validation.compatibility import load_cache_tokenizer
from pipeline.student.validation.loss_checks import loss_for_all, loss_for_cache
from pipeline.student.validation.suitability import default_tail, exact_entries


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
    def counted_tokens(self) -> float:
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
                    "counted_tokens": round(passes * portion.cache.num_loss_tokens),
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


def loss_for_mix(
    mix: Mix, *, tail: TailPolicy | None, divergence: str, hidden: HiddenStateLoss | None = None, **options: Any
) -> tuple[DistillLoss, list[str]]:
    """The loss on rows of all caches, and the warnings of `check_agreement`.

    Args:
        hidden: the hidden-state part of the loss.
        options: as for `loss_for_cache`.

    Raises: ConfigError as `loss_for_cache`, MismatchError as `check_agreement`.
    """
    tails = [tail or default_tail(cache, divergence) for cache in mix.caches]
    warnings = check_agreement(mix, tails=tails, hidden=hidden)
    losses = [loss_for_cache(cache, tail=tail, divergence=divergence, **options) for cache in mix.caches]
    return loss_for_all(losses), warnings


def check_agreement(mix: Mix, *, tails: Sequence[TailPolicy], hidden: HiddenStateLoss | None = None) -> list[str]:
    """Warnings about harmless differences between the caches.

    Args:
        tails: the tail policy of each cache.

    Raises: MismatchError if they differ in anything the loss of a batch depends on, with all differences.
    """
    facts = [_facts(cache, tail, hidden) for cache, tail in zip(mix.caches, tails, strict=True)]
    found, names = [], set()
    for cache, own in zip(mix.caches[1:], facts[1:], strict=True):
        different = [name for name in own if own[name] != facts[0][name]]
        if different == ["segmentation"] and _same_tokens(mix.first, cache):
            different = []  # recorded differently by another version of the library
        if different:
            listed = "; ".join(f"{name} {facts[0][name]} against {own[name]}" for name in different)
            found.append(f"{mix.first.path} and {cache.path} differ in {listed}")
            names |= set(different)
    if found:
        remedy = "Cache the texts with the same teacher and options, or train on one of them."
        if names == {"tail policy"} and all(exact_entries(cache)[0] for cache in mix.caches):
            remedy = "Use `tail=bucket`, which all of them can serve, or cache them with the same `targets`."
        raise cf.MismatchError(
            f"`cache`: {'. '.join(found)}. Rows of all caches share a batch, which has one loss. {remedy}"
        )
    return _differences(mix, tails)


def _facts(cache: cf.Cache, tail: TailPolicy, hidden: HiddenStateLoss | None) -> dict[str, Any]:
    """Facts that the loss of a batch depends on, by name."""
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
    head_facts = (None, None) if head is None or states is None else (_short(head.sha256), states.dtype)
    facts |= {"head of hidden targets": head_facts[0] or "none", "states of hidden targets": head_facts[1] or "none"}
    if hidden is not None:
        spec = about.hidden
        used = hidden.teacher_layers
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
    """Harmless differences worth a warning."""
    first, *others = mix.caches
    warnings = []
    for cache in others:
        if first.metadata.teacher.get("weights_fingerprint") != cache.metadata.teacher.get("weights_fingerprint"):
            warnings.append(f"{cache.path} was made with a different teacher than {first.path}")
        ours, theirs = (describe_targets(_without_samples(each)) for each in (first, cache))
        if ours != theirs and tails[0] not in ("sampled", "realized"):
            warnings.append(
                f"{cache.path} has {theirs}, {first.path} has {ours}: with `tail={tails[0]}` their losses are biased "
                "differently"
            )
    return warnings


def _same_tokens(one: cf.Cache, other: cf.Cache) -> bool:
    try:
        check_same_tokenizer(load_cache_tokenizer(one), load_cache_tokenizer(other))
    except cf.MismatchError:
        return False
    return True


def _without_samples(cache: cf.Cache) -> Mapping[str, Any]:
    """The description of the targets without the number of samples."""
    return {name: value for name, value in cache.metadata.targets.items() if name != "samples"}


def _shards(cache: cf.Cache) -> list[str]:
    return [shard.sidecar_sha256 for shard in cache.manifest.shards]


def _short(digest: str | None) -> str:
    return "unknown" if digest is None else f"{digest[:8]}…"
