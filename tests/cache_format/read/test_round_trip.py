"""What is written comes back: values within the bound, bytes always the same."""

from __future__ import annotations

import pickle
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cache_format as cf
from cache_format.read.shard_reader import ShardReader
from cache_samples import contents, sample_metadata, sample_row, several_samples, write_sample


def assert_same_row(found: cf.CacheRow, written: cf.CacheRow, metadata: cf.CacheMetadata) -> None:
    assert found.row == written.row
    for name in ("input_ids", "loss_mask", "segment_lengths"):
        np.testing.assert_array_equal(getattr(found, name), getattr(written, name), name)
    assert (found.labels is None) == (written.labels is None)
    if written.labels is not None:
        np.testing.assert_array_equal(found.labels, written.labels)
    for name in ("counts", "ids", "exact_counts"):
        np.testing.assert_array_equal(getattr(found.targets, name), getattr(written.targets, name), name)
    assert (found.targets.sample_counts is None) == (written.targets.sample_counts is None)
    if written.targets.sample_counts is not None:
        np.testing.assert_array_equal(found.targets.sample_counts, written.targets.sample_counts)
    books = metadata.codebooks
    for name, column in (("logprobs", "target_logprobs"), ("residual_logprob",) * 2):
        roots = [np.exp(getattr(row.targets, name) / 2) for row in (found, written)]
        assert np.abs(roots[0] - roots[1]).max(initial=0) <= books[column].max_error + 1e-6, name
    roots = [np.sqrt(row.targets.entropy) for row in (found, written)]
    assert np.abs(roots[0] - roots[1]).max() <= books["entropy"].max_error + 1e-5


@pytest.mark.long
@settings(max_examples=25, deadline=None)
@given(
    first_seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    shard=st.integers(1, 5),
    batch=st.integers(1, 5),
    vocab=st.sampled_from([2, 300, 2**16, 2**16 + 1]),
    most=st.sampled_from([1, 9, 255, 256]),
    alignment=st.sampled_from(["next", "same"]),
    samples=st.sampled_from([1, 2, 5]),
)
def test_rows_come_back(first_seed, lengths, shard, batch, vocab, most, alignment, samples):
    metadata = sample_metadata(
        len(lengths),
        vocab_size=vocab,
        alignment=alignment,
        targets={"kind": "threshold", "max_entries": most, "temperature": 1.0, "samples": samples},
        rows_per_shard=shard,
        rows_per_record_batch=batch,
    )
    rows = []
    for index, tokens in enumerate(lengths):
        kind = {"most": min(most, 20), "alignment": alignment, "samples": samples}
        made = sample_row(first_seed + index, vocab=vocab, tokens=tokens, **kind)
        rows.append(cf.CacheRow(**{**vars(made), "row": index}))
    with tempfile.TemporaryDirectory() as path:
        with cf.CacheWriter(path, metadata) as writer:
            writer.write(rows)
        cache = cf.open_cache(path, cached_record_batches=2)
        for found, written in zip(cache, rows, strict=True):
            assert_same_row(found, written, metadata)
        assert cache.num_tokens == sum(lengths)
        assert cache.num_loss_tokens == sum(int(row.loss_mask.sum()) for row in rows)
        assert cf.verify_cache(path, deep=True).entries == sum(row.targets.num_entries for row in rows)


def test_narrow_types(tmp_path):
    write_sample(tmp_path / "narrow")
    wide = {"vocab_size": 2**16 + 1, "targets": {"kind": "top-k", "k": 256, "temperature": 1.0}}
    write_sample(tmp_path / "wide", **wide)
    for name, ids, counts in (("narrow", np.uint16, np.uint8), ("wide", np.uint32, np.uint16)):
        row = cf.open_cache(tmp_path / name)[0]
        assert row.input_ids.dtype == row.targets.ids.dtype == ids
        assert row.targets.counts.dtype == row.targets.exact_counts.dtype == counts
        assert row.targets.logprobs.dtype == row.targets.entropy.dtype == np.float32


def test_rows_are_views_that_cannot_be_written(tmp_path):
    write_sample(tmp_path / "cache")
    cache = cf.open_cache(tmp_path / "cache")
    first, again = cache[0].targets, cache[0].targets
    for name in ("ids", "logprobs", "counts", "residual_logprob"):
        assert np.shares_memory(getattr(first, name), getattr(again, name))
        assert not getattr(first, name).flags.writeable


