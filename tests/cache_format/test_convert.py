"""Conversions change what they are told to and nothing else: not the other numbers, not the source, not the bytes."""

from __future__ import annotations

import functools
import itertools
import json
import math
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cache_format as cf
from cache_format.lexicon import LEXICON
from cache_format.shard_reader import ShardReader
from cache_format.shard_writer import ShardWriter
from cache_samples import contents, sample_metadata
from packed_samples import (
    KINDS,
    THRESHOLD,
    TOP_K,
    assert_same_batch,
    draws_codebook,
    metadata_of,
    row_of,
    write_cache,
)


def convert(source: Path, output: Path, **changes: Any) -> cf.Cache:
    """Converted at once, and the source is what it was."""
    before = contents(source)
    rows = list(cf.convert_cache(source, output, cf.Conversion(**changes)))
    assert rows == [stop for _, stop in cf.open_cache(source).record_batches()]
    assert contents(source) == before
    cf.verify_cache(output, deep=True)
    return cf.open_cache(output)


def shards(path: Path) -> dict[str, bytes]:
    """The bytes of the Arrow files. Sidecars differ: they say which lexicon was used."""
    return {name: data for name, data in contents(path).items() if name.startswith("shards/") and "arrow" in name}


def assert_same_rows(found: cf.Cache, expected: cf.Cache) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        for name in ("input_ids", "loss_mask", "segment_lengths", "labels"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)
        for name in ("counts", "ids", "logprobs", "exact_counts", "residual_logprob", "entropy", "sample_counts"):
            np.testing.assert_array_equal(getattr(a.targets, name), getattr(b.targets, name), name)


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> dict[str, Path]:
    """One cache of each kind of targets, as columns. Do not write into them."""
    folder = tmp_path_factory.mktemp("caches")
    for kind, targets in KINDS.items():
        write_cache(folder / kind, metadata_of(targets))
    return {kind: folder / kind for kind in KINDS}


# -- the encoding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, alignment", [*((kind, "next") for kind in KINDS), ("top-k", "same")])
def test_packed_and_back_gives_the_same_bytes(tmp_path, kind, alignment):
    write_cache(tmp_path / "first", metadata_of(KINDS[kind], alignment=alignment))
    packed = convert(tmp_path / "first", tmp_path / "packed", encoding="packed")
    again = convert(tmp_path / "packed", tmp_path / "again", encoding="columns")
    assert packed.metadata.encoding == "packed" and again.metadata.encoding == "columns"
    assert shards(tmp_path / "again") == shards(tmp_path / "first")
    first = cf.open_cache(tmp_path / "first")
    for found, expected in zip(packed.iter_record_batches(), first.iter_record_batches(), strict=True):
        assert_same_batch(found, expected)
    assert not (tmp_path / "again" / LEXICON).exists()


@pytest.mark.parametrize("kind", ["top-k", "threshold, three samples"])
def test_converted_is_what_would_have_been_written(tmp_path, caches, kind):
    """The lexicon included, which is learned from decoded rows here and from given ones there."""
    write_cache(tmp_path / "written", metadata_of(KINDS[kind], encoding="packed"))
    convert(caches[kind], tmp_path / "converted", encoding="packed")
    written, converted = contents(tmp_path / "written"), contents(tmp_path / "converted")
    for name in written:
        if name not in ("manifest.json", "README.md"):
            assert written[name] == converted[name], name
    assert set(written) == set(converted)
    found, expected = (json.loads(files["manifest.json"]) for files in (converted, written))
    assert [key for key in expected if expected[key] != found[key]] == ["capture", "manifest_sha256"]


def test_nothing_named_changes_nothing(tmp_path, caches):
    converted = convert(caches["top-k"], tmp_path / "same")
    assert shards(tmp_path / "same") == shards(caches["top-k"])
    old, new = cf.open_cache(caches["top-k"]).metadata.to_json(), converted.metadata.to_json()
    assert new.pop("capture") == {"converted": [{}]} and old.pop("capture") == {}
    assert new == old


def test_every_conversion_is_recorded(tmp_path, caches):
    convert(caches["top-k"], tmp_path / "a", encoding="packed", top_k=5)
    found = convert(tmp_path / "a", tmp_path / "b", compression_level=1)
    assert found.metadata.capture["converted"] == [{"encoding": "packed", "top_k": 5}, {"compression_level": 1}]
    assert found.tokenizer_files() == {"tokenizer.json": b"{}"}
    assert found.metadata.encoding == "packed" and found.metadata.max_entries == 5


