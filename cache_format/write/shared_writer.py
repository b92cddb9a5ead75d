"""Several writers of one cache, on one machine or many, that coordinate only through the directory.

Each writer claims a shard, writes it and claims the next, until all shards are complete; then one of them writes the
manifest. Writers may join and leave at any time. A writer that dies leaves its claim behind, and another one takes it
over once it is stale (`cache_format.storage.claims`). The last writers therefore stay and wait, and the cache gets
finished as long as one writer is alive. There is no communication, no fixed order and no leader.

The packed encoding needs a lexicon, which is learned from shard 0. Until it exists only shard 0 is written, and the
other writers wait for as long as one shard takes.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from cache_format.cache_errors import CacheError
from cache_format.manifest.metadata import CacheMetadata
from cache_format.storage.claims import STALE_AFTER_S, WHOLE, Holder, pauses, refused
from cache_format.storage.directory import Buffer
from cache_format.write.unfinished import ENDING, claim_name
from cache_format.write.writer import CacheWriter


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which shards a writer writes, and which of them it writes first."""

    index: int = 0  # of `count` writers; first shards with (number - first) % count == index, then the rest
    count: int = 1
    first: int = 0  # first shard to write
    stop: int | None = None  # end of the range (exclusive); None: no limit

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"writer {self.index} of {self.count}: the first is 0, the last {self.count - 1}")
        if self.first < 0 or (self.stop is not None and self.stop <= self.first):
            raise ValueError(f"shards {self.first} to {self.stop}: none")

    def shards(self, num_shards: int) -> range:
        return range(min(self.first, num_shards), num_shards if self.stop is None else min(self.stop, num_shards))

    def in_order(self, num_shards: int) -> Iterator[int]:
        mine = range(self.first + self.index, num_shards, self.count)
        shards = self.shards(num_shards)
        yield from (shard for shard in mine if shard in shards)
        yield from (shard for shard in shards if shard not in mine)


