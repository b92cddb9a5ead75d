"""Record batches decoded ahead: the same rows, each decoded once, never more in memory than allowed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import cache_format as cf
from cache_format.read import read_ahead
from cache_format.read.read_ahead import ReadAhead
from cache_format.rows.row_batch import RowBatch, concatenate
from cache_samples import sample_row, write_sample

ROWS, PER_BATCH = 24, 3


def batch_of(shard: int, index: int) -> RowBatch:
    return concatenate([sample_row(index * PER_BATCH + i) for i in range(PER_BATCH)])


def place(row: int) -> tuple[int, int, int]:
    return (0, *divmod(row, PER_BATCH))


class Decoding:
    """Counts record batches, and how many are alive."""

    def __init__(self) -> None:
        self.done: list[int] = []

    def __call__(self, shard: int, index: int) -> RowBatch:
        self.done.append(index)
        return batch_of(shard, index)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.long
@pytest.mark.parametrize("limit", [1, 2, 5, 100])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_in_order_with_bounded_memory(limit: int, shuffled: bool, threads: int) -> None:
    decode = Decoding()
    order = list(range(ROWS)) + list(range(6))  # the beginning once more
    if shuffled:
        order = np.random.default_rng(0).permutation(order).tolist()
    ahead = ReadAhead(iter(order), place, decode, limit, threads)
    for row in order:
        found = ahead.row(row)
        assert found is not None and found.row == row
        assert np.array_equal(found.targets.ids, sample_row(row).targets.ids)
        assert len(ahead._batches) <= limit
    assert ahead.row(0) is None and not ahead._batches
    if not shuffled and limit > 1:
        again = 0 if limit > ROWS else 2  # the first two may be in memory when the end of the order becomes known
        assert len(decode.done) == ROWS // PER_BATCH + again
    ahead.close()


def test_the_next_record_batches_are_decoded_before_they_are_asked_for() -> None:
    decode = Decoding()
    ahead = ReadAhead(iter(range(ROWS)), place, decode, 4)
    ahead.row(0)
    wait_for(lambda: decode.done == [0, 1, 2, 3])
    for row in range(1, PER_BATCH):
        ahead.row(row)
    ahead.row(PER_BATCH)  # the first one is done with, so there is room for another
    wait_for(lambda: decode.done == [0, 1, 2, 3, 4])
    ahead.close()


@pytest.mark.parametrize("slow", [False, True])
def test_a_second_thread_helps_if_readers_wait_for_long(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "LEAST_WAIT_S", 0.005)
    names = set()

    def decode(shard: int, index: int) -> RowBatch:
        names.add(threading.current_thread().name)
        time.sleep(0.01 * slow)
        return batch_of(shard, index)

    ahead = ReadAhead(iter(range(ROWS)), place, decode, 4, threads=2)
    for row in range(ROWS):
        _, batch, _ = place(row)
        if not slow:
            wait_for(lambda batch=batch: (0, batch) not in ahead._batches or ahead._batches[0, batch].done())  # type: ignore[misc]
        assert ahead.row(row) is not None
        if row == 0:  # which everyone waits for
            assert len(ahead._threads) == 1
    ahead.close()
    assert names == ({"read-ahead_0", "read-ahead_1"} if slow else {"read-ahead_0"})


def test_an_error_reaches_who_reads_the_row() -> None:
    def decode(shard: int, index: int) -> RowBatch:
        if index == 1:
            raise cf.CorruptShardError("damaged")
        return batch_of(shard, index)

    ahead = ReadAhead(iter(range(ROWS)), place, decode, 4, threads=2)
    for row in range(PER_BATCH):
        assert ahead.row(row) is not None
    with pytest.raises(cf.CorruptShardError, match="damaged"):
        ahead.row(PER_BATCH)
    ahead.close()


def test_the_threads_end_with_the_order_and_before_the_interpreter() -> None:
    """A spawned loader process whose thread was in C++ code when the interpreter went away was killed by SIGABRT."""
    before = set(threading.enumerate())
    whole, part = (ReadAhead(iter(range(ROWS)), place, batch_of, 4, threads=2) for _ in range(2))
    started = set(threading.enumerate()) - before
    assert all(whole.row(row) is not None for row in range(ROWS))
    wait_for(lambda: sum(thread.is_alive() for thread in started) == 1)
    assert part._end.atexit and part.row(0) is not None
    part.close()
    assert not any(thread.is_alive() for thread in started)


def test_two_threads_that_read_one_cache_end_it_without_waiting_for_ever(cache: cf.Cache) -> None:
    order = [row % 4 for row in range(400)]
    cache.expect(iter(order), 2)
    found: list[list[int]] = [[], []]
    readers = [
        threading.Thread(target=lambda own=own: own.extend(cache[row].row for row in order), daemon=True)
        for own in found
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(timeout=20)
    assert found == [order, order]
    cache.expect_nothing()


@pytest.fixture()
def cache(tmp_path: Path) -> Iterator[cf.Cache]:
    write_sample(tmp_path / "cache")
    yield cf.open_cache(tmp_path / "cache")


def test_a_cache_that_expects_rows_and_is_asked_for_others(cache: cf.Cache) -> None:
    threads = threading.active_count()
    cache.expect(iter([3, 1, 2, 0]), 2)
    assert [cache[row].row for row in (3, 1)] == [3, 1]
    assert cache._ahead is not None
    assert [cache[row].row for row in (7, 2, 0, 3)] == [7, 2, 0, 3]
    assert cache._ahead is None
    wait_for(lambda: threading.active_count() <= threads)