# -- shards and compression -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "encoding, per_shard, per_batch",
    [
        *[("columns", *geometry) for geometry in [(1, 1), (3, 2), (5, 3), (10, 10), (100, 4), (7, 100)]],
        *[("packed", *geometry) for geometry in [(3, 2), (7, 100)]],
    ],
)
def test_other_shards(tmp_path, caches, per_shard, per_batch, encoding):
    """As if they had been written like this, wherever the source's batches end; and back."""
    kind = "threshold, three samples"
    geometry = {"rows_per_shard": per_shard, "rows_per_record_batch": per_batch}
    write_cache(tmp_path / "written", metadata_of(KINDS[kind], encoding=encoding, **geometry))
    found = convert(caches[kind], tmp_path / "other", encoding=encoding, **geometry)
    assert shards(tmp_path / "other") == shards(tmp_path / "written")
    assert len(found.manifest.shards) == -(-10 // per_shard)
    convert(tmp_path / "other", tmp_path / "back", encoding="columns", rows_per_shard=4, rows_per_record_batch=2)
    assert shards(tmp_path / "back") == shards(caches[kind])


def test_other_compression(tmp_path):
    write_cache(tmp_path / "nine", metadata_of(TOP_K, rows=40, rows_per_shard=40, rows_per_record_batch=40), tokens=50)
    sizes = {}
    for level in (1, 22):
        found = convert(tmp_path / "nine", tmp_path / str(level), compression_level=level)
        assert found.metadata.compression == {"codec": "zstd", "level": level}
        assert_same_rows(found, cf.open_cache(tmp_path / "nine"))
        sizes[level] = found.manifest.shard_bytes
    assert sizes[22] < sizes[1]
    convert(tmp_path / "1", tmp_path / "again", compression_level=9)
    assert shards(tmp_path / "again") == shards(tmp_path / "nine")


# -- fewer exact entries ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, k", [("top-k", 1), ("top-k", 2), ("top-p", 5), ("top-k", 8)])
def test_dropped_entries_join_the_residual(tmp_path, kind, k):
    """Against a loop over positions of the source."""
    targets = TOP_K if kind == "top-k" else {"kind": "top-p", "top_p": 0.9, "temperature": 1.0, "max_entries": 9}
    write_cache(tmp_path / "source", metadata_of(targets))
    source, found = cf.open_cache(tmp_path / "source"), convert(tmp_path / "source", tmp_path / "fewer", top_k=k)
    assert found.metadata.targets == {**source.metadata.targets, "k": k, "max_entries": k}
    assert found.metadata.codebooks["target_logprobs"].values.tobytes() == (
        source.metadata.codebooks["target_logprobs"].values.tobytes()
    )
    book = found.metadata.codebooks["residual_logprob"]
    dropped = 0
    for row, old in zip(found, source, strict=True):
        for t in range(7):
            ids, logprobs = old.targets.at(t)
            likeliest = sorted(sorted(range(len(ids)), key=lambda i: (-logprobs[i], ids[i]))[:k])
            np.testing.assert_array_equal(row.targets.at(t)[0], ids[likeliest])
            np.testing.assert_array_equal(row.targets.at(t)[1], logprobs[likeliest])
            assert row.targets.counts[t] == row.targets.exact_counts[t] == len(likeliest)
            mass = np.exp(float(old.targets.residual_logprob[t]))
            mass += sum(np.exp(float(logprobs[i])) for i in range(len(ids)) if i not in likeliest)
            expected = book.decode(book.encode([np.log(min(mass, 1.0))]))[0] if mass else -np.inf
            assert row.targets.residual_logprob[t] == expected
            dropped += len(ids) - len(likeliest)
        np.testing.assert_array_equal(row.targets.entropy, old.targets.entropy)
        np.testing.assert_array_equal(row.loss_mask, old.loss_mask)
    assert dropped > 0


@pytest.mark.parametrize("k", [1, 4])
def test_dropping_is_like_having_kept_fewer_within_the_codebook(tmp_path, k):
    """Of rows as the teacher gave them, before any of it was quantised."""
    metadata = metadata_of(TOP_K)
    rows = [row_of(metadata, row) for row in range(10)]
    write_cache(tmp_path / "source", metadata)
    found = convert(tmp_path / "source", tmp_path / "fewer", top_k=k)
    entry_error = metadata.codebooks["target_logprobs"].max_error + 1e-6
    residual_error = metadata.codebooks["residual_logprob"].max_error + 1e-6
    for row, given in zip(found, rows, strict=True):
        for t in range(7):
            roots = np.sort(np.exp(given.targets.at(t)[1].astype(np.float64) / 2))[::-1]
            kept = np.sort(np.exp(row.targets.at(t)[1].astype(np.float64) / 2))[::-1]
            np.testing.assert_allclose(kept, roots[:k], atol=entry_error)
            # What a codebook of this error may add to a mass, for each entry that was dropped and for the residual.
            was = np.exp(given.targets.residual_logprob[t].astype(np.float64) / 2)
            slack = sum(2 * root * entry_error + entry_error**2 for root in roots[k:])
            slack += 2 * was * residual_error + residual_error**2
            mass = was**2 + (roots[k:] ** 2).sum()
            root = np.exp(row.targets.residual_logprob[t].astype(np.float64) / 2)
            low, high = np.sqrt(max(mass - slack, 0)) - residual_error, np.sqrt(mass + slack) + residual_error
            assert low <= root <= high


def test_nothing_is_dropped_where_there_are_not_more(tmp_path, caches):
    found = convert(caches["top-k"], tmp_path / "nine", top_k=9)
    assert shards(tmp_path / "nine") == shards(caches["top-k"])
    assert found.metadata.targets == {**TOP_K, "max_entries": 9}


def test_counts_become_as_narrow_as_they_can(tmp_path):
    write_cache(tmp_path / "many", metadata_of({**TOP_K, "k": 300}, rows=4), most=300)
    found = convert(tmp_path / "many", tmp_path / "few", top_k=255, encoding="packed")
    assert cf.open_cache(tmp_path / "many")[0].targets.counts.dtype == np.uint16
    assert found[0].targets.counts.dtype == np.uint8
    assert max(row.targets.counts.max() for row in found) == 255


# -- fewer samples ----------------------------------------------------------------------------------------------------


def with_equal_weights(row: cf.CacheRow, samples: int, threshold: float = 0.4) -> cf.CacheRow:
    """As a teacher with this threshold gives them: every sampled weight is τ/M."""
    targets = row.targets
    rank = np.arange(len(targets.ids)) - np.repeat(targets.offsets[:-1], targets.counts)
    sampled = rank >= np.repeat(targets.exact_counts, targets.counts)
    weight = np.float32(np.log(threshold / samples))
    return replace(
        row,
        loss_mask=row.loss_mask & (targets.exact_counts > 0),  # so that each sample alone has an entry
        targets=replace(targets, logprobs=np.where(sampled, weight, targets.logprobs)),
    )


@pytest.fixture(scope="module")
def three_samples(tmp_path_factory) -> Path:
    """Threshold targets with the codebook that they are captured with."""
    path = tmp_path_factory.mktemp("three") / "cache"
    book = cf.weight_codebook(64, 0.4 / 3)
    books = {**cf.default_codebooks(1000), "target_logprobs": book}
    metadata = sample_metadata(targets={**THRESHOLD, "samples": 3}, codebooks=books)
    with cf.CacheWriter(path, metadata) as writer:
        writer.write([with_equal_weights(row_of(metadata, row), 3) for row in range(10)])
    return path


@pytest.mark.parametrize("encoding", ["columns", "packed"])
@pytest.mark.parametrize("samples", [1, 2])
def test_the_first_samples_are_kept_as_one_estimate(tmp_path, three_samples, samples, encoding):
    source = cf.open_cache(three_samples)
    found = convert(three_samples, tmp_path / "fewer", samples=samples, encoding=encoding)
    assert found.metadata.num_samples == samples and found.metadata.sampled
    book = found.metadata.codebooks["target_logprobs"]
    before = source.metadata.codebooks["target_logprobs"].values
    np.testing.assert_array_equal(book.values, np.union1d(before, np.float32(np.log(0.4 / samples))))
    for row, old in zip(found, source, strict=True):
        np.testing.assert_array_equal(row.targets.exact_counts, old.targets.exact_counts)
        np.testing.assert_array_equal(row.targets.residual_logprob, old.targets.residual_logprob)
        assert (row.targets.sample_counts is None) == (samples == 1)
        for index in range(samples):
            mine, theirs = row.targets.sample(index), old.targets.sample(index)
            np.testing.assert_array_equal(mine.ids, theirs.ids)
            np.testing.assert_array_equal(mine.counts, theirs.counts)
        rank = np.arange(row.targets.num_entries) - np.repeat(row.targets.offsets[:-1], row.targets.counts)
        sampled = rank >= np.repeat(row.targets.exact_counts, row.targets.counts)
        assert (row.targets.logprobs[sampled] == np.float32(np.log(0.4 / samples))).all() and sampled.any()
        # The weights of each sample alone are what they were: τ.
        first = old.targets.sample(0)
        roots = [np.exp(each.logprobs.astype(np.float64) / 2) for each in (row.targets.sample(0), first)]
        np.testing.assert_allclose(*roots, atol=book.max_error + 1e-6)


@pytest.mark.parametrize("samples", [1, 2])
def test_weights_of_fewer_draws_are_exact(tmp_path, caches, samples):
    """n/N of M samples becomes n/N of fewer: every weight times 3/S, to float32 rounding."""
    source = cf.open_cache(caches["random, three samples"])
    found = convert(caches["random, three samples"], tmp_path / "fewer", samples=samples)
    for row, old in zip(found, source, strict=True):
        for index in range(samples):
            mine, theirs = row.targets.sample(index), old.targets.sample(index)
            np.testing.assert_array_equal(mine.ids, theirs.ids)
            np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-6)
    expected = draws_codebook(9, samples).values
    values = found.metadata.codebooks["target_logprobs"].values
    assert all(np.abs(values - value).min() < 1e-6 for value in expected)


