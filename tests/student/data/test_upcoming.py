"""A loader's worker decodes ahead what it will be asked for, in every kind of loader, and reads the same rows."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

import cache_format as cf
from pipeline.student.data import upcoming
from pipeline.student.data.dataset import WINDOW, CacheDataset
from pipeline.student.data.mixed_dataset import MixedDataset
from pipeline.student.data.upcoming import Upcoming
from runs import build_cache
from tiny import english


@pytest.fixture(scope="module")
def cache(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upcoming")
    (folder / "text.txt").write_text(english(80))
    return build_cache(folder / "cache", teacher_dir, folder / "text.txt", rows_per_shard=1)


def datasets(path: Path, kind: str) -> CacheDataset | MixedDataset:
    parts = [CacheDataset(cf.open_cache(path, cached_record_batches=WINDOW + 1)) for _ in range(1 + (kind == "mixed"))]
    return parts[0] if kind == "one" else MixedDataset(parts, [40, 20])


@pytest.mark.long
@pytest.mark.parametrize("kind", ["one", "mixed"])
@pytest.mark.parametrize(("workers", "skipped"), [(1, 0), (2, 0), (2, 3)])
def test_every_row_is_the_expected_one(
    cache: Path, kind: str, workers: int, skipped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upcoming, "get_worker_info", lambda: SimpleNamespace(num_workers=workers))
    for worker in range(workers):
        dataset = datasets(cache, kind)
        sampler = dataset.sampler(seed=1)
        sampler.set_epoch(2)
        batches = BatchSampler(sampler, 4, drop_last=False)
        dataset.upcoming = Upcoming(batches)
        plain = datasets(cache, kind)
        for batch in itertools.islice(batches, skipped + worker, None, workers):
            found, expected = dataset.__getitems__(batch), plain.__getitems__(batch)
            assert [row.row for row in found] == [row.row for row in expected]
        caches = [dataset.cache] if isinstance(dataset, CacheDataset) else [part.cache for part in dataset.parts]
        assert all(each._ahead is not None for each in caches)  # to the last row


def test_an_order_that_is_not_the_announced_one_is_read_all_the_same(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upcoming, "get_worker_info", lambda: SimpleNamespace(num_workers=1))
    dataset = datasets(cache, "one")
    dataset.upcoming = Upcoming([[1, 2], [3, 4]])
    assert [row.row for row in dataset.__getitems__([1, 2])] == [1, 2]
    assert [row.row for row in dataset.__getitems__([0, 4])] == [0, 4]
    assert dataset.cache._ahead is None


def test_only_in_a_worker(cache: Path) -> None:
    dataset = datasets(cache, "one")
    dataset.upcoming = Upcoming([[1, 2]])
    dataset.__getitems__([1, 2])
    assert dataset.cache._ahead is None


def test_a_loader_gives_the_same_batches_with_a_worker(cache: Path) -> None:
    batches = []
    for workers in (0, 1):
        dataset = datasets(cache, "one")
        sampler = BatchSampler(dataset.sampler(seed=1), 4, drop_last=False)
        dataset.upcoming = Upcoming(sampler)
        loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate, num_workers=workers)
        batches.append([(batch["input_ids"], batch["targets"].rectangular().ids) for batch in loader])
    for ours, theirs in zip(*batches, strict=True):
        assert all(map(torch.equal, ours, theirs))
