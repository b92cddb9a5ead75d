"""Check that a document has the states that it has by itself, whatever shares its row or its batch."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import ModelError
from pipeline.models.head import Head, deviation, deviation_of_most, probing, tolerance
from pipeline.models.isolation.document_attention import Documents
from pipeline.models.isolation.length_limits import longest_packed_row
from pipeline.models.objective import most_positions


def check_packing(model: PreTrainedModel, head: Head, longest: int = 0) -> None:
    """Check that documents packed into one row do not attend to each other.

    The states of the second document must be those it has alone, and must not depend on the first document. The second
    comparison is strict in any dtype: only the tokens of the first document change. The first one ends at the position
    that the longest document of a row would end at, because some models switch to other position embeddings there.

    Args:
        head: checked as it will run: a padding-free one is told where documents begin.
        longest: tokens of the longest row.

    Raises:
        ModelError: they do attend to each other.
    """
    name, limit = type(model).__name__, longest_packed_row(model.config)
    if limit is not None and longest > limit:
        raise ModelError(
            f"{name}: found rows of up to {longest:,} tokens, expected at most {limit:,} if documents share a row, "
            "because this model scales its attention by the place in the row instead of the document. Use "
            f"`packing=False`, or `seq_len` {limit} or less."
        )
    device, free = head.device, head.padding_free
    generator = torch.Generator().manual_seed(1)
    first, other, second = (torch.randint(head.vocab_size, (1, n), generator=generator).to(device) for n in (7, 7, 5))
    alone = torch.arange(second.shape[1], device=device)[None]
    packed = torch.cat([_up_to(_reached(model, longest), first), alone], dim=1)
    rows = torch.cat([torch.cat([first, second], dim=1), torch.cat([other, second], dim=1)])
    with probing(model):
        expected = head.hidden_states(second, alone)[0]
        states = head.hidden_states(rows, packed.expand(2, -1), documents=_two_each(first, second) if free else None)
        behind_first, behind_other = states[:, first.shape[1] :]
    for off, roundings in ((deviation_of_most(behind_first, expected), 16), (deviation(behind_first, behind_other), 4)):
        allowed = tolerance(expected, roundings=roundings)
        if not off <= allowed:
            raise ModelError(
                f"{name}: the states of a document change by {off:.2g} (allowed {allowed:.2g}) when it is packed "
                "after another one: it depends on the length of that document, or attends to it. Use "
                "`packing=False`."
            )


def check_padding(model: PreTrainedModel, head: Head, longest: int = 0) -> None:
    """Check that a document's states do not depend on the padding of its row.

    Args:
        longest: tokens of the longest row, to whose last position the padding of a causal model is carried.

    Raises:
        ModelError: they do.
    """
    device = head.device
    generator = torch.Generator().manual_seed(1)
    document, padding = (torch.randint(head.vocab_size, (1, n), generator=generator).to(device) for n in (7, 5))
    rows = torch.cat([torch.cat([document, torch.zeros_like(padding)], dim=1), torch.cat([document, padding], dim=1)])
    positions = _up_to(0 if head.masked else _reached(model, longest), rows[:1])
    there = (torch.arange(rows.shape[1], device=device) < document.shape[1]).long().expand(len(rows), -1)
    with probing(model):
        expected = head.hidden_states(document, positions[:, : document.shape[1]])[0]
        zeros, others = head.hidden_states(rows, positions.expand(len(rows), -1), there)[:, : document.shape[1]]
    for off, roundings in ((deviation_of_most(zeros, expected), 16), (deviation(zeros, others), 4)):
        allowed = tolerance(expected, roundings=roundings)
        if not off <= allowed:
            raise ModelError(
                f"{type(model).__name__}: the states of a document change by {off:.2g} (allowed {allowed:.2g}) when "
                "its row is padded, so it sees the padding or its length: rows of different lengths cannot share a "
                "batch. Use " + ("another model." if head.masked else "`batch_size=1`.")
            )


def _reached(model: PreTrainedModel, longest: int) -> int:
    """The last position that a row of `longest` tokens can reach in this model."""
    limit = most_positions(model.config)
    return (longest if limit is None else min(longest, limit)) - 1


def _up_to(last: int, ids: Tensor) -> Tensor:
    """Positions [1, T] of a document, of which the last token is moved to position `last` if that lies behind it."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    positions[0, -1] = max(last, ids.shape[1] - 1)
    return positions


def _two_each(first: Tensor, second: Tensor) -> Documents:
    """Two rows, each of a document as long as `first` and one as long as `second`."""
    lengths = (first.shape[1], second.shape[1]) * 2
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return Documents(lengths=lengths, starts=starts, places=torch.arange(sum(lengths))).to(first.device)
