"""Whether a model can run on documents that lie end to end, found by running it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.errors import ConfigError
from pipeline.models.head import Head, deviation, evaluating, tolerance
from pipeline.models.isolation.document_attention import Documents, attends_by_document, forget_documents, longest_reach
from pipeline.models.padding import pad_rows


@dataclass(frozen=True)
class _Row:
    input_ids: np.ndarray
    segment_lengths: np.ndarray


def without_padding(head: Head, longest: int, *, wanted: bool | None, device: torch.device) -> Head:
    """The head, padding-free if `padding_free` asks for it or, by default, if CUDA and the model allow it.

    Args:
        longest: tokens of the longest row.
        wanted: the option; None: on CUDA, where the model allows it.
        device: that the model will run on.

    Raises:
        ConfigError: it is wanted, and the model cannot.
    """
    if wanted is False or (wanted is None and device.type != "cuda"):
        return head
    free = padding_free(head, longest)
    if free is None and wanted:
        raise ConfigError(
            f"`padding_free`: {type(head.model).__name__} gives documents laid end to end different states "
            "than each has alone: its layers do not use transformers' attention interface, or mix tokens in "
            "another way. Leave it out."
        )
    return free or head


def padding_free(head: Head, longest: int) -> Head | None:
    """The same head, run on documents that lie end to end (`document_attention`); None if the model cannot.

    It is tested on two rows of two documents, against each document by itself with the model's own attention. One of
    them is longer than the model's windows, as far as rows are.

    Args:
        longest: tokens of the longest row.
    """
    if head.masked:
        return None
    model, device = head.model, head.device
    first = max(9, min(longest, longest_reach(model.config) + 8))
    generator = torch.Generator().manual_seed(4)
    lengths = (first, 1, 6, 2)
    documents = [torch.randint(head.vocab_size, (1, n), generator=generator) for n in lengths]
    rows = [_Row(torch.cat(documents[i : i + 2], dim=1)[0].numpy(), np.array(lengths[i : i + 2])) for i in (0, 2)]
    with evaluating(model), torch.no_grad():
        alone = [
            head.hidden_states(ids.to(device), torch.arange(ids.shape[1], device=device)[None]) for ids in documents
        ]
        expected = torch.cat(alone, dim=1)[0]
        if not attends_by_document(model):
            return None
        free, there = replace(head, padding_free=True), Documents.of_rows(rows).to(device)
        try:
            found = free.hidden_states(*(each.to(device) for each in pad_rows(rows)), documents=there)
            works = deviation(there.flat(found)[0], expected) <= tolerance(expected, roundings=16)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            works = False  # its layers do not pass on where documents begin, or need what is not computed by document
    if not works:
        forget_documents(model)
    return free if works else None
