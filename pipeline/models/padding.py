"""Rows of different lengths as one rectangular batch, the same way for teacher and student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class PackedRow(Protocol):
    """A row of the corpus or of a cache."""

    @property
    def input_ids(self) -> np.ndarray: ...  # [T]

    @property
    def segment_lengths(self) -> np.ndarray: ...  # [S], sum T


def pad_rows(rows: Sequence[PackedRow]) -> tuple[Tensor, Tensor]:
    """input_ids and position_ids, int64 [B, T], padded on the right with token 0.

    Causal models get no attention mask on purpose: positions restart at 0 with every packed document, and transformers
    keeps documents apart by them only if it is given no mask. The positions of padding continue those of the last
    document, so that no new document begins; causal attention hides it. What else must know where padding is, such as
    masked models, gets `padding_mask`.
    """
    longest = max(len(row.input_ids) for row in rows)
    input_ids = np.zeros((len(rows), longest), np.int64)
    starts = np.zeros((len(rows), longest), np.int64)
    for i, row in enumerate(rows):
        lengths = np.asarray(row.segment_lengths, np.int64)
        first = np.cumsum(lengths) - lengths
        input_ids[i, : len(row.input_ids)] = row.input_ids
        starts[i] = first[-1]
        starts[i, : len(row.input_ids)] = np.repeat(first, lengths)
    return torch.from_numpy(input_ids), torch.from_numpy(np.arange(longest) - starts)


def padding_mask(rows: Sequence[PackedRow]) -> Tensor:
    """int64 [B, T]: 0 at padding and 1 elsewhere."""
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    return (torch.arange(int(lengths.max())) < lengths[:, None]).long()


def places(positions: Sequence[np.ndarray], width: int) -> Tensor:
    """int64 [n]: where positions of the rows of a batch are among its B·T.

    Computed on the host: a device would have to tell it how many positions a mask selects, and the host would wait.

    Args:
        positions: int64, those of each row.
        width: T.
    """
    return torch.from_numpy(np.concatenate([i * width + each for i, each in enumerate(positions)]))


def model_inputs(rows: Sequence[PackedRow], *, with_mask: bool) -> list[Tensor]:
    """Arguments of `Head.hidden_states` for these rows: `pad_rows`, and `padding_mask` if the model reads one."""
    return [*pad_rows(rows), *([padding_mask(rows)] if with_mask else [])]
