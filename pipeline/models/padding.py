"""Rows of different lengths as one rectangle, the same way for the teacher and for the student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class PackedRow(Protocol):
    """A row of tokens, corpus row or cache row."""

    @property
    def input_ids(self) -> np.ndarray: ...  # [T]

    @property
    def segment_lengths(self) -> np.ndarray: ...  # [S], sum T


def pad_rows(rows: Sequence[PackedRow]) -> tuple[Tensor, Tensor]:
    """input_ids, position_ids [B, T] int64, padded on the right with token 0.

    Causal models get no attention mask, on purpose: positions restart at 0 with every packed document, from which
    transformers keeps documents apart only if it is given no mask. Padding goes on counting after the last document,
    where causal attention hides it and no new document seems to begin. Masked models get `padding_mask`.
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
    """[B, T] int64: 1 but for padding, which a model that sees both sides would see."""
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    return (torch.arange(int(lengths.max())) < lengths[:, None]).long()


def model_inputs(rows: Sequence[PackedRow], *, masked: bool) -> list[Tensor]:
    """What `Head.hidden_states` takes for these rows: `pad_rows`, and of a masked model `padding_mask`."""
    return [*pad_rows(rows), *([padding_mask(rows)] if masked else [])]
