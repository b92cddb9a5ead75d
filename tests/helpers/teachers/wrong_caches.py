"""Caches that are wrong on purpose: valid files and plausible numbers, but not what their manifest says.

    source = Source(teacher_dir, right_cache)
    source.write(tmp / "again", source.computed())         # right, too
    WRONG["one position late"](source, tmp / "wrong")      # and ten ways of being wrong

Rows and manifest are those of a right cache; the targets come from the engine of stage one with one thing changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import cache_format as cf
from pipeline.models import padding
from pipeline.models.head import Head, open_head
from pipeline.models.head_export import export_head
from pipeline.models.loading import load_model
from pipeline.models.objective import objective_for
from pipeline.teacher.engines.interface import RowRequest
from pipeline.teacher.engines.transformers_engine import TransformersEngine
from pipeline.teacher.targets.rules import TargetRule


@dataclass(frozen=True, kw_only=True)
class ChangedHead(Head):
    """A teacher with other states [B, T, D], or other logits [n, V] of the same states."""

    states_to: Callable[[Tensor], Tensor] = lambda states: states
    logits_to: Callable[[Tensor], Tensor] = lambda logits: logits

    def hidden_states(self, *inputs: Any, **options: Any) -> Tensor:
        return self.states_to(super().hidden_states(*inputs, **options))

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        return self.logits_to(super().logits(hidden))


class Source:
    """A right cache and its teacher.

    Args:
        right: a cache of `teacher`.
    """

    def __init__(self, teacher: Path, right: Path) -> None:
        self.cache = cf.open_cache(right)
        self.rows = list(self.cache.iter_rows())
        self.rule = TargetRule.from_json(self.cache.metadata.targets)
        self.teacher = teacher
        self.full = self.cache.metadata.head is not None

    @cached_property
    def loaded(self) -> PreTrainedModel:
        """The teacher in float32."""
        return load_model(
            str(self.teacher), objective=objective_for(self.cache.metadata.alignment), dtype="float32"
        ).requires_grad_(False)

    def model(self, dtype: str | None = None) -> PreTrainedModel:
        """The teacher, in the recorded dtype: a copy that may be changed."""
        return copy.deepcopy(self.loaded).to(getattr(torch, dtype or self.cache.metadata.teacher["dtype"]))

    def in_dtype(self, dtype: str, path: Path, **options: Any) -> Source:
        """A right cache again, as the teacher computes it in another dtype; `options` of `computed`."""
        head = self.head(self.model(dtype))
        teacher = {**self.cache.metadata.teacher, "dtype": dtype}
        self.write(path, self.computed(head, **options), stored_head=head, teacher=teacher)
        found = Source(self.teacher, path)
        found.loaded = self.loaded
        return found

    def head(self, model: PreTrainedModel | None = None, **changes: Any) -> Head:
        metadata = self.cache.metadata
        head = open_head(model or self.model(), metadata.vocab_size, masked=metadata.alignment == "same")
        return ChangedHead(**vars(head), **changes) if changes else head

    def computed(
        self,
        head: Head | None = None,
        *,
        rule: TargetRule | None = None,
        rows: Sequence[cf.CacheRow] | None = None,
        batch_size: int = 4,
    ) -> list[cf.CacheRow]:
        """The targets of `rows`, with everything else of the cache's own rows."""
        head = head or self.head()
        hidden = self.cache.metadata.hidden
        engine = TransformersEngine(
            head,
            device=torch.device("cpu"),
            batch_size=batch_size,
            export=export_head(head) if self.full else None,
            hidden=hidden,
        )
        requests = [
            RowRequest(
                index=row.row,
                row=row,
                place=row.row,
                stored=np.array(row.loss_mask),
                with_states=None if row.hidden is None else np.array(row.hidden.mask),
            )
            for row in rows or self.rows
        ]
        found = {
            row.row: row for batch in engine.batches(requests) for row in engine.run(batch, [rule or self.rule]).rows()
        }
        return [replace(row, targets=found[row.row].targets, hidden=found[row.row].hidden) for row in self.rows]

    def write(
        self, path: Path, rows: Sequence[cf.CacheRow], *, stored_head: Head | None = None, **changes: Any
    ) -> Path:
        """A cache of these rows under the manifest of the right one, but for `changes`."""
        contents = None
        if self.full:
            spec, contents = export_head(stored_head or self.head()).file(self.cache.metadata.head.layer)
            changes["targets"] = {**self.cache.metadata.targets, "head": spec.to_json()}
        metadata = replace(self.cache.metadata, **changes)
        with cf.CacheWriter(path, metadata, tokenizer_files=self.cache.tokenizer_files(), head=contents) as writer:
            writer.write(list(rows))
        return path


