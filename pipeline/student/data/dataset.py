"""Cache rows as training batches: a map-style dataset, a sampler that shuffles locally, and a collator.

Map-style, so that Trainer resumes in the middle of an epoch by skipping indices, without reading the rows it skips, and
so that a row and its targets can never be paired wrongly: they are one object with one index.

**Shuffling.** Reading one row means decoding its record batch (32 rows of 1,024 tokens, more if they are shorter). A
full shuffle would decode every record batch once per row. Here record batches are put in random order, and rows are
shuffled within windows of `WINDOW` consecutive ones: a row may land anywhere in the epoch, each record batch is decoded
once, and a training batch mixes rows from up to `WINDOW` places of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from cache_format import Cache, CacheRow
from pipeline.losses import IGNORE_INDEX, FullTargets, RaggedTargets, SparseTargetBatch
from pipeline.models.isolation.document_attention import Documents
from pipeline.models.padding import pad_rows, padding_mask
from pipeline.student.data.row_index import RowIndex

WINDOW = 16
"""Record batches that are mixed with one another, and that the reader must keep decoded."""

Batch = dict[str, Any]
"""What `collate` returns: tensors, and under "targets" an object with the methods of `losses.Targets`."""


class CacheDataset(Dataset[CacheRow]):
    """The rows of a cache; an integer index is that of a row, or an encoded `RowIndex`."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    @property
    def caches(self) -> list[Cache]:
        """Those whose rows the indices count, one cache after another."""
        return [self.cache]

    @property
    def name(self) -> str:
        """Path of the cache."""
        return self.cache.path

    @property
    def loss_tokens(self) -> float:
        """Number of loss tokens."""
        return self.cache.num_loss_tokens

    def __getitem__(self, index: int) -> CacheRow:
        wanted = RowIndex.decode(index, len(self.cache))
        row = self.cache[wanted.row]
        if wanted.is_filler:
            row = replace(row, loss_mask=np.zeros_like(row.loss_mask))
        if wanted.sample is not None:
            row = replace(row, targets=row.targets.sample(wanted.sample))
        return row

    def __getitems__(self, indices: Sequence[int]) -> list[CacheRow]:
        self.cache.fetch([RowIndex.decode(index, len(self.cache)).row for index in indices])
        # In the sampler's order, not sorted: a batch that reaches into the next window must be through with this one
        # before the reader drops its record batches for those of the next.
        return [self[index] for index in indices]

    def collate(self, rows: Sequence[CacheRow]) -> Batch:
        """`collate` with the cache's temperature, and with full targets if the cache has hidden targets, else
        `RaggedTargets`."""
        about = self.cache.metadata
        return collate(
            rows,
            temperature=float(about.targets["temperature"]),
            target_layer=None if about.head is None else about.head.layer,
            ragged=True,
        )

    def sampler(self, *, seed: int, resample: bool = False, multiple_of: int = 1) -> LocalShuffle:
        """The training order. `resample`: use a different stored sample of the tail in each epoch."""
        samples = self.cache.metadata.num_samples if resample else 1
        return LocalShuffle(self.cache.record_batches(), seed=seed, samples=samples, multiple_of=multiple_of)


class LocalShuffle(Sampler[int]):
    """A permutation of all rows per (seed, epoch), local to windows of record batches.

    Args:
        record_batches: (start, stop) rows of each.
        seed: one number or several; different ones give independent orders.
        samples: if more than one, each epoch uses a single sample of the tail, the next one each time.
        multiple_of: the length is filled up to a multiple of this with a row without loss tokens. All processes need
            the same number of batches, and accelerate would fill up by training on the first rows again.
    """

    def __init__(
        self,
        record_batches: Sequence[tuple[int, int]],
        *,
        seed: int | tuple[int, ...],
        window: int = WINDOW,
        samples: int = 1,
        multiple_of: int = 1,
    ) -> None:
        self.record_batches = record_batches
        self.rows = sum(stop - start for start, stop in record_batches)
        self.seed = seed if isinstance(seed, tuple) else (seed,)
        self.window, self.samples, self.epoch = window, samples, 0
        self.fillers = -self.rows % multiple_of

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows + self.fillers

    def __iter__(self) -> Iterator[int]:
        sample = self.epoch % self.samples if self.samples > 1 else None
        row, first = 0, RowIndex(0, sample).encode(self.rows)
        for row in self.iter_rows():
            yield first + row
        filler = RowIndex(row, sample, is_filler=True).encode(self.rows)
        yield from [filler] * self.fillers

    def iter_rows(self) -> Iterator[int]:
        """The rows alone, without sample and fillers."""
        generator = np.random.default_rng((*self.seed, self.epoch))
        order = generator.permutation(len(self.record_batches))
        for i in range(0, len(order), self.window):
            rows = np.concatenate([np.arange(*self.record_batches[j]) for j in order[i : i + self.window]])
            yield from generator.permutation(rows).tolist()


