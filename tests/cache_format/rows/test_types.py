"""The small amount of arithmetic that rows offer, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

import cache_format as cf


def test_offsets_at_and_order():
    targets = cf.SparseTargets(
        counts=np.array([3, 0, 4], np.uint8),
        ids=np.array([2, 5, 9, 1, 3, 8, 4], np.uint16),
        logprobs=np.array([-3, -1, -2, -2, -1, -1, -0.5], np.float32),
        exact_counts=np.array([3, 0, 3], np.uint8),  # the last entry of position 2 is sampled
        residual_logprob=np.zeros(3, np.float32),
        entropy=np.zeros(3, np.float32),
    )
    assert targets.num_entries == 7
    assert list(targets.offsets) == [0, 3, 3, 7]
    assert [list(part) for part in targets.at(0)] == [[2, 5, 9], [-3, -1, -2]]
    assert len(targets.at(1)[0]) == 0
    assert list(targets.at(-1)[0]) == [1, 3, 8, 4]
    with pytest.raises(IndexError):
        targets.at(3)
    ordered = targets.sorted_by_probability()
    assert list(ordered.ids) == [5, 9, 2, 3, 8, 1, 4]
    assert list(ordered.logprobs) == [-1, -2, -3, -1, -1, -2, -0.5]
    assert list(targets.ids) == [2, 5, 9, 1, 3, 8, 4]


def test_offsets_do_not_wrap():
    many = np.full(1000, 255, np.uint8)
    none = np.zeros(0, np.float32)
    targets = cf.SparseTargets(many, none.astype(np.uint16), none, many, none, none)
    assert targets.offsets[-1] == 255_000


@pytest.mark.parametrize(
    "labels, expected",
    [
        # next: the token after t, where the prediction counts
        (None, [11, -100, -100, 14, -100]),
        # same: the stored label of t
        (np.array([7, 8, 9, 6, 5], np.int32), [7, -100, -100, 6, -100]),
    ],
)
def test_labels_and_positions(labels, expected):
    none = np.zeros(0, np.uint16)
    row = cf.CacheRow(
        row=0,
        input_ids=np.array([10, 11, 12, 13, 14], np.uint16),
        loss_mask=np.array([True, False, False, True, False]),
        segment_lengths=np.array([3, 2], np.int32),
        targets=cf.SparseTargets(none, none, none, none, none, none),
        labels=labels,
    )
    assert row.label_ids.dtype == row.position_ids.dtype == np.int64
    assert list(row.label_ids) == expected
    assert list(row.position_ids) == [0, 1, 2, 0, 1]


def two_samples() -> cf.SparseTargets:
    """Three positions: two samples that share token 7; nothing sampled; nothing but samples, one of them empty."""
    logs = np.log(np.array([0.5, 0.1, 0.1, 0.1, 0.1, 0.9, 0.25, 0.75], np.float32))
    return cf.SparseTargets(
        counts=np.array([5, 1, 2], np.uint8),
        ids=np.array([4, 2, 7, 3, 7, 1, 5, 6], np.uint16),
        logprobs=logs,
        exact_counts=np.array([1, 1, 0], np.uint8),
        residual_logprob=np.log(np.array([0.5, 0.1, 1.0], np.float32)),
        entropy=np.array([2.0, 0.3, 4.0], np.float32),
        sample_counts=np.array([[2, 2], [0, 0], [0, 2]], np.uint8),
    )


def test_one_of_several_samples():
    """The exact entries and its own, with weights that no longer share the mass with the other one."""
    targets = two_samples()
    assert targets.num_samples == 2
    first, second = targets.sample(0), targets.sample(1)
    assert [list(part.ids) for part in (first, second)] == [[4, 2, 7, 1], [4, 3, 7, 1, 5, 6]]
    assert [list(part.counts) for part in (first, second)] == [[3, 1, 0], [3, 1, 2]]
    np.testing.assert_allclose(np.exp(first.logprobs), [0.5, 0.2, 0.2, 0.9], rtol=1e-6)
    np.testing.assert_allclose(np.exp(second.logprobs), [0.5, 0.2, 0.2, 0.9, 0.5, 1.0], rtol=1e-6)
    assert (second.logprobs <= 0).all() and second.logprobs.dtype == np.float32  # 2·.75 is no log-probability
    for part in (first, second):
        assert part.num_samples == 1 and part.sample_counts is None
        for name in ("exact_counts", "residual_logprob", "entropy"):
            assert getattr(part, name) is getattr(targets, name)
    assert list(targets.sample(-1).ids) == list(second.ids)
    for outside in (2, -3):
        with pytest.raises(IndexError):
            targets.sample(outside)
    assert list(targets.ids) == [4, 2, 7, 3, 7, 1, 5, 6]  # untouched


def test_a_single_sample_is_all_there_is():
    alone = two_samples().sample(1)
    assert alone.sample(0) is alone and alone.sample(-1) is alone and alone.merged() is alone
    for outside in (1, -2):
        with pytest.raises(IndexError):
            alone.sample(outside)


def test_all_samples_as_one():
    """Each token once, by ascending id after the exact ones, with the sum of its weights."""
    merged = two_samples().merged()
    assert list(merged.counts) == [4, 1, 2] and merged.sample_counts is None
    assert list(merged.ids) == [4, 2, 3, 7, 1, 5, 6]
    np.testing.assert_allclose(np.exp(merged.logprobs), [0.5, 0.1, 0.1, 0.2, 0.9, 0.25, 0.75], rtol=1e-6)
    assert list(merged.exact_counts) == [1, 1, 0] and merged.logprobs.dtype == np.float32


def test_merging_never_mixes_exact_and_sampled_entries_or_positions():
    """Neighbouring positions that end and begin with the same token; an exact token that is sampled too (a lie)."""
    targets = cf.SparseTargets(
        counts=np.array([2, 3, 2]),
        ids=np.array([5, 5, 5, 5, 5, 5, 5]),
        logprobs=np.log(np.array([0.5, 0.1, 0.2, 0.1, 0.1, 0.1, 0.1], np.float32)),
        exact_counts=np.array([1, 1, 0]),
        residual_logprob=np.zeros(3, np.float32),
        entropy=np.zeros(3, np.float32),
        sample_counts=np.array([[1, 0], [1, 1], [1, 1]]),
    )
    merged = targets.merged()
    assert list(merged.counts) == [2, 2, 1] and list(merged.ids) == [5, 5, 5, 5, 5]
    np.testing.assert_allclose(np.exp(merged.logprobs), [0.5, 0.1, 0.2, 0.2, 0.2], rtol=1e-6)


def test_samples_of_nothing():
    none = np.zeros(0, np.float32)
    targets = cf.SparseTargets(
        counts=np.zeros(2, np.uint8),
        ids=none.astype(np.uint16),
        logprobs=none,
        exact_counts=np.zeros(2, np.uint8),
        residual_logprob=np.zeros(2, np.float32),
        entropy=np.zeros(2, np.float32),
        sample_counts=np.zeros((2, 3), np.uint8),
    )
    for part in (targets.sample(0), targets.sample(2), targets.merged()):
        assert list(part.counts) == [0, 0] and part.num_entries == 0


def test_counts_of_samples_do_not_wrap():
    """250 exact entries and 250 in each of two samples: no sum of them fits a byte."""
    ids = np.concatenate([np.arange(250), np.arange(300, 550), np.arange(400, 650)]).astype(np.uint16)
    targets = cf.SparseTargets(
        counts=np.array([750], np.uint16),
        ids=ids,
        logprobs=np.full(750, -7, np.float32),
        exact_counts=np.array([250], np.uint8),
        residual_logprob=np.zeros(1, np.float32),
        entropy=np.zeros(1, np.float32),
        sample_counts=np.array([[250, 250]], np.uint8),
    )
    assert list(targets.sample(0).counts) == [500] and targets.sample(1).ids[-1] == 649
    assert list(targets.merged().counts) == [600]


def test_sorting_by_probability_leaves_every_sample_where_it_is():
    targets = two_samples()
    ordered = targets.sorted_by_probability()
    assert list(ordered.ids) == list(targets.ids) and list(ordered.logprobs) == list(targets.logprobs)
    assert list(ordered.sample(1).ids) == list(targets.sample(1).ids)
