"""Several caches in one order: shares that hold everywhere, every row once in each pass, each read once."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import cache_format as cf
from made_up import THRESHOLD, made_up
from pipeline.student.data.cache_mix import mix_of
from pipeline.student.data.dataset import WINDOW, Batch, CacheDataset, LocalShuffle
from pipeline.student.data.mixed_dataset import MixedDataset, MixedShuffle, interleave

# -- the interleaving -------------------------------------------------------------------------------------------------

many_counts = st.lists(st.one_of(st.integers(1, 5), st.integers(1, 200)), min_size=1, max_size=6)


@given(many_counts)
def test_shares_hold_among_the_first_rows_and_in_every_stretch_of_them(counts: list[int]):
    order = np.array(list(interleave(counts)))
    total = sum(counts)
    assert Counter(order.tolist()) == {i: count for i, count in enumerate(counts)}
    drawn = np.stack([np.concatenate([[0], np.cumsum(order == i)]) for i in range(len(counts))])
    off = drawn - np.outer(counts, np.arange(total + 1)) / total
    assert np.abs(off).max() <= 1 - 1 / max(1, 2 * len(counts) - 2) + 1e-9
    # Hence of every stretch: the difference of two such.
    assert (off.max(axis=1) - off.min(axis=1)).max() < 2


def test_two_equal_shares_take_turns():
    assert list(interleave([3, 3])) in ([0, 1] * 3, [1, 0] * 3)


def test_every_batch_of_eight_has_its_shares_where_chance_would_not_give_them():
    shares = np.array([700, 200, 100])
    batches = np.array(list(interleave(shares.tolist()))).reshape(-1, 8)
    assert len(batches) == 125
    for i, share in enumerate(shares / 1000):
        off = (batches == i).sum(axis=1) - 8 * share
        assert np.abs(off).max() < 1.5
        assert off.var() < 0.3 * 8 * share * (1 - share)  # drawn by chance it would be this product


# -- the order of rows ------------------------------------------------------------------------------------------------


def record_batches(rows: int, size: int = 4) -> list[tuple[int, int]]:
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def epochs(sampler: MixedShuffle, number: int) -> list[list[int]]:
    found = []
    for epoch in range(number):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
        assert len(found[-1]) == len(sampler)
    return found


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 70)), min_size=1, max_size=3),
    st.integers(0, 3),
    st.integers(1, 4),
)
def test_every_pass_over_each_cache_has_every_row_once(sizes: list[tuple[int, int]], seed: int, samples: int):
    rows, counts = [size for size, _ in sizes], [count for _, count in sizes]
    sampler = MixedShuffle([record_batches(n) for n in rows], counts, seed=seed, samples=[samples] * len(rows))
    everything = np.array(list(itertools.chain(*epochs(sampler, 5))))
    sample, index = np.divmod(everything, 2 * sum(rows))
    start = 0
    for n, count in zip(rows, counts, strict=True):
        mine = (index >= start) & (index < start + n)
        stream = index[mine] - start
        assert len(stream) == 5 * count
        for number in range(math.ceil(len(stream) / n)):
            one_pass = stream[number * n : (number + 1) * n]
            assert len(set(one_pass.tolist())) == len(one_pass)  # so the whole ones hold every row
            used = {1 + number % samples} if samples > 1 else {0}
            assert set(sample[mine][number * n : (number + 1) * n].tolist()) <= used
        start += n


def test_a_cache_that_runs_out_begins_again_in_another_order():
    sampler = MixedShuffle([record_batches(100), record_batches(12)], [40, 30], seed=0, samples=[1, 1])
    (rows,) = epochs(sampler, 1)
    small = [row - 100 for row in rows if row >= 100]
    first, second = small[:12], small[12:24]
    assert sorted(first) == sorted(second) == list(range(12)) and first != second


def test_caches_of_the_same_shape_are_shuffled_apart_from_one_another():
    sampler = MixedShuffle([record_batches(64)] * 2, [64, 64], seed=0, samples=[1, 1])
    (rows,) = epochs(sampler, 1)
    a, b = ([row - start for row in rows if start <= row < start + 64] for start in (0, 64))
    assert sorted(a) == sorted(b) and a != b


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        sampler = MixedShuffle([record_batches(50), record_batches(70)], [50, 70], seed=seed, samples=[1, 1])
        sampler.set_epoch(epoch)
        assert list(sampler) == list(sampler)
        return list(sampler)

    found = {(seed, epoch): order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert len({tuple(each) for each in found.values()}) == 4
    assert order(1, 1) == found[1, 1]


@given(st.integers(1, 9), st.integers(1, 3))
def test_fillers_name_the_last_row_and_its_sample_without_counting_it(multiple: int, samples: int):
    sampler = MixedShuffle(
        [record_batches(7), record_batches(9)], [5, 11], seed=0, samples=[samples] * 2, multiple_of=multiple
    )
    rows = list(sampler)
    assert len(rows) == len(sampler) and len(rows) % multiple == 0
    assert set(rows[16:]) <= {rows[15] + 16}


def test_the_order_of_one_cache_is_what_it_was_before_there_were_mixtures():
    # Written down from the first version of LocalShuffle: a resumed run must not find another order.
    sampler = LocalShuffle([(0, 3), (3, 6), (6, 8), (8, 12)], seed=5, window=2, samples=2)
    sampler.set_epoch(3)
    assert list(sampler) == [49, 57, 56, 59, 48, 58, 50, 54, 51, 53, 55, 52]


# -- what is read -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """200 rows of 3 to 12 tokens that all count, and 90 of 10 to 20 of which a third does; several windows each."""
    folder = tmp_path_factory.mktemp("mixing")
    made_up(folder / "a", 200)
    made_up(folder / "b", 90, lengths=(10, 20), share=0.33, seed=1)
    return [folder / "a", folder / "b"]


def opened(paths: list[Path]) -> list[cf.Cache]:
    return [cf.open_cache(path, cached_record_batches=WINDOW + 1) for path in paths]


def dataset(paths: list[Path], weights: list[float | None]) -> MixedDataset:
    mix = mix_of(opened(paths), weights)
    return MixedDataset([CacheDataset(cache) for cache in mix.caches], [each.rows for each in mix.portions])


def test_an_index_names_a_row_of_one_of_them(caches: list[Path], tmp_path: Path):
    targets = {**THRESHOLD, "samples": 3, "max_entries": 4}
    parts = [made_up(tmp_path / name, n, targets=targets, seed=n) for name, n in (("a", 5), ("b", 7))]
    mixed = MixedDataset([CacheDataset(part) for part in parts], [5, 7])
    assert len(mixed) == 12
    for index, (part, row) in {0: (0, 0), 4: (0, 4), 5: (1, 0), 11: (1, 6), -1: (1, 6)}.items():
        assert np.array_equal(mixed[index].input_ids, parts[part][row].input_ids)
        assert mixed.part_of(index) == part
    plain, filler, sampled = mixed.__getitems__([8, 8 + 12, 8 + 2 * 12 * 3])
    assert plain.loss_mask.any() and not filler.loss_mask.any() and plain.row == filler.row == sampled.row == 3
    assert sampled.targets.sample_counts is None and plain.targets.sample_counts is not None
    assert np.array_equal(sampled.targets.ids, parts[1][3].targets.sample(2).ids)


@pytest.mark.long
def test_shares_are_of_the_tokens_that_count(caches: list[Path]):
    counted = [cache.num_loss_tokens for cache in opened(caches)]
    assert counted[0] > 3 * counted[1]
    for weights in ([7.0, 3.0], [0.1, 0.4]):
        mixed = dataset(caches, weights)
        sampler = mixed.sampler(seed=0)
        found = np.zeros(2)
        for epoch in range(9):
            sampler.set_epoch(epoch)
            for index in sampler:
                found[mixed.part_of(index)] += int(mixed[index].loss_mask.sum())
        assert found / found.sum() == pytest.approx(np.array(weights) / sum(weights), abs=0.005)
        assert found.sum() / 9 == pytest.approx(sum(counted), rel=0.01)  # an epoch is as long as all together


def test_without_weights_an_epoch_is_the_union(caches: list[Path]):
    mixed = dataset(caches, [None, None])
    sampler = mixed.sampler(seed=0)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        assert sorted(sampler) == list(range(290))


@pytest.fixture()
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each record batch is read, checked and decoded."""
    calls: Counter[str] = Counter()
    plain = cf.Cache._read_record_batch

    def read(self: cf.Cache, shard: int, index: int, *streams: object):
        calls[f"{self.path}/{shard}/{index}"] += 1
        return plain(self, shard, index, *streams)

    monkeypatch.setattr(cf.Cache, "_read_record_batch", read)
    return calls


