"""Which attention masks a batch needs, passed to transformers by the caller.

transformers leaves a mask out where it would hide nothing: if no document begins inside a row, and if no row has
padding. It finds that out from the position ids or the padding mask, so on a GPU the host waits, in every forward pass,
until everything that is queued has been computed. Inside `mask_shortcuts` both answers come from the rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import masking_utils

from pipeline.models.padding import PackedRow


@contextlib.contextmanager
def mask_shortcuts(rows: Sequence[PackedRow], device: torch.device) -> Iterator[None]:
    """Inside the block a forward pass over these rows on a CUDA device builds the same masks without asking the device.

    Elsewhere nothing changes: asking costs nothing there.
    """
    if device.type != "cuda":
        yield
        return
    packed, padded = holds_packed(rows), len({len(row.input_ids) for row in rows}) > 1

    def nothing_to_hide(padding_mask: Tensor | None, kv_length: int, local_attention_size: int | None = None) -> bool:
        return not (padded and padding_mask is not None) and (
            local_attention_size is None or kv_length < local_attention_size
        )

    answers: dict[str, Any] = {
        "find_packed_sequence_indices": document_numbers if packed else lambda position_ids: None,
        "_ignore_bidirectional_mask_sdpa": nothing_to_hide,
    }
    originals = {name: getattr(masking_utils, name) for name in answers if hasattr(masking_utils, name)}
    for name in originals:
        setattr(masking_utils, name, answers[name])
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(masking_utils, name, original)


def holds_packed(rows: Sequence[PackedRow]) -> bool:
    """Whether any of these rows holds several documents."""
    return any(np.count_nonzero(row.segment_lengths) > 1 for row in rows)


def document_numbers(position_ids: Tensor) -> Tensor:
    """[B, T] the number of the document in its row, from 0: one more wherever positions do not go on by 1."""
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)
