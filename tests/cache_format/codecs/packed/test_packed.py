"""The packed encoding gives the very arrays that columns give, whatever the targets."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cache_format as cf
from cache_format.codecs.packed.block import LANES, pack
from cache_format.codecs.packed.lexicon import Lexicon
from cache_format.rows.invariants import find_violation
from cache_format.rows.row_batch import concatenate
from cache_samples import sample_row
from packed_samples import (
    KINDS,
    RANDOM,
    THRESHOLD,
    TOP_K,
    assert_same_batch,
    empty_lexicon,
    lexicon_of,
    metadata_of,
    row_of,
    through,
)


def check_same(rows: Sequence[cf.CacheRow], metadata: cf.CacheMetadata, lexicon: Lexicon | None = None) -> cf.RowBatch:
    """Both encodings of the rows give the same arrays, and packing what was unpacked gives the same bytes."""
    batch = concatenate(rows)
    lexicon = lexicon_of(rows, metadata.vocab_size) if lexicon is None else lexicon
    expected, found = through(batch, metadata), through(batch, metadata, lexicon)
    assert_same_batch(found, expected)
    assert pack(found, metadata, lexicon) == pack(batch, metadata, lexicon)
    return found


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1000, 2**16, 2**16 + 1])
def test_every_kind_of_targets(kind, vocab):
    metadata = metadata_of(KINDS[kind], vocab_size=vocab)
    found = check_same([row_of(metadata, row) for row in range(4)], metadata)
    assert found.ids.dtype == (np.uint16 if vocab <= 2**16 else np.uint32)
    assert found.num_entries and (found.sample_counts is None) == (metadata.num_samples == 1)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_a_masked_model(kind):
    metadata = metadata_of(KINDS[kind], alignment="same")
    found = check_same([row_of(metadata, row) for row in range(3)], metadata)
    assert found.labels is not None


@pytest.mark.parametrize("kind", ["top-k", "threshold, one sample", "threshold, three samples"])
def test_rows_of_one_token(kind):
    metadata = metadata_of(KINDS[kind], alignment="same")
    rows = [row_of(metadata, row, tokens=1) for row in range(5)]
    check_same(rows, metadata)
    check_same(rows[:1], metadata)


@pytest.mark.parametrize("samples", [None, 1, 3])
def test_rows_of_which_nothing_counts(samples):
    """No position has an entry, as behind a prompt that was left out."""
    metadata = metadata_of({**THRESHOLD, "samples": samples} if samples else TOP_K)
    rows = []
    for row in range(3):
        made = row_of(metadata, row)
        nothing = np.zeros(7, np.int64)
        targets = cf.SparseTargets(
            counts=nothing,
            ids=nothing[:0],
            logprobs=np.zeros(0, np.float32),
            exact_counts=nothing,
            residual_logprob=np.zeros(7, np.float32),
            entropy=np.zeros(7, np.float32),
            sample_counts=np.zeros((7, 3), np.int64) if samples == 3 else None,
        )
        rows.append(replace(made, loss_mask=np.zeros(7, bool), targets=targets))
    found = check_same(rows, metadata, empty_lexicon(metadata.vocab_size))
    assert found.num_entries == 0
    mixed = check_same([rows[0], row_of(metadata, 1), rows[2]], metadata)
    assert mixed.num_entries > 0 and (mixed.counts == 0).sum() >= 14


@pytest.mark.long
@pytest.mark.parametrize("samples", [None, 1, 3])
def test_more_than_255_entries(samples):
    """Counts of 16 bits."""
    kind = {**TOP_K, "k": 400} if samples is None else {**THRESHOLD, "max_entries": 400, "samples": samples}
    metadata = metadata_of(kind)
    rows = [row_of(metadata, row, most=400, tokens=5) for row in range(3)]
    found = check_same(rows, metadata)
    assert found.counts.max() > 255 and found.counts.dtype == np.uint16


@pytest.mark.long
@pytest.mark.parametrize("samples", [None, 3])
def test_a_batch_that_fills_all_lanes(samples):
    metadata = metadata_of({**THRESHOLD, "samples": samples} if samples else TOP_K)
    rows = [row_of(metadata, row, tokens=900) for row in range(12)]
    batch = concatenate(rows)
    lexicon = lexicon_of(rows, metadata.vocab_size)
    data = pack(batch, metadata, lexicon)
    entries, lanes, _ = struct.unpack_from("<IHI", data)
    assert entries == batch.num_entries > 64 * LANES and lanes == LANES
    assert_same_batch(through(batch, metadata, lexicon), through(batch, metadata))


@pytest.mark.parametrize("levels", [1, 2, 256])
def test_codebooks_of_any_size(levels):
    """One value: nothing is coded for it. 256: as many as a code has."""
    values = np.linspace(-8, 0, levels).astype(np.float32) if levels > 1 else np.zeros(1, np.float32)
    logprobs = cf.Codebook("few", "sqrt_probability", values)
    entropies = cf.Codebook("few", "sqrt_value", np.linspace(0, 8, max(levels, 2)).astype(np.float32))
    books = {"target_logprobs": logprobs, "residual_logprob": logprobs, "entropy": entropies}
    metadata = replace(metadata_of(KINDS["threshold, three samples"]), codebooks=books)
    check_same([row_of(metadata, row) for row in range(4)], metadata)


def test_a_tail_without_values_costs_no_more_than_its_counts_and_ranks():
    """All weights are equal, as in real threshold targets: their codes are certain, and are not coded."""
    metadata = metadata_of(KINDS["threshold, one sample"])
    rows = []
    for row in range(20):
        made = row_of(metadata, row)
        logprobs = made.targets.logprobs.copy()
        first = made.targets.offsets[:-1] + made.targets.exact_counts
        for start, stop in zip(first, made.targets.offsets[1:], strict=True):
            logprobs[start:stop] = np.log(0.4)
        rows.append(replace(made, targets=replace(made.targets, logprobs=logprobs)))
    lexicon = lexicon_of(rows, metadata.vocab_size)
    other = lexicon_of(plain := [row_of(metadata, row) for row in range(20)], metadata.vocab_size)
    check_same(rows, metadata, lexicon)
    assert len(pack(concatenate(rows), metadata, lexicon)) < len(pack(concatenate(plain), metadata, other))


@pytest.mark.long
@settings(max_examples=40)
@given(
    first_seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    vocab=st.sampled_from([2, 3, 300, 2**16, 2**16 + 1]),
    most=st.sampled_from([1, 9, 255, 256]),
    alignment=st.sampled_from(["next", "same"]),
    kind=st.sampled_from([TOP_K, THRESHOLD, RANDOM]),
    samples=st.sampled_from([1, 2, 5]),
    taught=st.sampled_from(["these rows", "other rows", "nothing"]),
)
def test_any_rows(first_seed, lengths, vocab, most, alignment, kind, samples, taught):
    targets = {**kind, "k": 1, "max_entries": most}
    if kind is not TOP_K:
        targets["samples"] = samples
    metadata = metadata_of(targets, vocab_size=vocab, alignment=alignment)
    rows = [row_of(metadata, first_seed + i, tokens=tokens, most=min(most, 20)) for i, tokens in enumerate(lengths)]
    for index, row in enumerate(rows):
        object.__setattr__(row, "row", index)
    if taught == "nothing":
        lexicon = empty_lexicon(vocab)
    elif taught == "these rows":
        lexicon = lexicon_of(rows * 2, vocab, 100.0)  # twice, so that pairs repeat and become candidates
    else:
        lexicon = lexicon_of([row_of(metadata, first_seed + 99, tokens=30)] * 2, vocab, 100.0)
    found = check_same(rows, metadata, lexicon)
    assert find_violation(found, range(len(rows)), metadata) is None


def test_sampled_entries_that_the_metadata_do_not_admit():
    metadata = metadata_of(TOP_K)
    with pytest.raises(ValueError, match="no `samples` in the targets"):
        pack(concatenate([sample_row(0)]), metadata, empty_lexicon(1000))
