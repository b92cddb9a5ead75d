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
from dataclasses import replace

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
    """The n rows of a cache. Index n + i is row i with no position that counts, to fill up a batch (`LocalShuffle`)."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> CacheRow:
        if index < len(self.cache):
            return self.cache[index]
        row = self.cache[index - len(self.cache)]
        return replace(row, loss_mask=np.zeros_like(row.loss_mask))

    def __getitems__(self, indices: Sequence[int]) -> list[CacheRow]:
        # In the sampler's order, not sorted: a batch that reaches into the next window must be through with this one
        # before the reader drops its record batches for those of the next.
        return [self[index] for index in indices]


class LocalShuffle(Sampler[int]):
    """A permutation of all rows per (seed, epoch), local to windows of record batches.

    Args:
        multiple_of: filled up to a multiple of this with an uncounted row. Several processes must get equally many
            batches, and accelerate would fill up by training on the first rows once more.
    """

    def __init__(
        self, record_batches: Sequence[tuple[int, int]], *, seed: int, window: int = WINDOW, multiple_of: int = 1
    ) -> None:
        self.record_batches = record_batches
        self.rows = sum(stop - start for start, stop in record_batches)
        self.seed, self.window, self.epoch = seed, window, 0
        self.fillers = -self.rows % multiple_of

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows + self.fillers

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.record_batches))
        for i in range(0, len(order), self.window):
            rows = np.concatenate([np.arange(*self.record_batches[j]) for j in order[i : i + self.window]])
            rows = generator.permutation(rows).tolist()
            yield from rows
        yield from [self.rows + rows[-1]] * self.fillers


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
