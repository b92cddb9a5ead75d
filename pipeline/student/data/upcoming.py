"""Tells the caches that a data loader's worker reads which rows it will be asked for.

A worker is given one batch of indices at a time, but the loader's batch sampler gives the same batches each time it is
iterated. So the worker iterates its own copy, from the first batch that it is given.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from torch.utils.data import get_worker_info

from cache_format import Cache
from pipeline.student.data.row_index import RowIndex

WINDOWS_AHEAD = 2  # the one in use and the next


class Upcoming:
    """Announces the rest of an epoch to caches, once, in a worker; does nothing in the process that trains.

    Args:
        batches: batches of indices, as the loader's `batch_sampler` gives them.
    """

    def __init__(self, batches: Iterable[Sequence[int]]) -> None:
        self.batches, self.announced = batches, False

    def announce(self, first: Sequence[int], caches: Sequence[Cache], record_batches: int) -> None:
        """Tells each cache which of its rows this worker will read, from the batch `first` on.

        Args:
            first: the batch that the worker was given.
            caches: of the dataset, whose indices count their rows one after another.
            record_batches: number to decode ahead, counted with those in use, in each cache.
        """
        if self.announced or (worker := get_worker_info()) is None:
            return
        self.announced = True
        starts = [0, *itertools.accumulate(map(len, caches))]
        for cache, start in zip(caches, starts, strict=False):
            here = range(start, start + len(cache))
            cache.expect(self._rows(first, worker.num_workers, here, starts[-1]), record_batches)

    def _rows(self, first: Sequence[int], workers: int, here: range, total: int) -> Iterator[int]:
        """The rows in `here` of `first` and of every later batch of this worker, counted from the start of `here`."""
        batches = itertools.dropwhile(lambda batch: list(batch) != list(first), self.batches)
        for batch in itertools.islice(batches, 0, None, workers):
            rows = (RowIndex.decode(index, total).row for index in batch)
            yield from (row - here.start for row in rows if row in here)
