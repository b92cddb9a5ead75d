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