def test_looking_rows_up(tmp_path):
    write_sample(tmp_path / "cache")
    cache = cf.open_cache(tmp_path / "cache", cached_record_batches=1)
    assert len(cache) == cache.num_rows == 10
    assert [row.row for row in cache.rows([7, 0, 7, -1, np.int64(3)])] == [7, 0, 7, 9, 3]
    assert [row.row for row in cache[2:5]] == [2, 3, 4]
    assert [row.row for row in cache.iter_rows()] == list(range(10))
    assert cache[-10].row == 0
    for outside in (10, -11):
        with pytest.raises(IndexError):
            cache[outside]
    assert cache.record_batches() == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]


def test_each_record_batch_is_decoded_once(tmp_path, monkeypatch):
    write_sample(tmp_path / "cache")
    cache = cf.open_cache(tmp_path / "cache", cached_record_batches=1)
    decoded = []
    read = ShardReader.record_batch

    def counting(shard, index, *streams):
        decoded.append(shard.sidecar.record_batches[index].first_row)
        return read(shard, index, *streams)

    monkeypatch.setattr(ShardReader, "record_batch", counting)
    cache.rows([0, 9, 1, 8, 0, 4])
    assert decoded == [0, 4, 8]


def test_pickles_and_threads_share_a_cache(tmp_path):
    metadata = write_sample(tmp_path / "cache")
    cache = cf.open_cache(tmp_path / "cache", cached_record_batches=2)
    cache[3]
    again = pickle.loads(pickle.dumps(cache))
    assert again.metadata.to_json() == metadata.to_json()
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(again.__getitem__, list(range(10)) * 20))
    assert [row.row for row in rows] == list(range(10)) * 20


def test_bytes_do_not_depend_on_the_calls(tmp_path):
    rows = [sample_row(row) for row in range(10)]
    for name, sizes in {"once": [10], "singly": [1] * 10, "uneven": [3, 0, 6, 1]}.items():
        with cf.CacheWriter(tmp_path / name, sample_metadata()) as writer:
            for size in sizes:
                writer.write(rows[writer.next_row : writer.next_row + size])
    assert contents(tmp_path / "once") == contents(tmp_path / "singly")
    assert contents(tmp_path / "once") == contents(tmp_path / "uneven")


def test_column_bytes_account_for_the_shards(tmp_path):
    write_sample(tmp_path / "cache", rows=200, rows_per_shard=100, rows_per_record_batch=50)
    cache = cf.open_cache(tmp_path / "cache")
    columns = cache.column_bytes()
    assert columns["target_ids"] > columns["target_logprobs"] > columns["segment_lengths"] > 0
    # What is left is framing: 2 files x (schema, three dictionaries, footer) and 4 messages.
    assert 0 < cache.manifest.shard_bytes - sum(columns.values()) < 2 * 8_000 + 4 * 2_000


@pytest.mark.parametrize("most, dtype", [(9, np.uint8), (300, np.uint16)])
def test_several_samples_of_the_tail_come_back(tmp_path, most, dtype):
    metadata = write_sample(tmp_path / "cache", **several_samples(3, most))
    assert metadata.num_samples == 3 and metadata.sampled
    cache = cf.open_cache(tmp_path / "cache")
    assert cache.metadata.to_json() == metadata.to_json()
    for row in cache.iter_rows():
        written = sample_row(row.row, samples=3)
        assert_same_row(row, written, metadata)
        counts = row.targets.sample_counts
        assert counts.dtype == dtype and counts.shape == (7, 3) and row.targets.num_samples == 3
        assert not counts.flags.writeable
        for index in range(3):
            alone = row.targets.sample(index)
            np.testing.assert_array_equal(alone.ids, written.targets.sample(index).ids)
    assert "sample_counts" in cache.column_bytes()
    assert cf.verify_cache(tmp_path / "cache", deep=True).rows == 10


def test_one_sample_needs_no_column(tmp_path):
    targets = {"kind": "threshold", "k": 1, "temperature": 1.0, "samples": 1, "max_entries": 9}
    metadata = write_sample(tmp_path / "cache", targets=targets)
    assert metadata.num_samples == 1 and metadata.sampled
    cache = cf.open_cache(tmp_path / "cache")
    assert cache[0].targets.sample_counts is None and "sample_counts" not in cache.column_bytes()
    assert not sample_metadata().sampled and sample_metadata().num_samples == 1
