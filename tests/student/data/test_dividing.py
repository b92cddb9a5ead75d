"""Who gets which rows of a step: the same rows as without dividing them by place, and each process those together."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

import cache_format as cf
from made_up import made_up
from pipeline.student.data.dataset import WINDOW, CacheDataset, LocalShuffle
from pipeline.student.data.mixed_dataset import MixedShuffle
from pipeline.student.data.rank_sampler import DividedByPlace, share_of

Order = LocalShuffle | MixedShuffle | DividedByPlace
Steps = list[list[list[list[int]]]]  # [step][process][micro-batch][row]

ROWS = {"one cache": 61, "a mixture": 45 + 16}


def order(case: str, *, resample: bool = False, multiple_of: int = 1, epoch: int = 1) -> LocalShuffle | MixedShuffle:
    """61 rows by record batches of 4, an epoch of 67 in the mixture, of whose caches one comes twice."""
    samples = 3 if resample else 1
    if case == "one cache":
        found = LocalShuffle(record_batches(61), seed=3, window=4, samples=samples, multiple_of=multiple_of)
    else:
        of_each = [record_batches(45), record_batches(16)]
        found = MixedShuffle(of_each, [41, 26], seed=3, samples=[samples] * 2, multiple_of=multiple_of)
    found.set_epoch(epoch)
    return found


def record_batches(rows: int, size: int = 4) -> list[tuple[int, int]]:
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def dealt(sampler: Order, processes: int, accumulation: int, batch_size: int) -> Steps:
    """As accelerate deals batches out, and Trainer takes `accumulation` of them at a time."""
    batches = BatchSampler(sampler, batch_size, drop_last=False)
    ranks = [list(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)]
    assert len({len(rank) for rank in ranks}) == 1 and all(len(batch) == batch_size for rank in ranks for batch in rank)
    starts = range(0, len(ranks[0]), accumulation)
    return [[rank[start : start + accumulation] for rank in ranks] for start in starts]


def flat(nested: Any) -> list[int]:
    return [nested] if isinstance(nested, int) else [index for each in nested for index in flat(each)]


@pytest.mark.parametrize("resample", [False, True], ids=["", "resample"])
@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8])
def test_a_step_has_the_same_rows_and_each_process_those_that_lie_together(
    processes: int, accumulation: int, batch_size: int, case: str, resample: bool
):
    division = {"processes": processes, "accumulation": accumulation, "batch_size": batch_size}
    rows, plain = ROWS[case], list(order(case, resample=resample))
    filled = order(case, resample=resample, multiple_of=processes * batch_size)
    divided = DividedByPlace(filled, rows=rows, **division)
    assert len(divided) == len(filled) == len(list(divided))
    of_a_step = processes * accumulation * batch_size
    wanted = [plain[i : i + of_a_step] for i in range(0, len(plain), of_a_step)]
    found = dealt(divided, **division)
    assert len(found) == len(wanted)
    for step, expected in zip(found, wanted, strict=True):
        counted = [index for index in flat(step) if index // rows % 2 == 0]
        assert sorted(counted) == sorted(expected)
        fillers = [index for index in flat(step) if index // rows % 2]
        assert set(fillers) <= {plain[-1] + rows} and len(fillers) < processes * batch_size
        places = [index % rows for index in flat(step)]  # first all micro-batches of process 0
        assert places == sorted(places)
    assert Counter(index for index in divided if index // rows % 2 == 0) == Counter(plain)


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2))
def test_however_rows_and_processes_divide(rows: int, processes: int, accumulation: int, batch_size: int, epoch: int):
    sampler = LocalShuffle(record_batches(rows), seed=0, window=3, multiple_of=processes * batch_size)
    divided = DividedByPlace(sampler, rows=rows, processes=processes, accumulation=accumulation, batch_size=batch_size)
    divided.set_epoch(epoch)
    plain = LocalShuffle(record_batches(rows), seed=0, window=3)
    plain.set_epoch(epoch)
    expected = iter(plain)
    for step in dealt(divided, processes, accumulation, batch_size):
        mine = sorted(index for index in flat(step) if index < rows)
        assert mine == sorted(itertools.islice(expected, len(mine)))
    assert next(expected, None) is None


@pytest.mark.parametrize("case", ROWS)
def test_steps_have_the_same_rows_with_any_number_of_processes(case: str):
    found = []
    for processes, accumulation, batch_size in ((2, 1, 6), (3, 2, 2), (4, 3, 1), (1, 3, 4)):
        filled = order(case, multiple_of=processes * batch_size)
        division = {"processes": processes, "accumulation": accumulation, "batch_size": batch_size}
        steps = dealt(DividedByPlace(filled, rows=ROWS[case], **division), **division)
        found.append([sorted(index for index in flat(step) if index < ROWS[case]) for step in steps])
    assert found[0] == found[1] == found[2] == found[3] and len(found[0]) == 6


def test_resumed_in_the_middle_of_an_epoch_each_process_goes_on_with_its_own():
    filled = order("a mixture", multiple_of=3 * 2, epoch=2)
    batches = BatchSampler(DividedByPlace(filled, rows=61, processes=3, accumulation=2, batch_size=2), 2, False)
    for rank in range(3):
        shard = BatchSamplerShard(batches, 3, rank)
        assert list(SkipBatchSampler(shard, 6)) == list(shard)[6:]


# -- what is read -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two windows of record batches of 4 rows."""
    path = tmp_path_factory.mktemp("dividing") / "cache"
    made_up(path, 2 * WINDOW * 4)
    assert len(cf.open_cache(path).record_batches()) == 2 * WINDOW
    return path


@pytest.fixture()
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(shard, record batch), each time one is read, checked and decoded."""
    calls: list[tuple[int, int]] = []
    plain = cf.Cache._read_record_batch

    def read(self: cf.Cache, shard: int, index: int, *streams: object):
        calls.append((shard, index))
        return plain(self, shard, index, *streams)

    monkeypatch.setattr(cf.Cache, "_read_record_batch", read)
    return calls


@pytest.mark.parametrize(
    "processes, accumulation, batch_size, most",
    [
        (2, 1, 4, 1.4),  # else 1.8
        (4, 1, 4, 1.8),  # else 2.5
        (4, 4, 1, 1.8),
        (8, 1, 8, 1.0),  # a step is a window, a process's part two record batches of it; else 3.2
        (8, 2, 4, 1.0),
    ],
)
def test_processes_share_the_decoding(
    cache: Path, decoded: list[Any], processes: int, accumulation: int, batch_size: int, most: float
):
    division = {"processes": processes, "accumulation": accumulation, "batch_size": batch_size}
    sampler = CacheDataset(cf.open_cache(cache)).sampler(seed=0, multiple_of=processes * batch_size)
    times = []  # that a record batch is decoded, by all together
    for each in (sampler, DividedByPlace(sampler, rows=len(sampler), **division)):
        decoded.clear()
        readers = [CacheDataset(cf.open_cache(cache, cached_record_batches=WINDOW + 1)) for _ in range(processes)]
        for step in dealt(each, **division):
            for reader, batches in zip(readers, step, strict=True):
                for batch in batches:
                    reader.__getitems__(batch)
        assert len(set(decoded)) == 2 * WINDOW
        times.append(len(decoded) / len(set(decoded)))
    assert times[1] <= most and times[0] > 1.25 * most


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rows", [1, 2, 5, 12])
def test_rows_that_are_gone_through_once_are_shared_out_in_one_piece(rows: int, processes: int):
    shares = [share_of(rows, processes, rank) for rank in range(processes)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) == len(shares[0]) == -(-rows // processes)
