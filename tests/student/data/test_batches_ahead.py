"""Batches made before the loader asks for them: the same in the same order, few at a time, in threads that end."""

from __future__ import annotations

import itertools
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

import cache_format as cf
from cache_format.read.shard_reader import ShardReader
from pipeline.student.data import batches_ahead
from pipeline.student.data.batches_ahead import BATCHES_AHEAD, BatchesAhead, decoding_threads
from pipeline.student.data.dataset import WINDOW, Batch, CacheDataset
from pipeline.student.data.mixed_dataset import MixedDataset
from runs import build_cache
from tiny import english


@pytest.fixture(scope="module")
def cache(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ahead")
    (folder / "text.txt").write_text(english(80))
    return build_cache(folder / "cache", teacher_dir, folder / "text.txt", rows_per_shard=1)


@pytest.fixture(autouse=True)
def threads_end() -> Iterator[None]:
    yield
    wait_for(lambda: not reading_threads())


def reading_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith(("batches-ahead", "read-ahead"))]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def rows_of(path: Path, kind: str) -> CacheDataset | MixedDataset:
    parts = [CacheDataset(cf.open_cache(path, cached_record_batches=WINDOW + 1)) for _ in range(1 + (kind == "mixed"))]
    return parts[0] if kind == "one" else MixedDataset(parts, [40, 20])


def same(found: Batch, expected: Batch) -> bool:
    targets = found["targets"].rectangular(), expected["targets"].rectangular()
    return torch.equal(found["input_ids"], expected["input_ids"]) and torch.equal(targets[0].ids, targets[1].ids)


class NoCache:
    def __len__(self) -> int:
        return 100

    def expect(self, rows: Iterator[int], record_batches: int, *, threads: int) -> None: ...
    def expect_nothing(self) -> None: ...


class Made:
    """Rows that are their own batch; records which batches were made, and in which threads."""

    caches = (NoCache(),)

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return len(self.caches[0])

    def __getitems__(self, indices: list[int]) -> list[int]:
        self.batches.append(indices)
        self.threads.add(threading.current_thread().name)
        return indices

    def collate(self, rows: list[int]) -> Any:
        return {"rows": torch.tensor(rows)}


ORDER = [[4, 2], [0, 1], [7, 5], [3, 6], [8, 9], [11, 10]]


def ahead_of(rows: Any, order: Sequence[Sequence[int]] = ORDER, **options: bool) -> BatchesAhead:
    return BatchesAhead(rows, order, **options)


def test_a_few_batches_are_made_before_they_are_asked_for() -> None:
    rows = Made()
    with closing(ahead_of(rows)) as ahead:
        for number, batch in enumerate(ORDER[1:], 1):
            assert ahead.__getitems__(batch)["rows"].tolist() == batch
            made = ORDER[1 : 1 + number + BATCHES_AHEAD]
            wait_for(lambda made=made: rows.batches == made)  # type: ignore[misc]
            time.sleep(0.002)
            assert rows.batches == made
    assert rows.threads == {"batches-ahead_0"}


def test_the_next_batch_is_made_a_little_later_if_another_one_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_ahead, "PAUSE_S", 1.0)
    rows = Made()
    with closing(ahead_of(rows)) as ahead:
        began = time.monotonic()
        ahead.__getitems__(ORDER[0])
        wait_for(lambda: len(rows.batches) == 3)  # nothing was ready
        assert time.monotonic() - began < 0.9
        ahead.__getitems__(ORDER[1])
        time.sleep(0.2)
        assert len(rows.batches) == 3
        ahead.__getitems__(ORDER[2])
        ahead.__getitems__(ORDER[3])
        assert time.monotonic() - began > 1.0


def test_every_epoch_begins_anew_also_in_the_middle() -> None:
    rows, order = Made(), [list(batch) for batch in ORDER]
    with closing(ahead_of(rows, order)) as ahead:
        for first in (0, 3):
            order.reverse()
            for batch in order[first:]:
                assert ahead.__getitems__(batch)["rows"].tolist() == batch
        assert rows.batches == [*ORDER[::-1], *ORDER[3:]] and rows.threads == {"batches-ahead_0"}


