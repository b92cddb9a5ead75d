"""Which hidden states of the teacher are stored, at which positions, in which data type.

    `hidden_states`   last, all, or layers such as 6,12,18; 0 is the embeddings' output, i that of layer i
    `hidden_every` N  every N-th position that has targets, with an offset that changes from row to row
    `hidden_dtype`    float16, float32, or int8 with a scale per position: an error of at most max|h| / 254 in each

The losses on them are in `pipeline.losses.feature_losses`; the states of the last layer may themselves be the targets
(`targets.hidden_targets`). States are large, D numbers per position and layer, while the targets of a position take a
few dozen bytes. So a run reports their size before it computes anything.

Shapes: B rows of T positions, n positions of a batch whose states are stored, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

import cache_format as cf
from pipeline.errors import ModelError

RECORD_BATCH_BYTES = 2**23  # states that a reader must hold to read one row
SHARD_BYTES = 2**29


def predicted_bytes(spec: cf.HiddenSpec, positions: int) -> int:
    """Bytes of the states of a corpus before compression, which saves about a tenth.

    Args:
        positions: number of positions that have targets.
    """
    return -(-positions // spec.every) * spec.bytes_per_position


def rows_within(spec: cf.HiddenSpec, positions_per_row: float, most_bytes: int) -> int:
    """Number of rows whose states take at most `most_bytes`; at least 1."""
    per_row = positions_per_row / spec.every * spec.bytes_per_position
    return max(1, int(most_bytes // max(per_row, 1.0)))


def chosen(stored: np.ndarray, row: int, every: int) -> np.ndarray:
    """bool [T]: every `every`-th of the positions that have targets, shifted by one from row to row."""
    mask = np.zeros_like(stored)
    positions = np.flatnonzero(stored)
    mask[positions[(np.arange(len(positions)) + row) % every == 0]] = True
    return mask


def quantised(states: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """States [n, D] in the stored data type; for int8 also their scales [n] float32, else None.

    int8: scale = max|h| / 127 of the position, integer = round(h / scale). The error is at most half a scale.
    """
    if dtype != "int8":
        return states.to(getattr(torch, dtype)), None
    states = states.float()
    scales = states.abs().amax(dim=1) / 127.0
    integers = (states / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round_()
    # An integer cannot be NaN, but the scale of such a state is, and the writer refuses it.
    return integers.nan_to_num_(0.0).clamp_(-127, 127).to(torch.int8), scales


def of_batch(states: Mapping[int, Tensor], places: Tensor, dtype: str) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """States [n, D] and scales [n] of every layer at the chosen positions, on the device of `places`.

    Args:
        states: layer -> [B, T, D].
        places: [n] int64, `models.padding.places` of the positions.
    """
    kept, scales = {}, {}
    for layer, each in states.items():
        state, scale = quantised(each.flatten(0, 1)[places.to(each.device, non_blocking=True)], dtype)
        kept[layer] = state.to(places.device)  # layers may be spread over devices, and one of them is waited for
        if scale is not None:
            scales[layer] = scale.to(places.device)
    return kept, scales


def nowhere(spec: cf.HiddenSpec) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """States [0, D] and scales [0] of every layer, where no position is chosen."""
    none = [quantised(torch.zeros((0, spec.width)), spec.dtype) for _ in spec.layers]
    states = {layer: state for layer, (state, _) in zip(spec.layers, none, strict=True)}
    return states, {layer: scale for layer, (_, scale) in zip(spec.layers, none, strict=True) if scale is not None}


def of_rows(
    states: Mapping[int, Tensor], scales: Mapping[int, Tensor], masks: Sequence[np.ndarray], rows: Sequence[int]
) -> list[cf.HiddenStates]:
    """The states of a batch, on the host, row by row.

    Args:
        rows: numbers of the rows, for the error.

    Raises: ModelError if a state does not fit the data type that it is stored in.
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
    """The first position with a NaN or infinite state, and the next step; None if there is none."""
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
