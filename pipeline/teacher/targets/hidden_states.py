"""Which hidden states of the teacher are kept, at which positions, in which numbers.

    `hidden_states`   last, all, or layers such as 6,12,18; 0 is the embeddings' output, i that of layer i
    `hidden_every` N  one in N of the positions that have targets, another one in each row
    `hidden_dtype`    float16, float32, or int8 with a scale per position: an error of at most max|h| / 254 in each

What a student is taught by them is in `pipeline.losses.feature_losses`; those of the last layer may be the targets
themselves (`targets.hidden_targets`). They are large: D numbers for a position and layer,
where its targets take a few dozen bytes; hence the size that is said before anything is computed.

Shapes: B rows of T positions, n positions of a batch that have states, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

import cache_format as cf
from pipeline.errors import ModelError

RECORD_BATCH_BYTES = 2**23  # of the states that a reader has to hold for the sake of one row
SHARD_BYTES = 2**29


def predicted_bytes(spec: cf.HiddenSpec, positions: int) -> int:
    """Of the states of a corpus in which so many positions have targets; compression saves a tenth or so of them."""
    return -(-positions // spec.every) * spec.bytes_per_position


def rows_within(spec: cf.HiddenSpec, positions_per_row: float, most_bytes: int) -> int:
    """So many rows have states of at most `most_bytes`; one at least."""
    per_row = positions_per_row / spec.every * spec.bytes_per_position
    return max(1, int(most_bytes // max(per_row, 1.0)))


def chosen(stored: np.ndarray, row: int, every: int) -> np.ndarray:
    """bool [T]: of the positions that have targets, one in `every`; over consecutive rows each in its turn."""
    mask = np.zeros_like(stored)
    positions = np.flatnonzero(stored)
    mask[positions[(np.arange(len(positions)) + row) % every == 0]] = True
    return mask


def quantised(states: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """States [n, D] as they are stored, and their scales [n] float32 with int8.

    int8: scale = max|h| / 127 of the position, integer = h / scale, rounded; off by half a scale at most.
    """
    if dtype != "int8":
        return states.to(getattr(torch, dtype)), None
    states = states.float()
    scales = states.abs().amax(dim=1) / 127.0
    integers = (states / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round_()
    # An integer has no NaN: what was none shows in the scale, which the writer refuses.
    return integers.nan_to_num_(0.0).clamp_(-127, 127).to(torch.int8), scales


def of_batch(
    states: Mapping[int, Tensor], masks: Sequence[np.ndarray], dtype: str
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """States [n, D] and scales [n] of every layer at the chosen positions, on the device.

    Args:
        states: layer -> [B, T, D].
        masks: bool [≤T] of each row.
    """
    first = next(iter(states.values()))
    where = torch.zeros(first.shape[:2], dtype=torch.bool)
    for i, mask in enumerate(masks):
        where[i, : len(mask)] = torch.from_numpy(mask)
    index = tuple(each.to(first.device) for each in where.nonzero(as_tuple=True))  # a mask there would wait
    kept, scales = {}, {}
    for layer, each in states.items():
        kept[layer], scale = quantised(each[index], dtype)
        if scale is not None:
            scales[layer] = scale
    return kept, scales


def of_rows(
    states: Mapping[int, Tensor], scales: Mapping[int, Tensor], masks: Sequence[np.ndarray], rows: Sequence[int]
) -> list[cf.HiddenStates]:
    """The states of a batch, on the host, row by row.

    Args:
        rows: their numbers, for the error.

    Raises: ModelError if some do not fit the numbers that they are stored in.
    """
    whole = cf.HiddenStates(
        mask=np.concatenate(masks),
        states={layer: each.numpy() for layer, each in states.items()},
        scales={layer: each.numpy() for layer, each in scales.items()},
    )
    ends = np.cumsum([len(mask) for mask in masks])
    found = [whole.cut(slice(end - len(mask), end)) for mask, end in zip(masks, ends, strict=True)]
    for row, hidden in zip(rows, found, strict=True):
        if problem := find_problem(hidden):
            raise ModelError(f"row {row}, {problem}")
    return found


def find_problem(hidden: cf.HiddenStates) -> str | None:
    """Where a state is not a number any more, and what to do about it."""
    invalid = cf.find_invalid_state(hidden)
    if invalid is None:
        return None
    position, what = invalid
    remedy = (
        "the largest float16 is 65,504. Use `hidden_dtype` int8, which has a scale, or float32."
        if any(states.dtype == np.float16 for states in hidden.states.values())
        else "the teacher computes NaN or infinity. Try `dtype` float32."
    )
    return f"position {position}: {what}: {remedy}"
