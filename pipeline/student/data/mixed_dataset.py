"""Rows of several caches in one order: what a mixture is to `data.CacheDataset` and `data.LocalShuffle`.

    pass 0, pass 1, … of A, each shuffled anew   ─┐
    pass 0, pass 1, … of B                       ─┴▶ interleaved by fixed counts ─▶ epoch 0 │ epoch 1 │ …

Every cache is one endless stream of passes over it, each a `LocalShuffle` of its own. An epoch takes the next so many
rows of every stream, always as many, and the next epoch goes on where this one ended, in the middle of a pass if need
be. So every row comes exactly once in each pass, and where epoch e begins in a stream is arithmetic: nothing is counted
along, and Trainer resumes by skipping indices as it does with one cache.

**Interleaving.** Drawing the cache of each row by chance would hold the shares only on average: of batches of 8 at
shares of a half, 7 % would have 7 or 8 rows of one cache. Here each row goes to the cache that is most behind: among
the first t rows of an epoch the number of each cache's differs from its share of t by at most 1 − 1/(2C−2) of a row,
the best bound that holds for all shares of C caches, and so in any stretch of rows by less than 2 (the chairman
assignment problem; Tijdeman, Discrete Mathematics 32, 1980, 323-330). Costs some microseconds a row.

Each cache is read by a reader of its own with its own window of decoded record batches: memory is that of C caches.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence

from torch.utils.data import Dataset, Sampler

from cache_format import CacheRow
from pipeline.student.data.dataset import Batch, CacheDataset, LocalShuffle


class MixedDataset(Dataset[CacheRow]):
    """The rows of several caches one after the other, numbered from 0 to n; beyond n as in `CacheDataset`.

    Args:
        parts: one for each cache.
        counts: rows of each in an epoch.
    """

    def __init__(self, parts: Sequence[CacheDataset], counts: Sequence[int]) -> None:
        self.parts, self.counts = parts, counts
        self._starts = [0, *itertools.accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def name(self) -> str:
        return " ".join(part.name for part in self.parts)

    def __getitem__(self, index: int) -> CacheRow:
        if index < 0:
            index = range(len(self))[index]
        kind, row = divmod(index, len(self))  # whether a filler, and which sample
        number = self.part_of(row)
        part = self.parts[number]
        return part[kind * len(part) + row - self._starts[number]]

    def __getitems__(self, indices: Sequence[int]) -> list[CacheRow]:
        rows = [index % len(self) for index in indices]
        for part, start in zip(self.parts, self._starts, strict=False):
            part.cache.fetch([row - start for row in rows if start <= row < start + len(part)])
        return [self[index] for index in indices]  # in the sampler's order, as in CacheDataset

    def part_of(self, index: int) -> int:
        """Which of the parts an index names a row of."""
        return bisect.bisect_right(self._starts, index % len(self)) - 1

    def collate(self, rows: Sequence[CacheRow]) -> Batch:
        return self.parts[0].collate(rows)

    def sampler(self, *, seed: int, resample: bool = False, multiple_of: int = 1) -> MixedShuffle:
        """As `CacheDataset.sampler`; with `resample` every pass over a cache uses another of its samples."""
        return MixedShuffle(
            [part.cache.record_batches() for part in self.parts],
            self.counts,
            seed=seed,
            samples=[part.cache.metadata.num_samples if resample else 1 for part in self.parts],
            multiple_of=multiple_of,
        )


Rows = CacheDataset | MixedDataset


class MixedShuffle(Sampler[int]):
    """`counts` rows of each cache per epoch, interleaved; indices are those of `MixedDataset`.

    Args:
        record_batches: of each cache.
        samples, multiple_of: as for `LocalShuffle`, the first for each cache.
    """

    def __init__(
        self,
        record_batches: Sequence[Sequence[tuple[int, int]]],
        counts: Sequence[int],
        *,
        seed: int,
        samples: Sequence[int],
        multiple_of: int = 1,
    ) -> None:
        self.record_batches, self.counts, self.seed, self.samples, self.epoch = record_batches, counts, seed, samples, 0
        self.rows = [sum(stop - start for start, stop in batches) for batches in record_batches]  # of each cache
        self.starts = [0, *itertools.accumulate(self.rows)]
        self.fillers = -sum(counts) % multiple_of

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.counts) + self.fillers

    def __iter__(self) -> Iterator[int]:
        streams = [self._stream(i, self.epoch * count) for i, count in enumerate(self.counts)]
        index = 0
        for number in interleave(self.counts):
            index = next(streams[number])
            yield index
        yield from [self.starts[-1] + index] * self.fillers

    def _stream(self, number: int, first: int) -> Iterator[int]:
        """The rows of one cache, pass after pass, from the one number `first` on."""
        done, skipped = divmod(first, self.rows[number])
        order = LocalShuffle(self.record_batches[number], seed=(self.seed, number))
        for epoch in itertools.count(done):
            order.set_epoch(epoch)
            samples = self.samples[number]
            sample = 2 * self.starts[-1] * (1 + epoch % samples) if samples > 1 else 0  # see CacheDataset
            for row in itertools.islice(order, skipped, None):
                yield sample + self.starts[number] + row
            skipped = 0


def interleave(counts: Sequence[int]) -> Iterator[int]:
    """Numbers of the parts, each as often as `counts` says, spread as evenly as can be.

    The k-th row of part i (from 0), whose share is s, may come from place (k + 1/D)/s on and must have come at place
    (k + 1 − 1/D)/s, counted from 1, with D = 2C − 2. Of those that may come, the one that must come first does.
    """
    total, slack = sum(counts), max(1, 2 * len(counts) - 2)
    done = [0] * len(counts)
    if len(counts) == 1:
        yield from itertools.repeat(0, total)
        return
    numbers = [number for number, count in enumerate(counts) if count]
    for place in range(1, total + 1):
        _, number = min(
            ((slack * (done[i] + 1) - 1) / counts[i], i)
            for i in numbers
            if slack * (place * counts[i] - done[i] * total) >= total
        )
        done[number] += 1
        yield number
