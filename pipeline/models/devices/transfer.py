"""Copies between the host and a CUDA device that the host does not wait for.

A copy is asynchronous only if the host's memory is pinned. torch keeps freed pinned memory until the copies that use it
have happened (`record_event` of its host allocator), so an upload's buffer may be dropped at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; a view as another dtype must begin at a multiple of its size


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of the host on `device`; to a CUDA device as one copy, from one pinned buffer.

    On the CPU they are the given ones.
    """
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=True)

    def places(memory: Tensor) -> list[Tensor]:
        parts = zip(starts, tensors, strict=True)
        return [memory[start : start + each.nbytes].view(each.dtype).view(each.shape) for start, each in parts]

    for place, tensor in zip(places(buffer), tensors, strict=True):
        place.copy_(tensor)
    return places(buffer.to(device, non_blocking=True))


def download(tensor: Tensor) -> Tensor:
    """A tensor on the host; from a CUDA device complete only once an event recorded after this call has happened."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def recorded_event(device: torch.device) -> torch.cuda.Event | None:
    """An event that happens once everything has that was asked of `device` so far; None if it is not a CUDA device.

    A thread that waits for it sleeps, instead of taking a core.
    """
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event
