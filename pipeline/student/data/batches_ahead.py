"""Finished batches, made in threads before the data loader asks for them.

    record batches ─▶ a thread or two decode (`Cache.expect`) ─▶ another one pads and pins batches ─▶ two of them wait

The loader's batch sampler gives the same batches each time it is iterated. So the process that makes them iterates its
own copy, from the first batch that it is asked for. The loader still draws the indices one batch at a time: where an
epoch is, and so where a run continues, does not depend on what has been made ahead.

Threads, because decoding is numba or numpy, Arrow and zstd, which release the interpreter's lock; and what a thread
made need not be copied from another process. A second thread decodes if the first one is too slow and there is a core
for it. In a loader with workers, every worker does the same for its share of the batches.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch.utils.data import Dataset, get_worker_info

from cache_format.cores import available_cores
from pipeline.student.data.dataset import WINDOW, Batch
from pipeline.student.data.mixed_dataset import Rows
from pipeline.student.data.row_index import RowIndex

BATCHES_AHEAD = 2
WINDOWS_AHEAD = 2  # of record batches: the one in use and the next
DECODING_THREADS = 2  # at most, for each cache

PAUSE_S = 0.002
"""Before the next batch is made, if another one waits already. A reader that has just taken a batch is about to start
the next step, for which a GPU may be waiting; it should not have to share the interpreter's lock then."""


class BatchesAhead(Dataset[Batch]):
    """A dataset of rows as a dataset of batches, for a `DataLoader` with `collate_fn=BatchesAhead.collate`.

    Args:
        rows: what the indices count.
        order: batches of indices, as the loader's `batch_sampler` gives them.
        pinned: put batches into pinned memory if there is a GPU; not in a loader's worker, whose batches are copied.
    """

    def __init__(self, rows: Rows, order: Iterable[Sequence[int]] = (), *, pinned: bool = False) -> None:
        self.rows, self.order, self.pinned = rows, order, pinned
        self._coming: Iterator[list[int]] = iter(())
        self._made: deque[tuple[list[int], Future[Batch]]] = deque()
        self._thread: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The batch of these rows. If `order` has another one here, nothing is made ahead from now on."""
        wanted = list(indices)
        if not self._made and self.order:
            self._begin(wanted)
        if not self._made or self._made[0][0] != wanted:
            self.close()
            self.order = ()
            return self._make(wanted)
        _, batch = self._made.popleft()
        self._fill()
        return batch.result()

    @staticmethod
    def collate(batch: Batch) -> Batch:
        return batch

    def close(self) -> None:
        """Ends the threads, after what they are working on, and drops what they have made."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
            for cache in self.rows.caches:
                cache.expect_nothing()
        self._made.clear()

    def _begin(self, first: list[int]) -> None:
        """Begin with this batch, the first one of an epoch or of a continued run."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "batches-ahead", self._initializer())
        caches = self.rows.caches
        starts = [0, *itertools.accumulate(map(len, caches))]
        threads = decoding_threads()
        for cache, start in zip(caches, starts, strict=False):
            here = range(start, start + len(cache))
            rows = _rows(self._batches_from(first), here, total=starts[-1])
            cache.expect(rows, WINDOWS_AHEAD * WINDOW, threads=threads)
        self._coming = self._batches_from(first)
        self._fill()

    def _batches_from(self, first: list[int]) -> Iterator[list[int]]:
        """`first` and every later batch of this process; nothing if `order` does not have it."""
        worker = get_worker_info()
        every = 1 if worker is None else worker.num_workers
        later = itertools.dropwhile(lambda batch: batch != first, map(list, self.order))
        # Begun now: samplers read the number of the epoch when they begin.
        found = list(itertools.islice(later, 1))
        return itertools.chain(found, itertools.islice(later, every - 1, None, every))

    def _fill(self) -> None:
        assert self._thread is not None
        pause = PAUSE_S if self._made and self._made[0][1].done() else 0.0
        for batch in itertools.islice(self._coming, BATCHES_AHEAD - len(self._made)):
            self._made.append((batch, self._thread.submit(self._make, batch, pause)))

    def _make(self, indices: list[int], pause: float = 0.0) -> Batch:
        if pause:
            time.sleep(pause)
        batch = self.rows.collate(self.rows.__getitems__(indices))  # type: ignore[arg-type]
        return {name: value.pin_memory() for name, value in batch.items()} if self._pins() else batch

    def _pins(self) -> bool:
        return self.pinned and torch.cuda.is_available() and get_worker_info() is None

    def _initializer(self) -> Callable[[], None] | None:
        """Pinning would open the first GPU in a thread that has not chosen another."""
        return functools.partial(torch.cuda.set_device, torch.cuda.current_device()) if self._pins() else None


def decoding_threads() -> int:
    """Largest number of threads that decode a cache in this process."""
    return min(available_cores(), DECODING_THREADS)


def _rows(batches: Iterator[list[int]], here: range, total: int) -> Iterator[int]:
    """The rows in `here`, counted from its start."""
    for batch in batches:
        rows = (RowIndex.decode(index, total).row for index in batch)
        yield from (row - here.start for row in rows if row in here)
