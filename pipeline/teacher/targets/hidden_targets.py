"""Hidden targets: the input of the vocabulary head at every position, and the head itself, once.

A student computes the teacher's full distribution from them, at any temperature and without a tail: V probabilities
from D numbers. The states are ordinary columns of hidden states, alone or next to those of other layers. They are the
states of layer L if the head is applied to those; layer L + 1 is the output of a head's own transform, as in BERT.
"""

from __future__ import annotations

from dataclasses import replace

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.teacher.engines.interface import StoredHead
from pipeline.teacher.targets.hidden_rule import HiddenRule, Layered


def states_spec(rule: HiddenRule | None, teacher: Layered, stored_head: StoredHead | None) -> cf.HiddenSpec | None:
    """The states that a cache stores: those asked for, and those its targets are computed from.

    Raises: ConfigError for layers that this teacher does not have, or that are of another width than the targets.
    """
    if stored_head is None:
        return None if rule is None else rule.spec(teacher)
    rule = rule or HiddenRule(layers=None)
    last, width = teacher.layers()
    others = () if rule.layers is None else rule.spec(teacher).layers
    if set(others) - {stored_head.layer} and width != stored_head.width:
        raise ConfigError(
            f"`hidden_states` {rule.layers}: this teacher's states have width {width}, the input of its head has width "
            f"{stored_head.width}, and a cache holds states of one width. Leave it out, or make two caches."
        )
    layers = tuple(sorted({*others, stored_head.layer}))
    return cf.HiddenSpec(layers=layers, teacher_layers=last, width=stored_head.width, dtype=rule.dtype)


def with_head(targets: dict[str, object], stored_head: StoredHead | None) -> dict[str, object]:
    """The manifest's `targets`, with the stored head."""
    return targets if stored_head is None else {**targets, "head": stored_head.spec.to_json()}


def describe_head(stored_head: StoredHead | None, vocab_size: int) -> str:
    """Shape and size of the stored head, for the line that a run begins with."""
    if stored_head is None:
        return ""
    size = f"{vocab_size:,} × {stored_head.width:,} × {stored_head.spec.dtype}"
    return f", head of {size} = {stored_head.spec.bytes / 1e6:,.1f} MB"


def without_states_of(spec: cf.HiddenSpec, stored_head: StoredHead | None) -> cf.HiddenSpec | None:
    """The states that a cache of other targets would store too."""
    layers = tuple(layer for layer in spec.layers if stored_head is None or layer != stored_head.layer)
    return replace(spec, layers=layers) if layers else None