def test_another_order_than_the_expected_one_is_read_all_the_same() -> None:
    rows = Made()
    with closing(ahead_of(rows)) as ahead:
        for batch in (ORDER[0], ORDER[2], ORDER[3], [55, 56]):
            assert ahead.__getitems__(batch)["rows"].tolist() == batch
        assert not reading_threads()
    assert "MainThread" in rows.threads


def test_an_error_arrives_with_its_traceback(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def record_batch(self: ShardReader, index: int, streams: object) -> None:
        raise cf.CorruptShardError("damaged")

    monkeypatch.setattr(ShardReader, "record_batch", record_batch)
    rows = rows_of(cache, "one")
    with closing(ahead_of(rows)) as ahead, pytest.raises(cf.CorruptShardError, match="damaged") as raised:
        ahead.__getitems__(ORDER[0])
    names = [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert {"_make", "_decode_all", "record_batch"} <= set(names)


def test_decoding_may_use_two_threads_where_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in (({0}, 1), ({0, 1}, 2), (set(range(64)), 2)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores, raising=False)
        assert decoding_threads() == expected
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    for count, expected in ((None, 1), (1, 1), (8, 2)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert decoding_threads() == expected


def test_the_threads_end_when_the_loader_is_dropped(cache: Path) -> None:
    rows = rows_of(cache, "one")
    ahead = ahead_of(rows)
    loader = iter(DataLoader(ahead, batch_sampler=ORDER, collate_fn=ahead.collate))
    next(loader)
    assert reading_threads()
    del loader, ahead, rows
    wait_for(lambda: not reading_threads())


def test_closing_drops_what_was_decoded(cache: Path) -> None:
    rows = rows_of(cache, "mixed")
    with closing(ahead_of(rows)) as ahead:
        ahead.__getitems__(ORDER[0])
        assert all(each._ahead is not None for each in rows.caches)
    assert all(each._ahead is None for each in rows.caches) and not reading_threads()


def test_batches_are_pinned_in_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread uses the GPU of this process; without one nothing is pinned."""
    pinned, devices = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.tolist()) or self)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: devices.append((index, *reading_threads())))
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        with closing(ahead_of(Made(), ORDER[:1], pinned=True)) as ahead:
            ahead.__getitems__(ORDER[0])
    assert pinned == ORDER[:1] and devices == [(3, "batches-ahead_0")]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["one", "mixed"])
@pytest.mark.parametrize(("workers", "skipped"), [(0, 0), (0, 3), (1, 0), (2, 0), (2, 3)])
def test_every_row_is_the_expected_one(
    cache: Path, kind: str, workers: int, skipped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the training process and in each worker, from the start and in the middle of an epoch."""
    if workers:
        monkeypatch.setattr(batches_ahead, "get_worker_info", lambda: SimpleNamespace(num_workers=workers))
    for worker in range(max(1, workers)):
        rows, plain = rows_of(cache, kind), rows_of(cache, kind)
        sampler = rows.sampler(seed=1)
        sampler.set_epoch(2)
        batches = BatchSampler(sampler, 4, drop_last=False)
        with closing(BatchesAhead(rows, batches)) as ahead:
            for batch in itertools.islice(batches, skipped + worker, None, workers or 1):
                assert same(ahead.__getitems__(batch), plain.collate(plain.__getitems__(batch)))
            assert all(each._ahead is not None for each in rows.caches)  # to the last row


def test_a_loader_gives_the_same_batches_with_a_worker(cache: Path) -> None:
    batches = []
    for workers in (0, 1):
        rows = rows_of(cache, "one")
        sampler = BatchSampler(rows.sampler(seed=1), 4, drop_last=False)
        ahead = BatchesAhead(rows, sampler)
        batches.append(list(DataLoader(ahead, batch_sampler=sampler, collate_fn=ahead.collate, num_workers=workers)))
    assert len(batches[0]) == len(batches[1]) and all(map(same, *batches))
