"""Whether rows hold several documents, told to transformers by the caller, who knows.

transformers looks for position ids that restart, and asks the device whether there are any, to save the mask if there
are none (`masking_utils.find_packed_sequence_indices`). The answer makes the host wait for everything that is queued,
in every forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import masking_utils

from pipeline.models.padding import PackedRow


def hold_several_documents(rows: Sequence[PackedRow]) -> bool:
    """Whether position ids restart in any of these rows."""
    return any(np.count_nonzero(row.segment_lengths) > 1 for row in rows)


@contextlib.contextmanager
def packing_known(packed: bool) -> Iterator[None]:
    """Inside the block forward passes without an attention mask build the mask that they would have built, unasked.

    Args:
        packed: `hold_several_documents` of the rows of these passes.
    """
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = document_numbers if packed else _single_documents
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def document_numbers(position_ids: Tensor) -> Tensor:
    """[B, T] the number of the document in its row, from 0: one more wherever positions do not go on by 1."""
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)


def _single_documents(_: Tensor) -> None:
    return None
