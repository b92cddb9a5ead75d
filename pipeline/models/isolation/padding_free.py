"""Whether a model can run on documents that lie end to end, found by running it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.models.devices.precision import full_float32
from pipeline.models.head import Head, deviation, deviation_of_most, evaluating, probing, tolerance
from pipeline.models.isolation.document_attention import Documents, attends_by_document, forget_documents, longest_reach
from pipeline.models.padding import pad_rows

PROBE_LENGTHS = (9, 1, 6, 2)

GRADIENT_SHARE = 0.25
"""Rounding to bfloat16 changes a gradient by some percent; documents that mix change it altogether."""

logger = logging.getLogger("distill")


@dataclass(frozen=True)
class _Row:
    input_ids: np.ndarray
    segment_lengths: np.ndarray


def without_padding(head: Head, longest: int, *, wanted: bool | None, device: torch.device) -> Head:
    """The head, padding-free if `padding_free` asks for it or, by default, if device and model allow it.

    Args:
        longest: tokens of the longest row.
        wanted: the option; None: on CUDA and CPUs, where the model allows it.
        device: that the model will run on.

    Raises:
        ConfigError: it is wanted, and the model cannot.
    """
    if wanted is False or (wanted is None and device.type not in ("cuda", "cpu")):
        return head
    free = padding_free(head, longest)
    if free is None and wanted:
        raise ConfigError(
            f"`padding_free`: {type(head.model).__name__} gives documents laid end to end different states "
            "than each has alone: its layers do not use transformers' attention interface, or mix tokens in "
            "another way. Leave it out."
        )
    return free or head


def or_padded(head: Head, *, wanted: bool | None, dtype: torch.dtype | None) -> Head:
    """A padding-free head of a model on the device that trains it, or the same head with padded batches.

    Models are loaded and tested in float32. Under autocast to 16 bits, a GPU computes their attention with another
    kernel, and its gradient: both are tried here, before the first step.

    Args:
        wanted: as in `without_padding`.
        dtype: of autocast in training; None: no autocast.

    Raises:
        ConfigError: it is wanted, and states or gradients are wrong.
    """
    try:
        fault = _fault_in_training(head, dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # kernels and drivers are at work, which fail in ways of their own
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if fault is None:
        return head
    what = f"{type(head.model).__name__} cannot be trained without padding on {head.device}: {fault}"
    if wanted:
        raise ConfigError(f"`padding_free`: {what}. Leave it out.")
    logger.warning("%s. Batches are padded instead", what)
    forget_documents(head.model)
    return replace(head, padding_free=False)


def _fault_in_training(head: Head, dtype: torch.dtype | None) -> str | None:
    """What differs, by more than rounding explains, from documents that are run one by one."""
    rows, documents = _rows_of_two(head, PROBE_LENGTHS)
    there = Documents.of_rows(rows).to(head.device)
    weight = next((each for each in head.body.parameters() if each.requires_grad), None)
    autocast = torch.autocast(head.device.type, dtype, enabled=dtype is not None)
    with evaluating(head.model), full_float32(), autocast:
        expected, its_gradient = _with_gradient(_alone(replace(head, padding_free=False), documents), weight)
        inputs = (each.to(head.device) for each in pad_rows(rows))
        found, gradient = _with_gradient(there.flat(head.hidden_states(*inputs, documents=there))[0], weight)
    expected = expected.to(dtype or expected.dtype)
    off, allowed = deviation_of_most(found, expected), tolerance(expected, roundings=16)
    if not off <= allowed:
        return f"hidden states differ by {off:.2g} (allowed {allowed:.2g})"
    off, allowed = (gradient - its_gradient).norm().item(), GRADIENT_SHARE * its_gradient.norm().item()
    return None if off <= allowed else f"a gradient differs by {off:.2g} (allowed {allowed:.2g})"


def _with_gradient(states: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """States [N, D], and the gradient of some sum over them; zero if nothing is trained."""
    gradient = torch.zeros(())
    if weight is not None and states.requires_grad:
        directions = torch.arange(states.numel(), device=states.device).view_as(states).sin()
        (gradient,) = torch.autograd.grad((states.float() * directions).sum(), weight)
    return states.detach(), gradient.float()


def padding_free(head: Head, longest: int) -> Head | None:
    """The same head, run on documents that lie end to end (`document_attention`); None if the model cannot.

    It is tested on two rows of two documents, against each document by itself with the model's own attention. One of
    them is longer than the model's windows, as far as rows are.

    Args:
        longest: tokens of the longest row.
    """
    if head.masked:
        return None
    model = head.model
    first = max(9, min(longest, longest_reach(model.config) + 8))
    rows, documents = _rows_of_two(head, (first, *PROBE_LENGTHS[1:]))
    with probing(model):
        expected = _alone(head, documents)
        if not attends_by_document(model):
            return None
        free, there = replace(head, padding_free=True), Documents.of_rows(rows).to(head.device)
        try:
            found = free.hidden_states(*(each.to(head.device) for each in pad_rows(rows)), documents=there)
            works = deviation(there.flat(found)[0], expected) <= tolerance(expected, roundings=16)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            works = False  # its layers do not pass on where documents begin, or need what is not computed by document
    if not works:
        forget_documents(model)
    return free if works else None


def _rows_of_two(head: Head, lengths: Sequence[int]) -> tuple[list[_Row], list[Tensor]]:
    """Documents [1, T] of random tokens, and rows of two each."""
    generator = torch.Generator().manual_seed(4)
    documents = [torch.randint(head.vocab_size, (1, n), generator=generator) for n in lengths]
    starts = range(0, len(lengths), 2)
    rows = [_Row(torch.cat(documents[i : i + 2], dim=1)[0].numpy(), np.array(lengths[i : i + 2])) for i in starts]
    return rows, documents


def _alone(head: Head, documents: Sequence[Tensor]) -> Tensor:
    """[N, D] the states of documents that are run one by one."""
    device = head.device
    states = [head.hidden_states(ids.to(device), torch.arange(ids.shape[1], device=device)[None]) for ids in documents]
    return torch.cat(states, dim=1)[0]
