"""Lies about the samples of a tail: how many there are, and which entries are in which."""

from __future__ import annotations

import shutil

import pyarrow as pa
import pytest

import cache_format as cf
from cache_samples import complaint, forge_shard, seal_manifest, several_samples, write_sample
from forging import damaged, put, relist, swap_ids


@pytest.fixture(scope="module")
def original_with_samples(tmp_path_factory):
    path = tmp_path_factory.mktemp("samples") / "cache"
    write_sample(path, **several_samples())
    return path


def shift_sample_offsets(columns):
    column = columns["sample_counts"]
    offsets = column.offsets.to_numpy().copy()
    offsets[1] -= 1
    columns["sample_counts"] = relist(column, column.values, pa.array(offsets))


def half_of_the_samples(columns):
    column = columns["sample_counts"]
    columns["sample_counts"] = relist(column, column.values, pa.array(column.offsets.to_numpy() // 3))


SAMPLE_LIES = {
    "count": (put("sample_counts", 0, 9), "row 0, position 0: sample counts that do not add up"),
    "count that would wrap": (put("sample_counts", 1, 255), "sample counts that do not add up"),
    "exact count": (put("exact_counts", 0, 0), "sample counts that do not add up"),
    "offsets": (shift_sample_offsets, "sample_counts has not 3 numbers for each of input_ids"),
    "length": (half_of_the_samples, "sample_counts has not 3 numbers for each of input_ids"),
    "descending ids": (swap_ids, "expected ascending ids"),
    "no samples": (lambda c: c.update(hidden_samples=c.pop("sample_counts")), "columns are not those"),
    "type": (lambda c: c.update(sample_counts=c["row"]), "columns are not those"),
}


@pytest.mark.parametrize("name", SAMPLE_LIES)
def test_lying_sample_counts(original_with_samples, tmp_path, name):
    path = shutil.copytree(original_with_samples, tmp_path / "cache")
    change, expected = SAMPLE_LIES[name]
    forge_shard(path, change)
    message = complaint(path, cf.CorruptShardError)
    assert expected in message and "shard-00000.arrow" in message


@pytest.mark.parametrize(
    "samples, expected",
    [
        (2, "sample_counts has not 2 numbers"),
        (4, "sample_counts has not 4 numbers"),
        (1, "columns are not those"),
        (None, "columns are not those"),
        (256, "targets.samples is 256, expected a whole number, 1 to 255"),
        (-1, "targets.samples is -1, expected"),
        (10**30, "targets.samples is 1000000"),
        ("three", "targets.samples is 'three', expected"),
        ([3], "targets.samples is [3], expected"),
        (float("nan"), "NaN is not JSON"),
        (2.0, "targets.samples is 2.0, expected"),
        (True, "targets.samples is True, expected"),
    ],
)
def test_lying_number_of_samples(original_with_samples, tmp_path, samples, expected):
    path = shutil.copytree(original_with_samples, tmp_path / "cache")
    seal_manifest(path, lambda m: m["targets"].update(samples=samples))
    assert expected in complaint(path)


@pytest.mark.long
def test_random_damage_to_sample_counts_never_crashes(original_with_samples, tmp_path):
    path = shutil.copytree(original_with_samples, tmp_path / "cache")
    outcomes = set()
    for _ in damaged(path, "record batch"):
        try:
            row = cf.open_cache(path)[0]
            for index in range(3):
                row.targets.sample(index)
            row.targets.merged()
            outcomes.add("rows")
        except cf.CacheError:
            outcomes.add("error")
    assert outcomes == {"rows", "error"}
