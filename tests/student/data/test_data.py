"""Which rows are read, how often, in which order, and what a batch of them holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import cache_format as cf
from cache_format.read.shard_reader import ShardReader
from pipeline.losses import IGNORE_INDEX, SparseTargetBatch
from pipeline.student.data.dataset import WINDOW, Batch, CacheDataset, LocalShuffle, collate, without_loss_tokens
from pipeline.student.data.row_index import RowIndex
from runs import build_cache
from tiny import english

VOCAB = 400


@pytest.fixture(scope="module")
def cache(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 90 rows in record batches of 2: several windows of them."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(english(160))
    path = build_cache(folder / "cache", teacher_dir, folder / "text.txt", rows_per_shard=2)
    assert len(cf.open_cache(path).record_batches()) > 2 * WINDOW
    return path


def opened(path: Path) -> cf.Cache:
    return cf.open_cache(path, cached_record_batches=WINDOW + 1)  # as train_student does


# -- the order of rows ------------------------------------------------------------------------------------------------

record_batches = st.lists(st.integers(1, 5), min_size=1, max_size=40).map(
    lambda sizes: [(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
)


@given(record_batches, st.integers(0, 3), st.integers(0, 3), st.integers(1, 6))
def test_a_permutation_in_windows_of_record_batches(batches, seed: int, epoch: int, window: int):
    sampler = LocalShuffle(batches, seed=seed, window=window)
    sampler.set_epoch(epoch)
    rows = list(sampler)
    assert sorted(rows) == list(range(batches[-1][1])) and len(sampler) == len(rows)
    assert rows == list(sampler)  # the same each time
    batch_of = np.repeat(np.arange(len(batches)), [stop - start for start, stop in batches])[rows]
    # Read in order, the record batches of a window are all there before one of the next comes.
    first, last = {}, {}
    for place, batch in enumerate(batch_of):
        first.setdefault(int(batch), place)
        last[int(batch)] = place
    order = sorted(first, key=lambda batch: first[batch])
    for i in range(0, len(order), window):
        assert max(last[b] for b in order[i : i + window]) < min((first[b] for b in order[i + window :]), default=1e9)


@given(record_batches, st.integers(1, 12))
def test_fillers_make_it_a_multiple_and_name_a_row_once_more(batches, multiple: int):
    plain, filled = LocalShuffle(batches, seed=1), LocalShuffle(batches, seed=1, multiple_of=multiple)
    rows, n = list(filled), batches[-1][1]
    assert len(rows) == len(filled) and len(rows) % multiple == 0 and len(rows) < n + multiple
    assert rows[:n] == list(plain)
    assert set(rows[n:]) <= {n + rows[n - 1]}


def test_order_differs_by_epoch_and_by_seed():
    batches = [(i, i + 4) for i in range(0, 200, 4)]
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)):
        sampler = LocalShuffle(batches, seed=seed)
        sampler.set_epoch(epoch)
        orders.append(tuple(sampler))
    assert len(set(orders)) == 4


@pytest.mark.long
def test_a_batch_mixes_rows_of_many_places(cache: Path):
    reader = opened(cache)
    order = list(LocalShuffle(reader.record_batches(), seed=0))
    places = [len({row // 2 for row in order[i : i + 8]}) for i in range(0, len(order) - 8, 8)]
    assert np.mean(places) > 6


def test_how_often_two_rows_of_a_batch_stood_together_is_what_the_documentation_says():
    # Of the 16·4 rows of a window 3 others are from the same record batch: so are 3 of 63 neighbours in the order.
    batches = [(i, i + 4) for i in range(0, 16 * 4 * 200, 4)]
    places = np.array(list(LocalShuffle(batches, seed=0, window=16))).reshape(-1, 64) // 4
    assert np.mean(places[:, 1:] == places[:, :-1]) == pytest.approx(3 / 63, rel=0.1)
    assert abs(np.corrcoef(np.arange(places.size), places.ravel())[0, 1]) < 3 / np.sqrt(len(batches))


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.fixture()
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(shard, record batch), each time one is read, checked and decoded."""
    calls: list[tuple[str, int]] = []
    plain = ShardReader.record_batch

    def record_batch(self: ShardReader, index: int, *streams: object):
        calls.append((self._name, index))
        return plain(self, index, *streams)

    monkeypatch.setattr(ShardReader, "record_batch", record_batch)
    return calls


@pytest.mark.parametrize("batch_size", [1, 5, 8])
def test_each_record_batch_is_decoded_once_in_an_epoch(cache: Path, decoded: list, batch_size: int):
    reader = opened(cache)
    sampler = LocalShuffle(reader.record_batches(), seed=3)
    rows = []
    for batch in DataLoader(CacheDataset(reader), batch_size=batch_size, sampler=sampler, collate_fn=list):
        rows += [row.row for row in batch]
    assert rows == list(sampler)
    assert len(decoded) == len(set(decoded)) == len(reader.record_batches())


def test_skipped_rows_are_not_read(cache: Path, decoded: list):
    from accelerate import skip_first_batches

    reader = opened(cache)
    sampler = LocalShuffle(reader.record_batches(), seed=3)
    loader = DataLoader(CacheDataset(reader), batch_size=4, sampler=sampler, collate_fn=list)
    rest = [row.row for batch in skip_first_batches(loader, 20) for row in batch]
    assert rest == list(sampler)[80:]
    assert len(decoded) <= len(rest)


