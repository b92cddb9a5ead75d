"""A cache is readable from anywhere: other tools, other places, and without our dependencies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid

import duckdb
import fsspec
import numpy as np
import polars
import pyarrow as pa
import pytest

import cache_format as cf
from cache_samples import SHARD, contents, sample_metadata, sample_row, write_sample


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("readers") / "cache"
    write_sample(path)
    return path


@pytest.fixture(scope="module")
def expected(path):
    return cf.open_cache(path)[1].targets


def test_plain_pyarrow_as_the_card_says(path, expected, monkeypatch):
    """The five lines of the cache's own README, run as they stand."""
    card = (path / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(path)
    names: dict = {}
    exec(code.replace("[0].as_py()", "[1].as_py()"), names)  # row 1: exercises the alignment
    assert len(code.splitlines()) <= 7
    for position in range(len(expected.counts)):
        ids, logprobs = expected.at(position)
        np.testing.assert_array_equal(names["ids"][position], ids)
        np.testing.assert_array_equal(names["logprobs"][position].astype(np.float32), logprobs)


def test_duckdb(path, expected):
    table = pa.ipc.open_file(pa.memory_map(str(path / SHARD))).read_all()
    query = "select target_logprobs, target_ids from table where row = 1"
    connection = duckdb.connect()
    connection.register("table", table)
    ((logprobs, ids),) = connection.execute(query.replace("table", '"table"')).fetchall()
    assert ids == list(expected.ids)
    np.testing.assert_array_equal(np.array(logprobs, np.float32), expected.logprobs)


def test_polars(path, expected):
    frame = polars.read_ipc(path / SHARD)
    row = frame.row(1, named=True)
    assert frame.schema["target_logprobs"] == polars.List(polars.Float32)
    assert row["target_ids"] == list(expected.ids)
    np.testing.assert_array_equal(np.float32(row["target_logprobs"]), expected.logprobs)


def test_datasets(path, expected, tmp_path):
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("arrow", data_files=str(path / SHARD), split="train", cache_dir=str(tmp_path))
    np.testing.assert_array_equal(np.float32(loaded[1]["target_logprobs"]), expected.logprobs)


def test_fsspec_urls(path, tmp_path):
    """Written to, resumed on and read from a file system without rename and without memory maps."""
    url = f"memory://{uuid.uuid4().hex}/cache"
    files = {"tokenizer.json": b"{}"}
    metadata = sample_metadata()
    with pytest.raises(KeyboardInterrupt):
        with cf.CacheWriter(url, metadata, tokenizer_files=files) as writer:
            writer.write([sample_row(row) for row in range(6)])
            raise KeyboardInterrupt
    with pytest.raises(cf.FormatError, match="unfinished cache with 1 complete shards"):
        cf.open_cache(url)
    with cf.CacheWriter(url, metadata, tokenizer_files=files, resume=True) as writer:
        assert writer.next_row == 4
        writer.write([sample_row(row) for row in range(4, 10)])
    fsspec.filesystem("memory").get(url, str(tmp_path / "copy"), recursive=True)
    assert contents(tmp_path / "copy") == contents(path)
    assert cf.verify_cache(url, deep=True) == cf.verify_cache(path)
    assert cf.open_cache(path.as_uri())[7].row == 7
    fsspec.filesystem("memory").rm_file(f"{url}/{SHARD}")
    with pytest.raises(cf.CorruptShardError, match=f"{url}/{SHARD}: cannot be read"):
        cf.verify_cache(url, deep=True)


def test_verify_reports_its_progress(path):
    seen = []
    summary = cf.verify_cache(path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 10), (4, 10), (6, 10), (8, 10), (10, 10)]
    cache = cf.open_cache(path)
    assert (summary.rows, summary.shards, summary.tokens) == (10, 3, 70)
    assert summary.counted_tokens == cache.num_loss_tokens
    assert summary.bytes == sum((path / shard.name).stat().st_size for shard in cache.manifest.shards)


def test_opening_reads_the_manifest_only(path, tmp_path):
    (tmp_path / "manifest.json").write_bytes((path / "manifest.json").read_bytes())
    cache = cf.open_cache(tmp_path)
    assert (len(cache), cache.num_tokens) == (10, 70)
    assert cache.manifest.raw["teacher"]["name"] == cache.metadata.teacher["name"] == "sample"


def test_tokenizer_files_come_back_checked(path):
    assert cf.open_cache(path).tokenizer_files() == {"tokenizer.json": b"{}"}


def fresh(code: str) -> str:
    """What `code` prints in an interpreter of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return run.stdout


def test_importing_loads_only_the_errors():
    modules = set(fresh("import sys, cache_format; cache_format.CacheError; print(*sys.modules)").split())
    assert not modules & {"numpy", "pyarrow", "zstandard", "fsspec"}
    assert {name for name in modules if name.startswith("cache_format.")} == {"cache_format.cache_errors"}


@pytest.mark.long
def test_using_every_name_loads_nothing_but_the_storage_libraries():
    code = "import sys, cache_format as cf; [getattr(cf, name) for name in cf.__all__]; print(*sys.modules)"
    modules = set(fresh(code).split())
    assert "pyarrow" in modules
    assert not modules & {"torch", "transformers", "datasets", "pandas", "accelerate", "pipeline"}


def test_every_public_name_is_listed_and_exists():
    assert set(cf.__all__) <= set(dir(cf))
    assert set(cf._LAZY) <= set(cf.__all__)
    assert all(getattr(cf, name) is not None for name in cf.__all__)
    assert cf.open_cache is cf.open_cache
    with pytest.raises(AttributeError, match="no attribute 'open_cash'"):
        cf.open_cash  # noqa: B018


def test_public_names_of_a_cache(path):
    cache = cf.open_cache(path)
    row = cache[0]
    targets = row.targets
    assert (len(cache), cache.num_rows) == (cache.manifest.num_rows, cache.manifest.num_rows)
    assert cache.num_tokens == sum(len(each.input_ids) for each in cache)
    tokens, entries = len(row.input_ids), int(targets.counts.sum())
    assert len(row.loss_mask) == tokens and len(targets.ids) == entries
    for values in (targets.counts, targets.exact_counts, targets.residual_logprob, targets.entropy):
        assert values.shape == (tokens,)
    assert targets.logprobs.shape == (entries,) and targets.logprobs.dtype == "float32"


def test_the_errors_are_one_tree():
    for error in (cf.CorruptShardError, cf.FormatError, cf.MismatchError, cf.ClaimLostError):
        assert issubclass(error, cf.CacheError) and issubclass(error, cf.DistillError)


@pytest.mark.long
def test_a_forked_worker_reads_an_open_cache(path):
    """As a DataLoader worker does: the parent has mapped shards and decoded batches already."""
    code = """
import multiprocessing, sys
import cache_format as cf
cache = cf.open_cache(sys.argv[1], cached_record_batches=1)
cache[0]
with multiprocessing.get_context("fork").Pool(2) as pool:
    print([row.row for row in pool.map(cache.__getitem__, range(10))])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(run.stdout) == list(range(10))