def test_all_samples_are_as_many_as_there_were(tmp_path, three_samples, caches):
    for number, source in enumerate((three_samples, caches["random, three samples"])):
        convert(source, tmp_path / str(number), samples=3)
        assert shards(tmp_path / str(number)) == shards(source)
    convert(caches["threshold, one sample"], tmp_path / "one", samples=1)


ENUMERATIONS = {
    # Every way in which the samples can fall out, all equally likely: outcomes of one sample, as token -> weight of
    # that sample alone; exact entries; what the distribution is.
    "one draw": ([{5: 1.0}, {6: 1.0}, {7: 1.0}, {7: 1.0}], {}, {5: 0.25, 6: 0.25, 7: 0.5}),
    "two draws": (
        [{5: 1.0}, {5: 0.5, 6: 0.5}, {5: 0.5, 6: 0.5}, {6: 1.0}],
        {},
        {5: 0.5, 6: 0.5},
    ),
    "threshold .4": ([{5: 0.4}, {6: 0.4}, {6: 0.4}, {7: 0.4}], {2: 0.6}, {2: 0.6, 5: 0.1, 6: 0.2, 7: 0.1}),
}


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("name", ENUMERATIONS)
def test_fewer_samples_are_unbiased(tmp_path, name, samples):
    """Mean over all 64 ways in which three samples can fall out: exactly the distribution."""
    outcomes, exact, distribution = ENUMERATIONS[name]
    ways = list(itertools.product(outcomes, repeat=3))
    entries, weights, counts, sample_counts = [], [], [], []
    for way in ways:
        entries += [*exact, *(token for sample in way for token in sample)]
        weights += [*exact.values(), *(weight / 3 for sample in way for weight in sample.values())]
        sample_counts.append([len(sample) for sample in way])
        counts.append(len(exact) + sum(sample_counts[-1]))
    targets = cf.SparseTargets(
        counts=np.array([*counts, 0]),
        ids=np.array(entries),
        logprobs=np.log(weights).astype(np.float32),
        exact_counts=np.array([*[len(exact)] * 64, 0]),
        residual_logprob=np.log(np.array([*[1 - sum(exact.values())] * 64, 1.0])).astype(np.float32),
        entropy=np.zeros(65, np.float32),
        sample_counts=np.array([*sample_counts, [0, 0, 0]]),
    )
    row = cf.CacheRow(
        row=0,
        input_ids=np.arange(65),
        loss_mask=np.arange(65) < 64,
        segment_lengths=np.array([65]),
        targets=targets,
    )
    if exact:
        kind: dict[str, Any] = {**THRESHOLD, "samples": 3}
        book = cf.weight_codebook(256, 0.4 / 3)
    else:
        kind = {"kind": "random", "draws": 2, "samples": 3, "temperature": 1.0, "seed": 0, "max_entries": 9}
        book = draws_codebook(2, 3)
    metadata = sample_metadata(1, targets=kind, codebooks={**cf.default_codebooks(1000), "target_logprobs": book})
    with cf.CacheWriter(tmp_path / "source", metadata) as writer:
        writer.write([row])
    tolerance = {2: 0.01}  # the codebook holds the weights exactly, and .6 nearly
    found = convert(tmp_path / "source", tmp_path / "fewer", samples=samples)[0].targets
    total = np.zeros(8)
    for t in range(64):
        ids, logprobs = found.at(t)
        np.add.at(total, ids, np.exp(logprobs.astype(np.float64)))
    for token in range(8):
        expected = distribution.get(token, 0.0)
        assert total[token] / 64 == pytest.approx(expected, abs=tolerance.get(token, 1e-6)), token


