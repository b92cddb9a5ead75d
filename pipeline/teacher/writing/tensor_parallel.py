"""One teacher split over several processes: all of them compute every batch, the first one writes.

The first process claims shards and broadcasts their numbers. The others discard the targets that they compute. All
processes run the same batches in the same order, because the layers of the teacher are collective.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed

import cache_format as cf

NONE_LEFT = -1


class Leader:
    """The writer of the first process: passes everything on to `writer`, and broadcasts every shard that it begins."""

    def __init__(self, writer: cf.CacheWriter, device: torch.device) -> None:
        self._writer, self._device = writer, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def begin_shard(self, *, wait: bool = True) -> int | None:
        shard = self._writer.begin_shard(wait=wait)
        _broadcast(NONE_LEFT if shard is None else shard, self._device)
        return shard

    def __enter__(self) -> Leader:
        self._writer.__enter__()
        return self

    def __exit__(self, *what: Any) -> None:
        self._writer.__exit__(*what)


class Follower:
    """Takes the place of the writer in the other processes: follows the first one, and writes nothing."""

    bytes_written = tokens_written = 0
    taken_over: Sequence[Any] = ()
    is_finished = True
    wrote_manifest = False
    complete = cf.CacheSize(shards=0, rows=0, tokens=0, counted_tokens=0, bytes=0)

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def begin_shard(self, *, wait: bool = True) -> int | None:
        """The shard that the first process begins, which asks in the same way."""
        shard = _broadcast(NONE_LEFT, self._device)
        return None if shard == NONE_LEFT else shard

    def complete_without(self, shards: Collection[int]) -> cf.CacheSize:
        return self.complete

    def annotate(self, **_: Any) -> None:
        """Does nothing: the first process writes."""

    def write(self, rows: Sequence[cf.CacheRow]) -> None:
        """Does nothing: the first process writes."""

    def abandon_shard(self) -> None:
        """Nothing to drop: the first process writes."""

    def __enter__(self) -> Follower:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing to close."""


def _broadcast(shard: int, device: torch.device) -> int:
    """The `shard` that the first process passes, on every process."""
    number = torch.tensor([shard], device=device if device.type == "cuda" else "cpu")
    torch.distributed.broadcast(number, src=0)
    return int(number.item())
