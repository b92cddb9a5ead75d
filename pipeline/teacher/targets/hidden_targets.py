"""Hidden targets: at every position the state that the vocabulary head multiplies, and once the head itself.

From these a student rebuilds the teacher's whole distribution, at any temperature, without a tail: V numbers of D.
The states are ordinary columns of hidden states (`teacher.hidden`), with or without those of other layers beside them.
They are layer L's where the head is applied to that, and L + 1 stands for what the head of a BERT makes of it first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.models.head import Head
from pipeline.models.head_export import HeadExport, export_head
from pipeline.teacher.cache_config import CacheTeacherConfig, HiddenRule


@dataclass(frozen=True, kw_only=True)
class WrittenHead:
    """The head of a teacher as a cache holds it."""

    form: HeadExport
    spec: cf.HeadSpec
    contents: bytes

    @property
    def layer(self) -> int:
        """The number of the states that it multiplies."""
        return self.spec.layer


def write_down(config: CacheTeacherConfig, head: Head) -> WrittenHead | None:
    """None unless the targets are hidden states. Raises: ModelError if this head cannot be written down."""
    if config.targets.kind != "hidden":
        return None
    form = export_head(head)
    last, _ = head.layers()
    spec, contents = form.file(last + 1 if form.transforms else last)
    return WrittenHead(form=form, spec=spec, contents=contents)


def states_spec(rule: HiddenRule | None, head: Head, written: WrittenHead | None) -> cf.HiddenSpec | None:
    """Which states a cache holds: those asked for, and what its targets are made of.

    Raises: ConfigError for layers that this teacher does not have, or that are of another width than the targets.
    """
    if written is None:
        return None if rule is None else rule.spec(head)
    rule = rule or HiddenRule(layers=None)
    last, width = head.layers()
    others = () if rule.layers is None else rule.spec(head).layers
    if set(others) - {written.layer} and width != written.form.width:
        raise ConfigError(
            f"`hidden_states` {rule.layers}: this teacher's states have width {width}, what its head multiplies has "
            f"{written.form.width}, and one cache holds states of one width. Leave it out, or make two caches."
        )
    layers = tuple(sorted({*others, written.layer}))
    return cf.HiddenSpec(layers=layers, teacher_layers=last, width=written.form.width, dtype=rule.dtype)


def with_head(targets: dict[str, object], written: WrittenHead | None) -> dict[str, object]:
    """The manifest's `targets`, with what makes distributions of them."""
    return targets if written is None else {**targets, "head": written.spec.to_json()}


def in_words(written: WrittenHead | None, vocab_size: int) -> str:
    """The size of the head, exactly."""
    if written is None:
        return ""
    size = f"{vocab_size:,} × {written.form.width:,} × {written.spec.dtype}"
    return f", head of {size} = {written.spec.bytes / 1e6:,.1f} MB"


def without_states_of(spec: cf.HiddenSpec, written: WrittenHead | None) -> cf.HiddenSpec | None:
    """The states that a cache of other targets would hold just the same."""
    layers = tuple(layer for layer in spec.layers if written is None or layer != written.layer)
    return replace(spec, layers=layers) if layers else None
