"""Cache rows as training batches: a map-style dataset, a sampler that shuffles locally, and a collator.

Map-style, so that Trainer resumes in the middle of an epoch by skipping indices, without reading what it skips, and so
that a row and its targets can never be paired wrongly: they are one object, found by its index.

**Shuffling.** Reading one row means decoding its record batch (32 rows of 1,024 tokens, more where they are shorter). A
full shuffle would decode every batch as often as it has rows. Here record batches are put in random order, and rows are
shuffled within windows of `WINDOW` consecutive ones: every row of the cache has the same chance to be anywhere, each
batch is decoded once, and a training batch mixes rows from up to `WINDOW` places of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from cache_format import Cache, CacheRow
from pipeline.losses import IGNORE_INDEX, FullTargets, TargetBatch
from pipeline.models.padding import pad_rows, padding_mask
from pipeline.models.teacher_head import TeacherHead

WINDOW = 16
"""Record batches that are mixed with one another, and that the reader must keep decoded."""

Batch = dict[str, torch.Tensor]


class CacheDataset(Dataset[CacheRow]):
    """The n rows of a cache, with all samples of the tail together.

    What a sampler wants beyond a row's number is in the index, and so in whatever resumes or distributes indices:
    n + i is row i with no position that counts, to fill up a batch; 2n·(s + 1) + i is i with sample s alone.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    @property
    def name(self) -> str:
        """Of what the rows are."""
        return self.cache.path

    @property
    def counted_tokens(self) -> float:
        """Positions that a loss is computed at."""
        return self.cache.num_counted_tokens

    def __getitem__(self, index: int) -> CacheRow:
        if index < 0:
            index = range(len(self))[index]
        sample, index = divmod(index, 2 * len(self.cache))
        filler, index = divmod(index, len(self.cache))
        row = self.cache[index]
        if filler:
            row = replace(row, loss_mask=np.zeros_like(row.loss_mask))
        if sample:
            row = replace(row, targets=row.targets.sample(sample - 1))
        return row

    def __getitems__(self, indices: Sequence[int]) -> list[CacheRow]:
        self.cache.fetch([index % len(self.cache) for index in indices])
        # In the sampler's order, not sorted: a batch that reaches into the next window must be through with this one
        # before the reader drops its record batches for those of the next.
        return [self[index] for index in indices]

    def collate(self, rows: Sequence[CacheRow]) -> Batch:
        """A batch of what `__getitems__` gives."""
        return collate(rows)

    def sampler(self, *, seed: int, resample: bool = False, multiple_of: int = 1) -> LocalShuffle:
        """The order to train in. `resample`: with several samples of the tail, every epoch uses one alone."""
        samples = self.cache.metadata.num_samples if resample else 1
        return LocalShuffle(self.cache.record_batches(), seed=seed, samples=samples, multiple_of=multiple_of)


class LocalShuffle(Sampler[int]):
    """A permutation of all rows per (seed, epoch), local to windows of record batches.

    Args:
        seed: or several numbers, for orders that have nothing to do with one another.
        samples: with more than one, every epoch uses one sample of the tail alone, the next one each time.
        multiple_of: filled up to a multiple of this with an uncounted row. Several processes must get equally many
            batches, and accelerate would fill up by training on the first rows once more.
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
        generator = np.random.default_rng((*self.seed, self.epoch))
        order = generator.permutation(len(self.record_batches))
        first = 2 * self.rows * (1 + self.epoch % self.samples) if self.samples > 1 else 0  # see CacheDataset
        for i in range(0, len(order), self.window):
            rows = np.concatenate([np.arange(*self.record_batches[j]) for j in order[i : i + self.window]])
            rows = (first + generator.permutation(rows)).tolist()
            yield from rows
        yield from [self.rows + rows[-1]] * self.fillers


def collate(rows: Sequence[CacheRow]) -> Batch:
    """Rows padded to the longest one. All tensors share the index t of the prediction made *from* t.

    input_ids, position_ids, labels [B, T] int64; target_ids [B, T, K] int64; target_logprobs [B, T, K] float32;
    target_exact_counts [B, T] int64; target_residual_logprob, target_entropy [B, T] float32; num_tokens [] int64
    without padding. Of masked models attention_mask [B, T] int64, 1 but for padding. With hidden states hidden_index
    [n] int64, their places among the B·T positions, hidden_6 [n, D] of layer 6, hidden_6_scale [n] float32 if int8.

    `labels` are already aligned, so they are also given under the name `shift_labels`, by which transformers knows that
    nothing must be shifted when it counts the tokens of an optimizer step.
    """
    input_ids, position_ids = pad_rows(rows)
    length = input_ids.shape[1]
    targets = TargetBatch.from_rows(rows, length)
    labels = targets.labels.view(len(rows), length)
    both_sides = {} if rows[0].labels is None else {"attention_mask": padding_mask(rows)}
    return (
        both_sides
        | _hidden_states(rows, length)
        | {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "labels": labels,
            "shift_labels": labels,
            "target_ids": targets.ids.view(len(rows), length, -1),
            "target_logprobs": targets.logprobs.view(len(rows), length, -1),
            "target_exact_counts": targets.exact_counts.view(len(rows), length),
            "target_residual_logprob": targets.residual_logprob.view(len(rows), length),
            "target_entropy": targets.entropy.view(len(rows), length),
            "num_tokens": torch.tensor(sum(len(row.input_ids) for row in rows)),
        }
    )


def _hidden_states(rows: Sequence[CacheRow], length: int) -> Batch:
    """The states of all rows one after the other."""
    found = [row.hidden for row in rows if row.hidden is not None]
    if len(found) < len(rows):
        return {}
    places = [i * length + np.flatnonzero(hidden.mask) for i, hidden in enumerate(found)]
    batch = {"hidden_index": torch.from_numpy(np.concatenate(places))}
    for layer in found[0].states:
        batch[f"hidden_{layer}"] = torch.from_numpy(np.concatenate([hidden.states[layer] for hidden in found]))
    for layer in found[0].scales:
        batch[f"hidden_{layer}_scale"] = torch.from_numpy(np.concatenate([hidden.scales[layer] for hidden in found]))
    return batch


def targets_of(batch: Batch, temperature: float = 1.0) -> TargetBatch:
    """The flattened targets [N = B·T] of a collated batch, captured at `temperature`."""
    return TargetBatch(
        ids=batch["target_ids"].flatten(0, 1),
        logprobs=batch["target_logprobs"].flatten(0, 1),
        exact_counts=batch["target_exact_counts"].flatten(),
        residual_logprob=batch["target_residual_logprob"].flatten(),
        entropy=batch["target_entropy"].flatten(),
        labels=batch["labels"].flatten(),
        temperature=temperature,
    )


def full_targets_of(batch: Batch, teacher: TeacherHead) -> FullTargets:
    """The flattened targets [N = B·T] of a collated batch with the states that the teacher's head multiplies."""
    labels, index = batch["labels"].flatten(), batch["hidden_index"]
    place = torch.full_like(labels, -1)
    place[index] = torch.arange(len(index), device=index.device)
    layer = teacher.spec.layer
    return FullTargets(
        states=batch[f"hidden_{layer}"],
        scales=batch.get(f"hidden_{layer}_scale"),
        place=place,
        labels=labels,
        entropy=batch["target_entropy"].flatten(),
        head=teacher,
    )


def uncounted(batch: Batch) -> Batch:
    """The same batch with no position that counts: fills up a rank that has run out of rows."""
    ignored = torch.full_like(batch["labels"], IGNORE_INDEX)
    return {**batch, "labels": ignored, "shift_labels": ignored}
