"""Record batches decoded before their rows are asked for, in threads.

A shuffled pass reads the rows of a few record batches, then those of the next few, so decoding comes in bursts: the
first rows of a window need all its record batches at once. A reader that knows the order of its rows spreads that work
over the time in which the window before is used.

One thread decodes. If readers wait for it for a tenth of their time, another one helps from then on; the wait for the
first record batch does not count. Threads that are not needed would only compete with the reader for the interpreter.

Record batches are begun in the order in which they will be wanted. Memory: at most `limit` of them, of which none is
kept longer than its known rows are wanted.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import TypeAlias

from cache_format.rows.row_batch import RowBatch
from cache_format.rows.types import CacheRow

Key = tuple[int, int]  # shard, record batch in it
Todo: TypeAlias = "queue.SimpleQueue[tuple[Key, Future[RowBatch]] | None]"  # None ends the threads

TOO_SLOW = 0.1  # share of the time that readers wait
LEAST_WAIT_S = 0.05  # before that is judged


class ReadAhead:
    """The rows of a cache in an order that is known beforehand. The first other row ends it.

    Args:
        rows: those that will be read, in order.
        place: row -> (shard, record batch, row in the record batch).
        decode: reads a record batch; called from the threads.
        limit: number of record batches, at least 1.
        threads: largest number of threads that decode, at least 1.
    """

    def __init__(
        self,
        rows: Iterator[int],
        place: Callable[[int], tuple[int, int, int]],
        decode: Callable[[int, int], RowBatch],
        limit: int,
        threads: int = 1,
    ) -> None:
        self._coming, self._place, self._limit = rows, place, limit
        self._seen: deque[int] = deque()  # rows whose record batches are decoded or queued
        self._beyond: int | None = None  # the next one, whose record batch has no room yet
        self._batches: dict[Key, Future[RowBatch]] = {}
        self._wanted: Counter[Key] = Counter()  # rows of `_seen` in each
        self._lock = threading.Lock()  # for several threads that read the same cache
        self._todo: Todo = queue.SimpleQueue()
        self._decode, self._most_threads, self._threads = decode, threads, list[threading.Thread]()
        self._since: float | None = None  # when all rows of a record batch had first been read
        self._waited_s = 0.0  # since then
        self._start_thread()
        # Ended before the interpreter is: a thread that is in C++ code at that moment aborts the process.
        self._end = weakref.finalize(self, _stop, self._todo, self._threads)

    def row(self, row: int) -> CacheRow | None:
        """The row; None if another one was expected. Raises: as `decode`."""
        with self._lock:
            self._look_ahead()
            if not self._seen or self._seen.popleft() != row:
                self._seen.clear()
                self._coming, self._beyond = iter(()), None
                return None
            *key, index = self._place(row)
            shard, batch = key
            decoded = self._batches[shard, batch]
            if self._since is not None and not decoded.done():
                self._wait(decoded, self._since)
            found = decoded.result().row(index)
            self._wanted[shard, batch] -= 1
            if not self._wanted[shard, batch]:
                del self._wanted[shard, batch], self._batches[shard, batch]
                self._since = time.monotonic() if self._since is None else self._since
            return found

    def close(self) -> None:
        """Ends the threads, after the record batches that they are decoding."""
        self._end()

    def _wait(self, decoded: Future[RowBatch], since: float) -> None:
        began = time.monotonic()
        wait([decoded])
        now = time.monotonic()
        self._waited_s += now - began
        too_slow = self._waited_s > max(LEAST_WAIT_S, TOO_SLOW * (now - since))
        if too_slow and len(self._threads) < self._most_threads:
            self._start_thread()

    def _start_thread(self) -> None:
        name = f"read-ahead_{len(self._threads)}"
        thread = threading.Thread(target=_decode_all, args=(self._todo, self._decode), name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _look_ahead(self) -> None:
        while True:
            row = next(self._coming, None) if self._beyond is None else self._beyond
            self._beyond = row
            if row is None:
                self._todo.put(None)
                return
            shard, batch, _ = self._place(row)
            if (shard, batch) not in self._batches:
                if len(self._batches) == self._limit:
                    return
                self._batches[shard, batch] = Future()
                self._todo.put(((shard, batch), self._batches[shard, batch]))
            self._wanted[shard, batch] += 1
            self._seen.append(row)
            self._beyond = None


def _stop(todo: Todo, threads: list[threading.Thread]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            todo.get_nowait()
    todo.put(None)
    for thread in threads:
        thread.join()


def _decode_all(todo: Todo, decode: Callable[[int, int], RowBatch]) -> None:
    while (next_one := todo.get()) is not None:
        key, future = next_one
        try:
            future.set_result(decode(*key))
        except BaseException as error:  # for whoever reads the row
            future.set_exception(error)
    todo.put(None)  # for the other threads
