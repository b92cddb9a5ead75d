"""Fewer entries of a cache: what is dropped joins the residual, what is drawn stays unbiased."""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cache_format as cf
from cache_samples import sample_metadata
from converting import assert_same_rows, convert, shards
from packed_samples import (
    THRESHOLD,
    TOP_K,
    draws_codebook,
    metadata_of,
    row_of,
    write_cache,
)

# -- fewer exact entries ----------------------------------------------------------------------------------------------


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
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
