"""Writing: what is refused, what survives an interruption, and that resuming changes no byte."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import cache_format as cf
from cache_samples import SHARD, contents, sample_metadata, sample_row, several_samples, write_sample


class Killed(Exception):
    pass


def write_until(path, metadata, stop: int, *, resume: bool = False) -> int:
    """Write up to row `stop`, then die. Returns where the writer started."""
    with pytest.raises(Killed), cf.CacheWriter(path, metadata, resume=resume) as writer:
        first = writer.next_row
        writer.write([sample_row(row) for row in range(first, stop)])
        raise Killed
    return first


@pytest.mark.parametrize("stops", [[0], [3], [4], [5, 6, 9], [10]])
def test_interrupted_and_resumed_gives_the_same_bytes(tmp_path, stops):
    metadata = sample_metadata()
    with cf.CacheWriter(tmp_path / "whole", metadata) as writer:
        writer.write([sample_row(row) for row in range(10)])
    for attempt, stop in enumerate(stops):
        first = write_until(tmp_path / "cache", metadata, stop, resume=attempt > 0)
        assert first == (0 if attempt == 0 else stops[attempt - 1] // 4 * 4)
        assert not (tmp_path / "cache" / "manifest.json").exists()
        assert not list((tmp_path / "cache").rglob(".*"))
    with cf.CacheWriter(tmp_path / "cache", metadata, resume=True) as writer:
        writer.write([sample_row(row) for row in range(writer.next_row, 10)])
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_a_killed_process_leaves_nothing_in_the_way(tmp_path):
    metadata = sample_metadata()
    write_until(tmp_path / "cache", metadata, 6)
    (tmp_path / "cache/shards/.shard-00001.arrow.99.tmp").write_bytes(b"half a shard")
    (tmp_path / "cache/shards/shard-00001.arrow").write_bytes(b"a shard without its sidecar")
    (tmp_path / "cache/.manifest.json.99.tmp").write_bytes(b"half a manifest")
    with cf.CacheWriter(tmp_path / "cache", metadata, resume=True) as writer:
        assert writer.next_row == 4
        writer.write([sample_row(row) for row in range(4, 10)])
    assert cf.verify_cache(tmp_path / "cache", deep=True).rows == 10
    assert not [file for file in contents(tmp_path / "cache") if file.endswith(".tmp")]


@pytest.mark.parametrize("lost", ["shards/shard-00001.arrow", "shards/shard-00001.json"])
def test_only_a_lost_shard_is_written_again(tmp_path, lost):
    metadata = write_sample(tmp_path / "cache")
    before = contents(tmp_path / "cache")
    (tmp_path / "cache" / lost).unlink()
    files = {"tokenizer.json": b"{}"}
    with cf.CacheWriter(tmp_path / "cache", metadata, tokenizer_files=files, resume=True) as writer:
        assert writer.next_row == 4
        writer.write([sample_row(row) for row in range(10)])  # the other shards' rows are skipped
        assert writer.next_row == 10
        assert writer.tokens_written == 4 * 7
    assert contents(tmp_path / "cache") == before


def test_a_repair_that_is_interrupted_leaves_an_unfinished_cache(tmp_path):
    metadata = sample_metadata()
    with cf.CacheWriter(tmp_path / "cache", metadata) as writer:
        writer.write([sample_row(row) for row in range(10)])
    before = contents(tmp_path / "cache")
    (tmp_path / "cache" / SHARD).write_bytes(before[SHARD][:-1])  # cut short counts as lost
    assert write_until(tmp_path / "cache", metadata, 2, resume=True) == 0
    with pytest.raises(cf.FormatError, match="unfinished cache"):
        cf.open_cache(tmp_path / "cache")
    with cf.CacheWriter(tmp_path / "cache", metadata, resume=True) as writer:
        writer.write([sample_row(row) for row in range(4)])
    assert contents(tmp_path / "cache") == before


def test_an_abandoned_shard_starts_again(tmp_path):
    rows = [sample_row(row) for row in range(10)]
    with cf.CacheWriter(tmp_path / "cache", sample_metadata()) as writer:
        writer.annotate(batch_size=8)
        for reach, start in ((0, 0), (3, 0), (4, 4), (7, 4), (8, 8), (9, 8)):
            writer.write(rows[writer.next_row : reach])
            writer.abandon_shard()
            assert writer.next_row == start
        writer.annotate(batch_size=4)
        writer.write(rows[8:])
        assert writer.tokens_written == 10 * 7
    sidecars = sorted((tmp_path / "cache/shards").glob("*.json"))
    notes = [json.loads(sidecar.read_bytes())["annotations"] for sidecar in sidecars]
    assert notes == [{"batch_size": 8}, {"batch_size": 8}, {"batch_size": 4}]
    cache = cf.open_cache(tmp_path / "cache")
    assert writer.bytes_written == cache.manifest.shard_bytes
    assert cf.verify_cache(tmp_path / "cache", deep=True).rows == 10


def test_too_few_rows_make_no_cache_and_lose_nothing(tmp_path):
    with pytest.raises(cf.CacheError, match="up to 9, expected 10: 1 incomplete shard, so"):
        with cf.CacheWriter(tmp_path / "cache", sample_metadata()) as writer:
            writer.write([sample_row(row) for row in range(9)])
    with pytest.raises(cf.FormatError, match="unfinished cache with 2 complete shards"):
        cf.open_cache(tmp_path / "cache")


@pytest.mark.parametrize("resume", [False, True])
def test_foreign_directories_and_finished_caches_are_left_alone(tmp_path, resume):
    foreign, finished = tmp_path / "foreign", tmp_path / "finished"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    metadata = write_sample(finished)
    (tmp_path / "file").write_text("not a directory")
    before = contents(tmp_path)
    for path, complaint in (
        (foreign, "found 'thesis.tex', expected an empty directory"),
        (finished, "found a finished cache"),
        (tmp_path / "file", "found a file, expected a directory"),
    ):
        files = {"tokenizer.json": b"{}"}
        with pytest.raises(cf.CacheError, match=complaint):
            cf.CacheWriter(path, metadata, tokenizer_files=files, resume=resume)
    assert contents(tmp_path) == before


def test_an_unfinished_cache_is_not_overwritten_unasked(tmp_path):
    write_until(tmp_path / "cache", sample_metadata(), 6)
    before = contents(tmp_path)
    with pytest.raises(cf.CacheError, match="found an unfinished cache"):
        cf.CacheWriter(tmp_path / "cache", sample_metadata())
    assert contents(tmp_path) == before


def test_resuming_with_other_settings_lists_every_difference(tmp_path):
    write_until(tmp_path / "cache", sample_metadata(), 6)
    other = sample_metadata(teacher={"name": "other", "revision": None, "dtype": "float32"}, rows_per_shard=5)
    with pytest.raises(cf.MismatchError) as caught:
        cf.CacheWriter(tmp_path / "cache", other, resume=True)
    message = str(caught.value)
    assert 'teacher.name recorded "sample", given "other"' in message
    assert "rows_per_shard recorded 4, given 5" in message
    assert "dtype" not in message and "\n" not in message
    files = {"tokenizer.json": b"{}"}
    with pytest.raises(cf.MismatchError, match="tokenizer_files.tokenizer.json recorded null"):
        cf.CacheWriter(tmp_path / "cache", sample_metadata(), tokenizer_files=files, resume=True)


def change_targets(**changes):
    return lambda row: replace(row, targets=replace(row.targets, **changes))


def with_first(values: np.ndarray, value: float) -> np.ndarray:
    changed = values.copy()
    changed[0] = value
    return changed


BAD_ROWS = {
    "out of order": (lambda r: replace(r, row=3), "row 3 given, expected row 0 of 10"),
    "short mask": (lambda r: replace(r, loss_mask=r.loss_mask[1:]), "6 positions, expected 7"),
    "missing logprob": (
        lambda r: change_targets(logprobs=r.targets.logprobs[1:])(r),
        r"logprobs for \d+ ids",
    ),
    "missing entry": (
        lambda r: change_targets(logprobs=r.targets.logprobs[1:], ids=r.targets.ids[1:])(r),
        "row 0: counts add up to",
    ),
    "id of the padding": (
        lambda r: change_targets(ids=with_first(r.targets.ids, 1000))(r),
        "target id 1000, expected below 1000",
    ),
    "id that would wrap": (
        lambda r: replace(r, input_ids=with_first(r.input_ids, 2**16)),
        "position 0: input id outside the vocabulary of 1000",
    ),
    "negative id": (lambda r: replace(r, input_ids=with_first(r.input_ids, -1)), "outside"),
    "descending ids": (
        lambda r: change_targets(ids=r.targets.ids[::-1], exact_counts=np.zeros_like(r.targets.counts))(r),
        "expected ascending ids",
    ),
    "more exact than all": (
        lambda r: change_targets(exact_counts=r.targets.counts + 1)(r),
        "more exact entries than entries",
    ),
    "too many entries": (
        lambda r: change_targets(counts=with_first(r.targets.counts, 256))(r),
        "target count outside 0 to 9",
    ),
    "NaN": (
        lambda r: change_targets(logprobs=with_first(r.targets.logprobs, np.nan))(r),
        "row 0, position 0: target_logprobs nan",
    ),
    "positive logprob": (
        lambda r: change_targets(logprobs=with_first(r.targets.logprobs, 0.1))(r),
        "row 0, position 0: target_logprobs 0.1",
    ),
    "NaN residual": (
        lambda r: change_targets(residual_logprob=with_first(r.targets.residual_logprob, np.nan))(r),
        "residual_logprob nan",
    ),
    "negative entropy": (
        lambda r: change_targets(entropy=with_first(r.targets.entropy, -1))(r),
        "entropy -1.0",
    ),
    "segments too short": (
        lambda r: replace(r, segment_lengths=r.segment_lengths[:1]),
        r"segments cover \d tokens, expected 7",
    ),
    "empty segment": (
        lambda r: replace(r, segment_lengths=np.append(r.segment_lengths, 0)),
        "segment length 0",
    ),
    "mask taken at t": (
        lambda r: replace(r, loss_mask=np.ones(7, bool)),
        "loss_mask set at the end of a segment",
    ),
    "counted without targets": (
        lambda r: change_targets(counts=np.zeros(7, int), exact_counts=np.zeros(7, int), ids=[], logprobs=[])(r),
        "a loss token without targets",
    ),
    "labels": (lambda r: replace(r, labels=r.input_ids), "some rows have labels and some"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused(tmp_path, name):
    spoil, complaint = BAD_ROWS[name]
    with pytest.raises(ValueError, match=complaint):
        with cf.CacheWriter(tmp_path / "cache", sample_metadata()) as writer:
            writer.write([spoil(sample_row(0)), sample_row(1)])
    assert not (tmp_path / "cache" / SHARD).exists()


WRONG_NUMBER = "rows have different numbers of samples|do not go with 3 samples"
BAD_SAMPLES = {
    "none": (lambda s: None, WRONG_NUMBER),
    "too few of them": (lambda s: s[:, :2], WRONG_NUMBER),
    "too many of them": (lambda s: np.append(s, 0 * s[:, :1], axis=1), WRONG_NUMBER),
    "one number per position": (lambda s: s[:, 0], WRONG_NUMBER),
    "positions missing": (lambda s: s[1:], "row 0: sample_counts has 6 positions, expected 7"),
    "one too many": (lambda s: s + np.eye(7, 3, dtype=int), "position 0: sample counts that do not add up"),
    "one too few": (
        lambda s: np.where(np.arange(7)[:, None] == s.sum(axis=1).argmax(), 0, s),
        "sample counts that do not add up to the sampled entries",
    ),
    "negative": (lambda s: s + np.eye(7, 3, dtype=int) * 300 - np.eye(7, 3, 1, dtype=int) * 300, "a negative sample"),
    "not cut": (lambda s: np.eye(1, 3, dtype=int) * s.sum(axis=1, keepdims=True), "expected ascending ids"),
}


@pytest.mark.long
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_bad_samples_are_refused(tmp_path, name, both):
    """In one of two rows, where they may disagree with the other, or in both."""
    spoil, complaint = BAD_SAMPLES[name]
    metadata = sample_metadata(**several_samples())
    rows = [sample_row(0, samples=3), sample_row(1, samples=3)]
    with cf.CacheWriter(tmp_path / "good", sample_metadata(2, **several_samples())) as writer:
        writer.write(rows)
    for row in rows[: 1 + both]:
        object.__setattr__(row, "targets", replace(row.targets, sample_counts=spoil(row.targets.sample_counts)))
    with pytest.raises(ValueError, match=complaint):
        with cf.CacheWriter(tmp_path / "cache", metadata) as writer:
            writer.write(rows)
    assert not (tmp_path / "cache" / SHARD).exists()


def test_sample_counts_without_several_samples_are_refused(tmp_path):
    for targets in (
        {"kind": "top-k", "k": 9, "temperature": 1.0},
        {"kind": "threshold", "max_entries": 9, "temperature": 1.0, "samples": 1},
    ):
        with pytest.raises(ValueError, match="sample counts do not go with 1 samples"):
            with cf.CacheWriter(tmp_path / targets["kind"], sample_metadata(targets=targets)) as writer:
                writer.write([sample_row(0, samples=3), sample_row(1, samples=3)])


def test_labels_are_checked_where_they_count(tmp_path):
    metadata = sample_metadata(alignment="same")
    row = sample_row(0, alignment="same")
    labels = np.where(row.loss_mask, row.labels, -100)
    with cf.CacheWriter(tmp_path / "good", sample_metadata(1, alignment="same")) as writer:
        writer.write([replace(row, labels=labels)])
    with pytest.raises(ValueError, match="label outside the vocabulary"):
        with cf.CacheWriter(tmp_path / "bad", metadata) as writer:
            writer.write([replace(row, labels=np.full(7, 1000)), sample_row(1, alignment="same")])
    with pytest.raises(ValueError, match="labels do not go with alignment same"):
        with cf.CacheWriter(tmp_path / "none", metadata) as writer:
            writer.write([sample_row(0), sample_row(1)])


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"corpus": {}}, "no key 'corpus.rows'"),
        ({"corpus": {"rows": 0}}, "rows is 0, expected a whole number from 1 on"),
        ({"alignment": "previous"}, "alignment is 'previous'"),
        ({"vocab_size": 1}, "vocab_size is 1"),
        ({"targets": {"kind": "top-k", "k": 2**16, "temperature": 1.0}}, "k is 65536, expected"),
        ({"targets": {"kind": "top-k", "temperature": 1.0}}, "no key 'targets.max_entries'"),
        ({"targets": {"kind": "top-p", "temperature": 1.0, "max_entries": 0}}, "max_entries is 0, expected 1 to 65535"),
        (several_samples(256), "samples is 256, expected a whole number, 1 to 255"),
        (several_samples(-1), "samples is -1, expected a whole number, 1 to 255"),
        ({"compression": {"codec": "gzip", "level": 9}}, "codec is 'gzip', expected zstd"),
        ({"rows_per_shard": 0}, "rows_per_shard is 0, expected"),
    ],
)
def test_bad_metadata_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        sample_metadata(**changes)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../b", "a\\b", "C:x", "", "a//b", "."])
def test_tokenizer_files_cannot_climb_out(tmp_path, name):
    with pytest.raises(ValueError, match="not a plain relative path"):
        cf.CacheWriter(tmp_path / "cache", sample_metadata(), tokenizer_files={name: b""})
    assert not (tmp_path / "cache").exists()


def test_a_token_that_is_exact_and_sampled_is_refused(tmp_path):
    targets = {"kind": "threshold", "samples": 1, "max_entries": 9, "temperature": 1.0}
    row = sample_row(0, tokens=2, most=1)
    twice = cf.SparseTargets(
        counts=np.array([2, 0]),
        ids=np.array([5, 5]),
        logprobs=np.log([0.5, 0.25]).astype(np.float32),
        exact_counts=np.array([1, 0]),
        residual_logprob=np.log([0.5, 1.0]).astype(np.float32),
        entropy=np.ones(2, np.float32),
    )
    mask, segments = np.array([True, False]), np.array([2])
    row = replace(row, targets=twice, loss_mask=mask, segment_lengths=segments)
    with (
        pytest.raises(ValueError, match="row 0, position 0: target id 5 is both exact and sampled"),
        cf.CacheWriter(tmp_path / "cache", sample_metadata(1, targets=targets)) as writer,
    ):
        writer.write([row])
    apart = replace(row, targets=replace(twice, ids=np.array([5, 4])))
    with cf.CacheWriter(tmp_path / "other", sample_metadata(1, targets=targets)) as writer:
        writer.write([apart])
    cf.verify_cache(tmp_path / "other", deep=True)


def test_shards_begun_ahead(tmp_path):
    metadata = sample_metadata(10)
    with cf.CacheWriter(tmp_path / "cache", metadata) as writer:
        assert [writer.begin_shard(), writer.begin_shard()] == [0, 1]
        writer.write([sample_row(row) for row in range(6)])
        writer.abandon_shard()
        assert writer.next_row == 4
        assert [writer.begin_shard() for _ in range(3)] == [1, 2, None]
        writer.write([sample_row(row) for row in range(4, 10)])
    assert cf.verify_cache(tmp_path / "cache").rows == 10
