"""One teacher split over several processes: all of them compute every batch, the first one writes.

The first process claims shards and tells the others which; what they compute of its targets they throw away. All go
through the same batches in the same order, since the layers of the teacher are collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed

import cache_format as cf

NONE_LEFT = -1


class Leader:
    """The writer of the first process: as the one it was given, but every shard it begins is told to the others."""

    def __init__(self, writer: cf.CacheWriter, device: torch.device) -> None:
        self._writer, self._device = writer, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def begin_shard(self) -> int | None:
        shard = self._writer.begin_shard()
        _tell(NONE_LEFT if shard is None else shard, self._device)
        return shard

    def __enter__(self) -> Leader:
        self._writer.__enter__()
        return self

    def __exit__(self, *what: Any) -> None:
        self._writer.__exit__(*what)


class Follower:
    """What the other processes have instead of a writer."""

    bytes_written = tokens_written = 0
    taken_over: Sequence[Any] = ()
    is_finished = True
    wrote_manifest = False
    complete = cf.CacheSize(shards=0, rows=0, tokens=0, counted_tokens=0, bytes=0)

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def begin_shard(self) -> int | None:
        shard = _tell(NONE_LEFT, self._device)
        return None if shard == NONE_LEFT else shard

    def annotate(self, **_: Any) -> None:
        """The first process does."""

    def write(self, rows: Sequence[cf.CacheRow]) -> None:
        """The first process does."""

    def abandon_shard(self) -> None:
        """There is none."""

    def __enter__(self) -> Follower:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing was opened."""


def _tell(shard: int, device: torch.device) -> int:
    """What the first process says."""
    said = torch.tensor([shard], device=device if device.type == "cuda" else "cpu")
    torch.distributed.broadcast(said, src=0)
    return int(said.item())