def test_worker_processes_read_the_same_batches(cache: Path):
    reader = opened(cache)
    sampler = LocalShuffle(reader.record_batches(), seed=3)
    alone, with_workers = (
        list(DataLoader(CacheDataset(reader), 5, sampler=sampler, collate_fn=collate, num_workers=n)) for n in (0, 2)
    )
    assert len(alone) == len(with_workers)
    for a, b in zip(alone, with_workers, strict=True):
        assert a.keys() == b.keys() and all(map(torch.equal, tensors(a), tensors(b)))


def test_filler_rows_are_rows_that_do_not_count(cache: Path):
    dataset = CacheDataset(opened(cache))
    row, filler = dataset.__getitems__([3, len(dataset) + 3])
    assert row.loss_mask.any() and not filler.loss_mask.any()
    assert np.array_equal(row.input_ids, filler.input_ids)
    assert dataset[-1].row == len(dataset) - 1


# -- a batch ----------------------------------------------------------------------------------------------------------


def test_collated_rows_are_the_rows(cache: Path):
    rows = [opened(cache)[i] for i in (0, 7, 88)]
    rows.append(CacheDataset(opened(cache))[len(opened(cache)) + 5])
    batch = collate(rows)
    longest = max(len(row.input_ids) for row in rows)
    assert batch["input_ids"].shape == batch["labels"].shape == (4, longest)
    targets = batch["targets"]
    assert isinstance(targets, SparseTargetBatch) and targets.ids.shape == targets.logprobs.shape == (4 * longest, 16)
    assert batch["num_tokens"] == sum(len(row.input_ids) for row in rows)
    assert batch["shift_labels"] is batch["labels"]
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        assert batch["input_ids"][i, :length].tolist() == row.input_ids.tolist()
        assert batch["position_ids"][i, :length].tolist() == row.position_ids.tolist()
        assert (batch["position_ids"][i, length:].diff() == 1).all()  # no document seems to begin in the padding
        assert batch["labels"][i, :length].tolist() == row.label_ids.tolist()
        assert (batch["labels"][i, length:] == IGNORE_INDEX).all()
        for t in range(length):
            # The target list of t, the label of t and the mask of t stand at the same place: no shift anywhere.
            ids, logprobs = row.targets.at(t)
            n = i * longest + t
            assert targets.ids[n, : len(ids)].tolist() == ids.tolist()
            assert targets.logprobs[n, : len(ids)].tolist() == logprobs.tolist()
            assert (targets.logprobs[n, len(ids) :] == -torch.inf).all()
            for name in ("residual_logprob", "entropy", "exact_counts"):
                assert getattr(targets, name)[n] == getattr(row.targets, name)[t]
            if row.loss_mask[t]:
                assert batch["labels"][i, t] == row.input_ids[t + 1]
    assert (batch["labels"][3] == IGNORE_INDEX).all()
    assert targets.labels.tolist() == batch["labels"].flatten().tolist()
    assert targets.loss_mask.sum() == sum(int(row.loss_mask.sum()) for row in rows)


def test_a_batch_without_loss_tokens_keeps_everything_but_the_labels(cache: Path):
    batch = collate(opened(cache)[:3])
    silent = without_loss_tokens(batch)
    assert (silent["labels"] == IGNORE_INDEX).all() and (silent["shift_labels"] == IGNORE_INDEX).all()
    assert (batch["labels"] != IGNORE_INDEX).any()
    for name in batch.keys() - {"labels", "shift_labels", "targets"}:
        assert silent[name] is batch[name]
    assert not silent["targets"].loss_mask.any() and silent["targets"].ids is batch["targets"].ids


def test_a_batch_reaches_the_device_as_a_whole(cache: Path):
    """As accelerate and pinned loaders move it: targets are an object among tensors."""
    opened_cache = opened(cache)
    loader = DataLoader(CacheDataset(opened_cache), batch_size=2, collate_fn=CacheDataset(opened_cache).collate)
    batch = next(iter(loader))
    moved = send_to_device(batch, torch.device("meta"), non_blocking=True)
    assert moved.keys() == batch.keys() and all(value.device.type == "meta" for value in tensors(moved))
    assert moved["targets"].temperature == batch["targets"].temperature
    copied = send_to_device(batch, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(tensors(copied), tensors(batch), strict=True))


def tensors(batch: Batch) -> list[torch.Tensor]:
    values = [*batch.values(), *vars(batch["targets"]).values()]
    return [value for value in values if isinstance(value, torch.Tensor)]


# -- indices ----------------------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 1000), data=st.data())
def test_an_index_keeps_row_sample_and_filler(rows: int, data: st.DataObject):
    index = RowIndex(
        data.draw(st.integers(0, rows - 1)), data.draw(st.none() | st.integers(0, 9)), data.draw(st.booleans())
    )
    assert RowIndex.decode(index.encode(rows), rows) == index
    assert RowIndex.decode(index.row, rows) == RowIndex(index.row) == RowIndex.decode(index.row - rows, rows)