# -- other codebooks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [38, 64, 256])
@pytest.mark.parametrize("kind", ["top-k", "threshold"])
def test_other_levels(tmp_path, caches, three_samples, kind, levels):
    source = cf.open_cache(caches["top-k"] if kind == "top-k" else three_samples)
    found = convert(Path(source.path), tmp_path / "other", levels=levels)
    book = found.metadata.codebooks["target_logprobs"]
    weight = np.float32(np.log(0.4 / 3))
    expected = cf.sqrt_probability_codebook(levels) if kind == "top-k" else cf.weight_codebook(levels, 0.4 / 3)
    np.testing.assert_array_equal(book.values, expected.values)
    for name in ("residual_logprob", "entropy"):
        assert found.metadata.codebooks[name].to_json() == source.metadata.codebooks[name].to_json()
    for row, old in zip(found, source, strict=True):
        np.testing.assert_array_equal(row.targets.ids, old.targets.ids)
        np.testing.assert_array_equal(row.targets.residual_logprob, old.targets.residual_logprob)
        roots = [np.exp(each.targets.logprobs.astype(np.float64) / 2) for each in (row, old)]
        np.testing.assert_allclose(*roots, atol=book.max_error + 1e-6)
        if kind == "threshold":
            sampled = old.targets.logprobs == weight
            assert sampled.any() and (row.targets.logprobs[sampled] == weight).all()