@pytest.mark.parametrize("batch_size", [1, 8])
def test_no_record_batch_is_decoded_twice_in_a_pass(caches: list[Path], decoded: Counter[str], batch_size: int):
    mixed = dataset(caches, [0.5, 0.5])
    sampler = mixed.sampler(seed=3)
    loader = DataLoader(mixed, batch_size=batch_size, sampler=sampler, collate_fn=list)
    passes = [3 * count / len(part) for count, part in zip(mixed.counts, mixed.parts, strict=True)]
    assert passes[1] > 5 and passes[0] % 1 and passes[1] % 1  # epochs end in the middle of passes
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for _ in loader:
            pass
    for path, done in zip(caches, passes, strict=True):
        of_it = [count for where, count in decoded.items() if where.startswith(f"{path}/")]
        assert len(of_it) == len(cf.open_cache(path).record_batches())
        assert max(of_it) <= math.ceil(done)  # less where the next pass finds some still there


def test_worker_processes_give_the_same_batches_in_the_same_order(caches: list[Path]):
    mixed = dataset(caches, [0.5, 0.5])
    sampler = mixed.sampler(seed=3)
    sampler.set_epoch(1)
    loaders = [DataLoader(mixed, 7, sampler=sampler, collate_fn=mixed.collate, num_workers=n) for n in (0, 2)]
    for one, other in zip(*loaders, strict=True):
        assert one.keys() == other.keys() and all(map(torch.equal, tensors(one), tensors(other)))


def tensors(batch: Batch) -> list[torch.Tensor]:
    values = [*batch.values(), *vars(batch["targets"]).values()]
    return [value for value in values if isinstance(value, torch.Tensor)]
