"""Cache rows as training batches: a map-style dataset, a sampler that shuffles locally, and a collator.

Map-style, so that Trainer resumes in the middle of an epoch by skipping indices, without reading what it skips, and so
that a row and its targets can never be paired wrongly: they are one object, found by its index.

**Shuffling.** Reading one row means decoding its record batch (32 rows). A full shuffle would decode every batch 32
times. Here record batches are put in random order, and rows are shuffled within windows of `WINDOW` consecutive ones:
every row of the cache has the same chance to be anywhere, each batch is decoded once, and a training batch mixes rows
from up to `WINDOW` places of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from cache_format import Cache, CacheRow
from pipeline.losses import IGNORE_INDEX, TargetBatch
from pipeline.padding import pad_rows

WINDOW = 16
"""Record batches that are mixed with one another, and that the reader must keep decoded."""

Batch = dict[str, torch.Tensor]


class CacheDataset(Dataset[CacheRow]):
    """The rows of a cache; `__getitems__` serves a whole batch with one decoding per record batch."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> CacheRow:
        return self.cache[index]

    def __getitems__(self, indices: Sequence[int]) -> list[CacheRow]:
        return self.cache.rows(list(indices))


class LocalShuffle(Sampler[int]):
    """A permutation of all rows per (seed, epoch), local to windows of record batches."""

    def __init__(self, record_batches: Sequence[tuple[int, int]], *, seed: int, window: int = WINDOW) -> None:
        self.record_batches = record_batches
        self.seed, self.window, self.epoch = seed, window, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.record_batches)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.record_batches))
        for i in range(0, len(order), self.window):
            rows = np.concatenate([np.arange(*self.record_batches[j]) for j in order[i : i + self.window]])
            yield from generator.permutation(rows).tolist()


def collate(rows: Sequence[CacheRow]) -> Batch:
    """Rows padded to the longest one. All tensors share the index t of the prediction made *from* t.

    input_ids, position_ids, labels [B, T] int64; target_ids [B, T, K] int64; target_logprobs [B, T, K],
    target_residual [B, T] float32; num_tokens [] int64 without padding.

    `labels` are already aligned, so they are also given under the name `shift_labels`, by which transformers knows that
    nothing must be shifted when it counts the tokens of an optimizer step.
    """
    input_ids, position_ids = pad_rows(rows)
    length = input_ids.shape[1]
    targets = TargetBatch.from_rows(rows, length)
    labels = targets.labels.view(len(rows), length)
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "labels": labels,
        "shift_labels": labels,
        "target_ids": targets.ids.view(len(rows), length, -1),
        "target_logprobs": targets.logprobs.view(len(rows), length, -1),
        "target_residual": targets.residual_logprob.view(len(rows), length),
        "num_tokens": torch.tensor(sum(len(row.input_ids) for row in rows)),
    }


def targets_of(batch: Batch) -> TargetBatch:
    """The flattened targets [N = B·T] of a collated batch."""
    return TargetBatch(
        ids=batch["target_ids"].flatten(0, 1),
        logprobs=batch["target_logprobs"].flatten(0, 1),
        residual_logprob=batch["target_residual"].flatten(),
        labels=batch["labels"].flatten(),
    )


def uncounted(batch: Batch) -> Batch:
    """The same batch with no position that counts: fills up a rank that has run out of rows."""
    ignored = torch.full_like(batch["labels"], IGNORE_INDEX)
    return {**batch, "labels": ignored, "shift_labels": ignored}