def test_levels_and_samples_together(tmp_path, three_samples):
    found = convert(three_samples, tmp_path / "both", levels=128, samples=2)
    book = found.metadata.codebooks["target_logprobs"]
    np.testing.assert_array_equal(book.values, cf.weight_codebook(128, 0.2).values)
    assert np.float32(np.log(0.2)) in found[0].targets.logprobs


# -- larger thresholds ------------------------------------------------------------------------------------------------

EXACT = {1: 0.55, 2: 0.2, 3: 0.12}  # p, above τ = .1
TAIL = [{5: 0.1, 9: 0.1}, {4: 0.1}, {5: 0.1, 7: 0.1}]  # what three samples of the other .13 can be
POSITIONS = 8_000
SIGMAS = 6.5  # one false alarm in ten thousand million values compared


@pytest.fixture(scope="module", params=[1, 3])
def repeated(request, tmp_path_factory) -> Path:
    """The same position over and over, τ = .1, in rows of 500, with one sample or three."""
    samples, length = request.param, 500
    path = tmp_path_factory.mktemp("repeated") / "cache"
    drawn = [token for sample in TAIL[:samples] for token in sample]
    count = len(EXACT) + len(drawn)
    weights = [*EXACT.values(), *[0.1 / samples] * len(drawn)]
    book = functools.reduce(lambda book, weight: book.including(math.log(weight)), weights, cf.weight_codebook(64, 0.1))
    books = {**cf.default_codebooks(1000), "target_logprobs": book}
    metadata = sample_metadata(
        POSITIONS // length,
        targets={**THRESHOLD, "tail_threshold": 0.1, "samples": samples, "max_entries": 40},
        codebooks=books,
        rows_per_record_batch=3,
        rows_per_shard=20,
    )
    targets = cf.SparseTargets(
        counts=np.full(length, count),
        ids=np.tile([*EXACT, *drawn], length),
        logprobs=np.tile(np.log(weights), length).astype(np.float32),
        exact_counts=np.full(length, len(EXACT)),
        residual_logprob=np.full(length, np.log(0.13), np.float32),
        entropy=np.zeros(length, np.float32),
        sample_counts=np.tile([len(sample) for sample in TAIL], (length, 1)) if samples > 1 else None,
    )
    with cf.CacheWriter(path, metadata) as writer:
        for row in range(POSITIONS // length):
            writer.write(
                [
                    cf.CacheRow(
                        row=row,
                        input_ids=np.arange(length),
                        loss_mask=np.ones(length, bool) & (np.arange(length) < length - 1),
                        segment_lengths=np.array([length]),
                        targets=targets,
                    )
                ]
            )
    return path


def weights_of(cache: cf.Cache, sample: int) -> np.ndarray:
    """[N, 10] of token ids, what one sample alone says."""
    found = np.zeros((POSITIONS, 10))
    start = 0
    for row in cache:
        alone = row.targets.sample(sample)
        position = start + np.repeat(np.arange(len(alone.counts)), alone.counts)
        np.add.at(found, (position, alone.ids), np.exp(alone.logprobs.astype(np.float64)))
        start += len(alone.counts)
    return found


@pytest.mark.parametrize("steps", [[0.3], [0.15, 0.3], [1.0]], ids=str)
def test_a_larger_threshold_is_unbiased(tmp_path, repeated, steps):
    """At once, in two steps, and up to one entry besides the most likely one."""
    found = cf.open_cache(repeated)
    for number, threshold in enumerate(steps):
        found = convert(Path(found.path), tmp_path / str(number), tail_threshold=threshold)
    threshold, samples = steps[-1], found.metadata.num_samples
    assert found.metadata.targets["tail_threshold"] == threshold and not found.metadata.rounded_once
    for index in range(samples):
        weights = weights_of(found, index)
        expected = np.zeros(10)
        for token, weight in (EXACT | TAIL[index]).items():
            expected[token] = weight
        variance = expected * (threshold - expected)
        variance[1] = 0  # the most likely token stays exact
        # A codebook value stands for an exact one, and in the second step for one that was rounded before.
        rounded = 0.02 * (expected > 0.1)
        error = np.abs(weights.mean(axis=0) - expected)
        assert (error <= rounded + SIGMAS * np.sqrt(variance.clip(0) / POSITIONS) + 1e-6).all(), (error, expected)
        assert not weights[:, expected == 0].any()
        drawn = (weights[:, 2:] > 0).sum(axis=1)
        mean = expected[2:].sum() / threshold
        if len(steps) == 1:  # systematic: as many as expected, rounded up or down
            assert set(np.unique(drawn)) <= {np.floor(mean), np.ceil(mean)}
        assert np.allclose(weights[:, 2:][weights[:, 2:] > 0], threshold, rtol=1e-6)
    residual = np.exp(np.float64(found[0].targets.residual_logprob))
    assert np.allclose(residual, 0.45, atol=0.02 * len(steps)) and (found[0].targets.exact_counts == 1).all()


def test_thinned_samples_are_near_what_one_sample_of_all_would_be(tmp_path, repeated):
    """Points of several samples lie 1/M apart: what was exact varies less in their mean than in M samples apart."""
    found = convert(repeated, tmp_path / "thinned", tail_threshold=0.9)
    samples = found.metadata.num_samples
    together = sum(weights_of(found, index) for index in range(samples)) / samples
    apart = 0.2 * (0.9 - 0.2) / samples
    assert together[:, 2].var() < (1.1 if samples == 1 else 0.5) * apart


def test_a_larger_threshold_leaves_the_likely_ones_exact(tmp_path, three_samples):
    source, new = cf.open_cache(three_samples), 0.55
    found = convert(three_samples, tmp_path / "thinned", tail_threshold=new)
    assert found.metadata.targets == {**source.metadata.targets, "tail_threshold": new, "max_entries": 1 + 3 * 3}
    fewer = 0
    for row, old in zip(found, source, strict=True):
        for t in range(len(old.input_ids)):
            (ids, logprobs), (old_ids, old_logprobs) = row.targets.at(t), old.targets.at(t)
            n, m = int(row.targets.exact_counts[t]), int(old.targets.exact_counts[t])
            best = old_ids[:m][np.lexsort((old_ids[:m], -old_logprobs[:m]))[:1]]
            likely = np.union1d(old_ids[:m][np.exp(old_logprobs[:m].astype(np.float64)) >= new], best)
            np.testing.assert_array_equal(ids[:n], likely)
            assert set(ids[n:]) <= set(old_ids) - set(likely)
            assert np.allclose(logprobs[n:], np.log(new / 3))
            fewer += m - n
    assert fewer > 10


def test_a_thinned_cache_does_not_depend_on_batches(tmp_path, three_samples):
    source = three_samples
    one = convert(source, tmp_path / "one", tail_threshold=0.5)
    other = convert(source, tmp_path / "other", tail_threshold=0.5, rows_per_record_batch=3, rows_per_shard=7)
    assert_same_rows(one, other)
    again = convert(Path(convert(source, tmp_path / "copy").path), tmp_path / "again", tail_threshold=0.5)
    assert any((a.targets.num_entries != b.targets.num_entries) for a, b in zip(one, again, strict=True))


def test_targets_that_no_teacher_has_are_not_thinned(tmp_path, caches):
    """Positions without an exact entry could lose all that they have."""
    with pytest.raises(cf.CacheError, match=r"row 0, position \d+: no exact entry, expected at least one"):
        convert(caches["threshold, one sample"], tmp_path / "thinned", tail_threshold=0.6)


# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSALS = {
    "entries of a sample": ("threshold, one sample", {"top_k": 5}, "--top-k: threshold targets are unbiased only with"),
    "entries of draws": ("random, three samples", {"top_k": 5}, "--top-k: random targets are unbiased only with"),
    "more entries": ("top-k", {"top_k": 10}, "--top-k 10: found up to 9 entries per position"),
    "samples of none": ("top-k", {"samples": 1}, "--samples 1: top-k targets have none"),
    "more samples": ("threshold, three samples", {"samples": 4}, "--samples 4: found 3 per position"),
    "no samples": ("threshold, three samples", {"samples": 0}, "--samples 0: found 3 per position"),
    "two of one": ("random, one sample", {"samples": 2}, "--samples 2: found 1 per position"),
    "levels of draws": ("random, one sample", {"levels": 64}, "--levels: the codebook of random targets holds"),
    "too few levels": ("top-k", {"levels": 35}, "--levels 35: too few to reach down to probability 1e-12"),
    "too many levels": ("top-k", {"levels": 257}, "--levels 257: codebook sqrt-probability: "),
    "too few beside the weight": ("threshold, one sample", {"levels": 37}, "--levels 37: too few to reach down to"),
    "too many beside the weight": ("threshold, one sample", {"levels": 257}, "--levels 257: too many, expected up to"),
    "threshold of none": ("top-k", {"tail_threshold": 0.5}, "--tail-threshold 0.5: top-k targets have none"),
    "threshold of draws": ("random, one sample", {"tail_threshold": 0.5}, "--tail-threshold 0.5: random targets have"),
    "the same threshold": ("threshold, one sample", {"tail_threshold": 0.4}, "found 0.4, expected a larger one, up to"),
    "no probability": ("threshold, one sample", {"tail_threshold": 1.5}, "--tail-threshold 1.5: found 0.4, expected a"),
    "one of several": ("top-k", {"encoding": "packed", "rows_per_shard": 1, "samples": 2}, "--samples 2: top-k"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_a_reason_and_nothing_is_written(tmp_path, caches, name):
    kind, changes, expected = REFUSALS[name]
    before = contents(caches[kind])
    with pytest.raises(cf.MismatchError) as caught:
        list(cf.convert_cache(caches[kind], tmp_path / "output", cf.Conversion(**changes)))
    message = str(caught.value)
    assert expected in message and str(caches[kind]) in message and "\n" not in message
    assert message.endswith("Leave this change out.")
    assert not (tmp_path / "output").exists() and contents(caches[kind]) == before


@pytest.mark.parametrize("changes", [{"encoding": "zip"}, {"top_k": 0}, {"rows_per_shard": 0}])
def test_values_that_make_no_sense_are_refused(tmp_path, caches, changes):
    with pytest.raises(ValueError):
        list(cf.convert_cache(caches["top-k"], tmp_path / "output", cf.Conversion(**changes)))
    assert not (tmp_path / "output").exists()


def test_places_that_are_taken(tmp_path, caches):
    source = shutil.copytree(caches["top-k"], tmp_path / "source")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").write_text("years of work")
    convert(source, tmp_path / "finished", encoding="packed")
    before = contents(tmp_path)
    for output, error, expected in (
        (tmp_path / "foreign", cf.CacheError, "found 'thesis.tex', expected an empty directory"),
        (tmp_path / "finished", cf.CacheError, "found a finished cache with all its shards"),
        (source, cf.CacheError, "found that it is the cache which is to be converted"),
    ):
        with pytest.raises(error, match=expected):
            list(cf.convert_cache(source, output, cf.Conversion(encoding="packed")))
        assert contents(tmp_path) == before


def test_sources_that_are_none(tmp_path, caches):
    unfinished = shutil.copytree(caches["top-k"], tmp_path / "unfinished")
    (unfinished / "manifest.json").rename(unfinished / "manifest.partial.json")
    for source, expected in ((tmp_path / "nowhere", "no such directory"), (unfinished, "an unfinished cache")):
        with pytest.raises(cf.FormatError, match=expected):
            list(cf.convert_cache(source, tmp_path / "output", cf.Conversion()))
    assert not (tmp_path / "output").exists()


def test_a_damaged_source_makes_no_cache(tmp_path, caches):
    source = shutil.copytree(caches["top-k"], tmp_path / "source")
    shard = source / "shards/shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(cf.CorruptShardError, match="source/shards/shard-00001.arrow"):
        list(cf.convert_cache(source, tmp_path / "output", cf.Conversion(encoding="packed")))
    assert not (tmp_path / "output/manifest.json").exists()
    shutil.copy(caches["top-k"] / "shards/shard-00001.arrow", shard)
    list(cf.convert_cache(source, tmp_path / "output", cf.Conversion(encoding="packed")))
    assert cf.verify_cache(tmp_path / "output", deep=True).rows == 10


# -- interruptions ----------------------------------------------------------------------------------------------------

CHANGES = {
    "packed": {"encoding": "packed"},
    "other shards": {"rows_per_shard": 3, "rows_per_record_batch": 2, "compression_level": 1},
    "thinned": {"tail_threshold": 0.6, "samples": 2},
    "packed in other shards": {"encoding": "packed", "rows_per_shard": 5, "rows_per_record_batch": 3},
}


@pytest.mark.parametrize("name", CHANGES)
def test_interrupted_and_continued_gives_the_same_bytes(tmp_path, three_samples, name):
    source, conversion = three_samples, cf.Conversion(**CHANGES[name])
    list(cf.convert_cache(source, tmp_path / "whole", conversion))
    whole = contents(tmp_path / "whole")
    for stops in ((0, 1), (1, 4), (3, 3)):  # stopped twice, each time after so many record batches of the source
        path = tmp_path / f"stopped-{stops}"
        for number, stop in enumerate(stops):
            running = cf.convert_cache(source, path, conversion)
            for _ in range(stop):
                next(running)
            if number:
                running.close()
            elif stop:
                with pytest.raises(KeyboardInterrupt):
                    running.throw(KeyboardInterrupt)
            assert not (path / "manifest.json").exists() and not list(path.rglob(".*"))
        assert list(cf.convert_cache(source, path, conversion))[-1] == 10
        assert contents(path) == whole


def test_what_is_complete_is_not_written_again(tmp_path, caches, monkeypatch):
    running = cf.convert_cache(caches["top-k"], tmp_path / "output", cf.Conversion(encoding="packed"))
    for _ in range(4):
        next(running)
    running.close()
    assert len(list((tmp_path / "output/shards").glob("*.json"))) == 2
    written, write = [], ShardWriter.write

    def counting(shard, batch):
        written.append(int(batch.rows[0]))
        write(shard, batch)

    monkeypatch.setattr(ShardWriter, "write", counting)
    list(cf.convert_cache(caches["top-k"], tmp_path / "output", cf.Conversion(encoding="packed")))
    assert written == [8]


def test_continued_with_other_changes_is_refused(tmp_path, caches):
    running = cf.convert_cache(caches["top-k"], tmp_path / "output", cf.Conversion(encoding="packed"))
    for _ in range(3):
        next(running)
    running.close()
    before = contents(tmp_path / "output")
    with pytest.raises(cf.MismatchError, match="compression.level recorded 9, given 1"):
        list(
            cf.convert_cache(
                caches["top-k"], tmp_path / "output", cf.Conversion(encoding="packed", compression_level=1)
            )
        )
    assert contents(tmp_path / "output") == before


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"top_k": 3}, {"encoding": "packed"}, {"rows_per_record_batch": 4}])
def test_record_batches_do_not_pile_up(tmp_path, monkeypatch, changes):
    """Of 20, one is in work and at most one more waits; packed, also those of the first shard, which teach."""
    write_cache(tmp_path / "source", metadata_of(TOP_K, rows=40, rows_per_shard=8))
    entries: list[weakref.ref] = []
    read = ShardReader.record_batch

    def remember(shard, index, *streams):
        batch = read(shard, index, *streams)
        entries.append(weakref.ref(batch.logprobs))  # which any row of the batch keeps alive
        return batch

    monkeypatch.setattr(ShardReader, "record_batch", remember)
    alive = []
    for _ in cf.convert_cache(tmp_path / "source", tmp_path / "output", cf.Conversion(**changes)):
        alive.append(sum(each() is not None for each in entries))
    assert len(entries) == len(alive) == 20
    waiting = 4 if "encoding" in changes else 0
    assert max(alive[waiting:]) <= 2
    assert max(alive) <= max(2, waiting + 1)