class SharedCacheWriter(CacheWriter):
    """One of several writers of a cache. Like `CacheWriter`, but the caller asks `begin_shard` which shard to write,
    writes its rows, and repeats until it returns None.

    Leaving the block normally finishes the cache if all shards are complete.

    Args:
        share: shards to write.
        on_wait: called with the writers that are being waited for, each time they change.

    Raises: CacheError if the directory holds something else, or if a `CacheWriter` is writing it; MismatchError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: CacheMetadata,
        *,
        share: Share,
        tokenizer_files: Mapping[str, bytes] | None = None,
        head: Buffer | None = None,
        allow_rounding: bool = False,
        stale_after_s: float = STALE_AFTER_S,
        encoding_threads: int = 1,
        on_wait: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._share, self._on_wait = share, on_wait
        # Claimed and incomplete: begun, in the order of writing; and abandoned, to be begun again.
        self._begun: list[int] = []
        self._abandoned: list[int] = []
        super().__init__(
            path,
            metadata,
            tokenizer_files=tokenizer_files,
            head=head,
            resume=True,
            allow_finished=True,
            allow_rounding=allow_rounding,
            stale_after_s=stale_after_s,
            encoding_threads=encoding_threads,
        )
        self.next_row = metadata.num_rows  # until a shard is begun
        if self._share.first >= metadata.num_shards:
            self._claims.close()
            raise CacheError(
                f"{self._directory.path()}: shards from {self._share.first} on are asked for, it has "
                f"{metadata.num_shards}, numbered from 0. Ask for some of those."
            )

    @property
    def wrote_manifest(self) -> bool:
        return self._cache.wrote_manifest

    def begin_shard(self, *, wait: bool = True) -> int | None:
        """Claims and returns the next free shard of this writer's share, first those that it has abandoned. None once
        all are complete.

        Args:
            wait: while others write the remaining shards, in case they die. Write the shards that were begun before:
                this writer would wait for itself.
        """
        said, since = "", time.monotonic()
        for pause in pauses():
            # Without our own: if another writer has taken one over, writing it fails with that reason.
            self._cache.find_complete(without=tuple(self._begun))
            share = self._share.shards(self._metadata.num_shards)
            if all(shard in self._cache.complete for shard in share):
                return None
            shard, busy = self._claim_next()
            if shard is not None:
                with self._guard:
                    self._begun.append(shard)
                    self._go_on()
                return shard
            if not wait:
                return None
            self._check_lexicon_will_come(busy, time.monotonic() - since)
            waiting_for = f"waiting for {_few(busy)}"
            if busy and waiting_for != said:
                said = waiting_for
                self._on_wait(said)
            time.sleep(pause)
        raise AssertionError

    def _begin(self, resume: bool) -> None:
        self._check_nobody_alone()
        self._cache.begin(resume=resume)

    def _end(self, next_row: int) -> None:
        if not self._cache.is_complete:
            self._cache.find_complete()
        if not self._cache.is_complete:
            return
        for pause in pauses():
            if self._claims.take(ENDING) is None:
                self._cache.finish(self._claims)
                return
            if self._cache.is_finished:
                return
            time.sleep(pause)

    def _claim_of(self, shard: int) -> str:
        return claim_name(shard)

    def _after_shard(self, shard: int) -> None:
        self._claims.release(claim_name(shard))
        self._begun.remove(shard)
        self._go_on()

    def abandon_shard(self) -> None:
        with self._guard:
            super().abandon_shard()
            for shard in self._begun:
                if self._claims.lost(claim_name(shard)):
                    self._claims.release(claim_name(shard))
                else:
                    self._abandoned.append(shard)
            self._begun.clear()
            self._go_on()

    def _go_on(self) -> None:
        """Sets `next_row` for the first shard that was begun, unless some of its rows have been written."""
        if not self._begun:
            self.next_row = self._metadata.num_rows
        elif self.next_row not in self._metadata.shard_rows(self._begun[0]):
            self.next_row = self._metadata.shard_rows(self._begun[0]).start

    def _claim_next(self) -> tuple[int | None, list[Holder]]:
        """Claims the next free shard, if there is one. Returns: it, and the holders of the shards that are taken."""
        busy: list[Holder] = []
        with self._guard:
            while self._abandoned:
                shard = self._abandoned.pop(0)
                if shard not in self._cache.complete:
                    return shard, busy
                self._claims.release(claim_name(shard))
            ours = set(self._begun)
        only_the_first = self._cache.codec.needs_lexicon
        for shard in self._share.in_order(self._metadata.num_shards):
            if shard in self._cache.complete or shard in ours or (only_the_first and shard > 0):
                continue
            name = claim_name(shard)
            if (holder := self._claims.take(name)) is not None:
                busy.append(holder)
                continue
            if self._cache.look_for(shard):  # completed between the check and the claim
                self._claims.release(name)
                continue
            try:
                self._check_nobody_alone()
            except CacheError:
                self._claims.release(name)
                raise
            self._cache.remove_temporary(f"{name}.")
            return shard, busy
        if only_the_first and 0 not in self._share.shards(self._metadata.num_shards):
            busy = [holder for holder in self._claims.others() if holder.name == claim_name(0)]
        return None, busy

    def _check_nobody_alone(self) -> None:
        for holder in self._claims.others():
            if holder.name == WHOLE:
                raise refused(self._directory, holder, self._claims.stale_after_s)

    def _check_lexicon_will_come(self, busy: list[Holder], waited_s: float) -> None:
        if self._cache.codec.needs_lexicon and not busy and waited_s > self._claims.stale_after_s:
            raise CacheError(
                f"{self._directory.path()}: packed shards need the lexicon that shard 0 teaches; it is not there, and "
                "nobody writes it, or may with these shards asked for. Write shard 0 first."
            )


def parse_shard_range(text: str) -> tuple[int, int | None]:
    """`A:B`, `A:` or `:B`. Raises: ValueError."""
    found = re.fullmatch(r"(\d*):(\d*)", text)
    if found is None or text == ":":
        raise ValueError(f"{text!r} is not a range of shards such as 0:100, 100: or :100")
    first, stop = (int(number) if number else None for number in found.groups())
    return first or 0, stop


def _few(holders: list[Holder]) -> str:
    named = "; ".join(f"{holder.name}: {holder}" for holder in holders[:2])
    return named + (f" and {len(holders) - 2} more" if len(holders) > 2 else "")
