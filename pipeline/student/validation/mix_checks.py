"""Whether the caches of a run can be trained on together, and the loss on rows of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cache_format as cf
from pipeline.inspection import describe_targets
from pipeline.losses import DistillLoss, TailPolicy
from pipeline.models.tokenizers import check_same_tokenizer, load_cache_tokenizer
from pipeline.student.data.cache_mix import Mix
from pipeline.student.model.hidden_state_matching import HiddenStateLoss, states_everywhere
from pipeline.student.validation.loss_checks import loss_for_all, loss_for_cache
from pipeline.student.validation.suitability import default_tail, exact_entries


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


def _short(digest: str | None) -> str:
    return "unknown" if digest is None else f"{digest[:8]}…"