def test_kept_rows_would_be_noticed(tmp_path):
    """What the test above counts: a row that is kept keeps its record batch."""
    write_cache(tmp_path / "source", metadata_of(TOP_K))
    batch = next(cf.open_cache(tmp_path / "source").iter_record_batches())
    entries, row = weakref.ref(batch.logprobs), batch.row(0)
    del batch
    assert entries() is not None
    del row
    assert entries() is None


# -- where it goes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, output, how",
    [
        ("cache", "cache", "is the cache"),
        ("cache", "cache/", "is the cache"),
        ("cache", "other/../cache", "is the cache"),
        ("link", "cache", "is the cache"),
        ("cache", "link", "is the cache"),
        ("cache", "cache/sub", "lies inside of the cache"),
        ("link", "cache/shards/a/b", "lies inside of the cache"),
        ("cache", "link/sub", "lies inside of the cache"),
        ("cache", ".", "is around the cache"),
        ("file://{}/cache", "{}/cache/sub", "lies inside of the cache"),
        ("{}/cache", "file://{}/cache", "is the cache"),
    ],
)
def test_an_output_that_is_its_source_or_in_it_or_around_it_is_refused(
    source: str, output: str, how: str, caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(caches["top-k"], tmp_path / "cache")
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path / "cache")
    with pytest.raises(cf.CacheError, match=f"found that it {how} which is to be converted .* Choose another"):
        list(cf.convert_cache(source.format(tmp_path), output.format(tmp_path), cf.Conversion(encoding="packed")))
    assert contents(tmp_path / "cache") == before


def test_the_same_on_an_object_store(caches: dict[str, Path]) -> None:
    source = "memory://apart/cache"
    list(cf.convert_cache(caches["top-k"], source, cf.Conversion()))
    for output in (source, source + "/", source + "/sub", "memory://apart", "memory:///apart/cache/sub"):
        with pytest.raises(cf.CacheError, match="found that it .* which is to be converted"):
            list(cf.convert_cache(source, output, cf.Conversion(encoding="packed")))
    cf.verify_cache(source, deep=True)


def test_a_neighbour_whose_name_begins_alike_is_another_place(caches: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(caches["top-k"], tmp_path / "cache")
    for output in (tmp_path / "cache-2", tmp_path / "cach", tmp_path / "deep/cache"):
        convert(tmp_path / "cache", output, encoding="packed")
    list(cf.convert_cache(tmp_path / "cache", "memory://apart/neighbour", cf.Conversion()))
    list(cf.convert_cache("memory://apart/neighbour", "memory://apart/neighbour-2", cf.Conversion()))
    assert_same_rows(cf.open_cache("memory://apart/neighbour-2"), cf.open_cache(tmp_path / "cache"))