def one_position_late(source: Source, path: Path) -> Path:
    return source.write(path, source.computed(source.head(states_to=lambda states: states.roll(1, 1))))


def another_temperature(source: Source, path: Path, temperature: float = 1.2) -> Path:
    """Of hidden targets as well: smaller states give smaller logits."""
    if source.full:
        return source.write(path, source.computed(source.head(states_to=lambda states: states / temperature)))
    return source.write(path, source.computed(rule=replace(source.rule, temperature=temperature)))


def another_teacher(source: Source, path: Path) -> Path:
    """The same architecture, the columns of every matrix in another order."""
    model = source.model()
    generator = torch.Generator().manual_seed(7)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.copy_(weight[:, torch.randperm(weight.shape[1], generator=generator)])
    return source.write(path, source.computed(source.head(model)))


def one_layer_less(source: Source, path: Path) -> Path:
    """The last layer's input is taken for its output."""
    model = source.model()
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    hook = layers[-1].register_forward_hook(lambda _, inputs, output: inputs[0])
    try:
        return source.write(path, source.computed(source.head(model)))
    finally:
        hook.remove()


def another_chat_template(source: Source, path: Path) -> Path:
    """As if each message began and ended with other tokens when the teacher read it."""
    ids = dict(zip((3, 4), (1, 2), strict=True))  # <|im_start|>, <|im_end|> → <|bos|>, <|eos|>

    def rendered(row: cf.CacheRow) -> cf.CacheRow:
        return replace(row, input_ids=np.array([ids.get(token, token) for token in row.input_ids.tolist()]))

    return source.write(path, source.computed(rows=[rendered(row) for row in source.rows]))


def padding_in_sight(source: Source, path: Path) -> Path:
    """A masked model attends to padding; a causal one to the documents before in its row."""
    if source.cache.metadata.alignment == "same":
        with patch.object(padding, "padding_mask", lambda rows: torch.ones_like(padding.pad_rows(rows)[0])):
            return source.write(path, source.computed(batch_size=8))
    rows = [replace(row, segment_lengths=np.array([len(row.input_ids)])) for row in source.rows]
    return source.write(path, source.computed(rows=rows))


def a_coarser_dtype(source: Source, path: Path) -> Path:
    """The manifest says float32."""
    return source.write(path, source.computed(source.head(source.model(dtype="bfloat16"))))


def a_coarser_head(source: Source, path: Path) -> Path:
    """The teacher computes in float32, its logits are rounded to bfloat16; of hidden targets, the stored matrix."""
    if not source.full:
        return source.write(path, source.computed(source.head(logits_to=lambda z: z.bfloat16().to(z.dtype))))
    return source.write(path, source.computed(), stored_head=source.head(with_output(source.model(), coarse)))


def another_rows_targets(source: Source, path: Path) -> Path:
    """Each row has the targets of another text of its length, if there is one."""
    last: dict[int, cf.CacheRow] = {len(row.input_ids): row for row in source.rows}
    rows = []
    for row in source.rows:
        rows.append(replace(row, input_ids=last[len(row.input_ids)].input_ids))
        last[len(row.input_ids)] = row
    return source.write(path, source.computed(rows=rows))


def permuted_ids(source: Source, path: Path) -> Path:
    """Token i's probability is that of token i - 1."""
    if not source.full:
        return source.write(path, source.computed(source.head(logits_to=lambda z: z.roll(1, 1))))
    return source.write(path, source.computed(), stored_head=source.head(with_output(source.model(), rolled)))


def with_output(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """With another output matrix; the embeddings stay."""
    output = model.get_output_embeddings()
    output.weight = nn.Parameter(change(output.weight), requires_grad=False)
    return model


def coarse(weight: Tensor) -> Tensor:
    return weight.bfloat16().to(weight.dtype)


def rolled(weight: Tensor) -> Tensor:
    return weight.roll(1, 0)


WRONG: dict[str, Callable[[Source, Path], Path]] = {
    function.__name__.replace("_", " "): function
    for function in (
        one_position_late,
        another_temperature,
        another_teacher,
        one_layer_less,
        another_chat_template,
        padding_in_sight,
        a_coarser_dtype,
        a_coarser_head,
        another_rows_targets,
        permuted_ids,
    )
}