def collate(
    rows: Sequence[CacheRow], *, temperature: float = 1.0, target_layer: int | None = None, ragged: bool = False
) -> Batch:
    """Rows padded to the longest one. Everything shares the index t of the prediction made *from* t.

    input_ids, position_ids, labels [B, T] int64; targets, an object with the B·T positions; attention_mask [B, T]
    int64, 0 at padding; num_tokens [] int64 without padding; documents, where
    they are in the batch. With hidden states hidden_index [n] int64, their places
    among the B·T positions, hidden_6 [n, D] of layer 6, hidden_6_scale [n] float32 if they are int8; and which of the n
    are of loss tokens (hidden_loss_tokens, int64) or of rows that have any (hidden_loss_rows), because a device would
    have to wait to find out.

    `labels` are aligned with the predictions, so they are also given as `shift_labels`, which tells transformers not to
    shift them when it counts the tokens of an optimizer step.

    Args:
        temperature: at which the targets were captured.
        target_layer: number of the stored states that the teacher's head multiplies, for `FullTargets`. Default:
            sparse targets.
        ragged: `RaggedTargets` instead of `SparseTargetBatch`; `prepare` of either gives the same.
    """
    input_ids, position_ids = pad_rows(rows)
    length = input_ids.shape[1]
    kind = RaggedTargets if ragged or target_layer is not None else SparseTargetBatch
    sparse = kind.from_rows(rows, length, temperature)
    labels = sparse.labels.view(len(rows), length)
    states = _hidden_states(rows, labels)
    targets = sparse if target_layer is None else _full_targets(sparse, states, target_layer)
    return states | {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": padding_mask(rows),
        "labels": labels,
        "shift_labels": labels,
        "targets": targets,
        "documents": Documents.of_rows(rows),
        "num_tokens": torch.tensor(sum(len(row.input_ids) for row in rows)),
    }


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch on a device."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def without_loss_tokens(batch: Batch) -> Batch:
    """The same batch with an empty loss mask: fills up a process that has run out of rows."""
    ignored = torch.full_like(batch["labels"], IGNORE_INDEX)
    targets = batch["targets"].with_labels(ignored.flatten())
    none: Batch = {name: batch[name][:0] for name in ("hidden_loss_tokens", "hidden_loss_rows") if name in batch}
    return {**batch, "labels": ignored, "shift_labels": ignored, "targets": targets, **none}


def with_target_states(batch: Batch) -> Batch:
    """The batch with the states of full targets under hidden_… too, for hidden-state matching; the same tensors."""
    targets = batch["targets"]
    if not isinstance(targets, FullTargets):
        return batch
    return batch | _named(targets.layer, targets.states, targets.scales)


def _hidden_states(rows: Sequence[CacheRow], labels: Tensor) -> Batch:
    """The states of all rows, concatenated, for labels [B, T]."""
    found = [row.hidden for row in rows if row.hidden is not None]
    if len(found) < len(rows):
        return {}
    places = [i * labels.shape[1] + np.flatnonzero(hidden.mask) for i, hidden in enumerate(found)]
    index = torch.from_numpy(np.concatenate(places))
    batch: Batch = {"hidden_index": index} | states_in_loss(labels, index)
    for layer in found[0].states:
        states = torch.from_numpy(np.concatenate([hidden.states[layer] for hidden in found]))
        scales = None
        if layer in found[0].scales:
            scales = torch.from_numpy(np.concatenate([hidden.scales[layer] for hidden in found]))
        batch |= _named(layer, states, scales)
    return batch


def states_in_loss(labels: Tensor, index: Tensor) -> Batch:
    """Which of the states at places `index` are of loss tokens, or of rows [B, T] that have any."""
    counted = labels != IGNORE_INDEX
    in_rows = counted.any(dim=1, keepdim=True).expand_as(counted)
    return {
        "hidden_loss_tokens": counted.flatten()[index].nonzero().squeeze(1),
        "hidden_loss_rows": in_rows.flatten()[index].nonzero().squeeze(1),
    }


def _named(layer: int, states: Tensor, scales: Tensor | None) -> Batch:
    named = {f"hidden_{layer}": states}
    return named if scales is None else named | {f"hidden_{layer}_scale": scales}


def _full_targets(sparse: RaggedTargets | SparseTargetBatch, states: Batch, layer: int) -> FullTargets:
    """Takes the layer's states out of `states`: a batch moves them to the device once."""
    index = states["hidden_index"]
    place = torch.full_like(sparse.labels, -1)
    place[index] = torch.arange(len(index))
    return FullTargets(
        states=states.pop(f"hidden_{layer}"),
        scales=states.pop(f"hidden_{layer}_scale", None),
        place=place,
        labels=sparse.labels,
        entropy=sparse.entropy,
        layer=layer,
        loss_tokens=sparse.loss_tokens,
    )
