"""Rows of several caches in one order: `CacheDataset` and `LocalShuffle` for a mixture.

    pass 0, pass 1, … of A, each shuffled anew   ─┐
    pass 0, pass 1, … of B                       ─┴▶ interleaved by fixed counts ─▶ epoch 0 │ epoch 1 │ …

Every cache is an endless stream of passes, each with its own `LocalShuffle`. Each epoch takes the same number of rows
from a stream and starts where the previous one ended, possibly in the middle of a pass. So every row appears exactly
once per pass, the start of an epoch is arithmetic, and Trainer resumes by skipping indices as with one cache.

**Interleaving.** Random draws would keep the shares only on average. Here each row comes from the cache furthest behind
its share (`interleave`). Memory: C caches have C windows of decoded record batches.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence

from torch.utils.data import Dataset, Sampler

from cache_format import Cache, CacheRow
from pipeline.student.data.dataset import Batch, CacheDataset, LocalShuffle
from pipeline.student.data.row_index import RowIndex


class MixedDataset(Dataset[CacheRow]):
    """The rows of several caches, concatenated; indices as in `CacheDataset`.

    Args:
        parts: one per cache.
        counts: rows of each in an epoch.
    """

    def __init__(self, parts: Sequence[CacheDataset], counts: Sequence[int]) -> None:
        self.parts, self.counts = parts, counts
        self._starts = [0, *itertools.accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def caches(self) -> list[Cache]:
        return [part.cache for part in self.parts]

    @property
    def name(self) -> str:
        return " ".join(part.name for part in self.parts)

    def __getitem__(self, index: int) -> CacheRow:
        wanted = RowIndex.decode(index, len(self))
        number = self.part_of(index)
        part = self.parts[number]
        return part[wanted._replace(row=wanted.row - self._starts[number]).encode(len(part))]

    def __getitems__(self, indices: Sequence[int]) -> list[CacheRow]:
        rows = [RowIndex.decode(index, len(self)).row for index in indices]
        for part, start in zip(self.parts, self._starts, strict=False):
            part.cache.fetch([row - start for row in rows if start <= row < start + len(part)])
        return [self[index] for index in indices]  # in the sampler's order, as in CacheDataset

    def part_of(self, index: int) -> int:
        """Number of the part that holds the row of an index."""
        return bisect.bisect_right(self._starts, RowIndex.decode(index, len(self)).row) - 1

    def collate(self, rows: Sequence[CacheRow]) -> Batch:
        return self.parts[0].collate(rows)

    def sampler(self, *, seed: int, resample: bool = False, multiple_of: int = 1) -> MixedShuffle:
        """As `CacheDataset.sampler`; `resample`: each pass over a cache uses a different sample."""
        return MixedShuffle(
            [part.cache.record_batches() for part in self.parts],
            self.counts,
            seed=seed,
            samples=[part.cache.metadata.num_samples if resample else 1 for part in self.parts],
            multiple_of=multiple_of,
        )


Rows = CacheDataset | MixedDataset


class MixedShuffle(Sampler[int]):
    """`counts` rows of each cache per epoch, interleaved; yields indices of `MixedDataset`.

    Args:
        record_batches, samples: as for `LocalShuffle`, one per cache.
        multiple_of: as for `LocalShuffle`.
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
        rows = self.starts[-1]
        index = RowIndex(0)
        for number in interleave(self.counts):
            index = next(streams[number])
            yield index.encode(rows)
        yield from [index._replace(is_filler=True).encode(rows)] * self.fillers

    def _stream(self, number: int, first: int) -> Iterator[RowIndex]:
        """The rows of one cache, pass after pass, starting with row `first` of the stream."""
        done, skipped = divmod(first, self.rows[number])
        order = LocalShuffle(self.record_batches[number], seed=(self.seed, number))
        samples = self.samples[number]
        for epoch in itertools.count(done):
            order.set_epoch(epoch)
            sample = epoch % samples if samples > 1 else None
            for row in itertools.islice(order.iter_rows(), skipped, None):
                yield RowIndex(self.starts[number] + row, sample)
            skipped = 0


def interleave(counts: Sequence[int]) -> Iterator[int]:
    """Numbers of the parts, part i `counts[i]` times, spread as evenly as possible.

    Among the first t numbers, each part's count differs from its share of t by at most 1 − 1/(2C−2), the best bound
    that holds for all shares of C parts; in any stretch it differs by less than 2. Row k of part i (from 0), with share
    s, is allowed from place (k + 1/D)/s on and due at place (k + 1 − 1/D)/s, counted from 1, D = 2C − 2; of the allowed
    rows the one due first is next. Costs a few microseconds per row.

    Source: the chairman assignment problem, Tijdeman, Discrete Mathematics 32, 1980, 323-330.
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
