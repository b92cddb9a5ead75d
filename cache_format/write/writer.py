"""Write a cache: rows in order, cut into shards, and a manifest after the last row.

The bytes of a shard do not depend on when, by whom or in how many calls its rows were written. So a killed run
continues from the directory alone (`cache_format.write.unfinished`) and ends with the same bytes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import Any

from cache_format.cache_errors import CacheError, ClaimLostError
from cache_format.manifest.manifest import check_plain_name, sha256
from cache_format.manifest.metadata import CacheMetadata
from cache_format.rows.invariants import find_invalid_value, find_repeated_token, find_violation
from cache_format.rows.row_batch import RowBatch, concatenate
from cache_format.rows.types import CacheRow
from cache_format.storage.claims import STALE_AFTER_S, WHOLE, Claims, Holder
from cache_format.storage.directory import Buffer, open_directory
from cache_format.wording import quantity
from cache_format.write.occupancy import claim_alone, recorded_manifest
from cache_format.write.shard_writer import ShardWriter
from cache_format.write.unfinished import CacheSize, UnfinishedCache, shard_info


class CacheWriter:
    """Writes a cache directory as its only writer. Use it as a context manager.

    Leaving the block normally writes the manifest. Leaving it by an exception keeps the complete shards, and a writer
    with `resume=True` continues from there. One thread may write while another begins shards, reads properties, or
    abandons what is unfinished.

    Args:
        path: a local directory or an fsspec URL; must not exist, or be empty, unless resuming.
        metadata: exactly `metadata.corpus["rows"]` rows must be written.
        tokenizer_files: name -> contents, stored under `tokenizer/`.
        head: contents of head.safetensors for hidden targets; not needed if the file exists.
        resume: continue an unfinished cache, or redo the missing shards of a finished one.
        allow_finished: accept a finished cache of the same metadata, and write nothing.
        allow_rounding: continue although device, threads, batch size or library versions differ; the sidecars of the
            new shards record it.
        stale_after_s: seconds of silence after which a writer on another machine counts as gone.
        encoding_threads: largest number of threads that encode. With more than one, a value that cannot be encoded may
            raise its ValueError in a later call of `write`, and the shard is to be abandoned.

    Raises: CacheError if the directory holds something else or a finished cache, or if somebody else is writing it;
        MismatchError if the recorded metadata differ.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: CacheMetadata,
        *,
        tokenizer_files: Mapping[str, bytes] | None = None,
        head: Buffer | None = None,
        resume: bool = False,
        allow_finished: bool = False,
        allow_rounding: bool = False,
        stale_after_s: float = STALE_AFTER_S,
        encoding_threads: int = 1,
    ) -> None:
        self._directory, self._encoding_threads = open_directory(path), encoding_threads
        files = tokenizer_files or {}
        digests = {check_plain_name(name): sha256(files[name]) for name in files}
        self._pending: list[CacheRow] = []  # rows of the next record batch
        self._shard: ShardWriter | None = None
        self._waiting: list[RowBatch] = []  # record batches of the unfinished shard, not yet written
        self._annotations: dict[str, Any] = {}
        self._finished_bytes = self._finished_tokens = 0
        self._guard = threading.RLock()
        self._closed = False
        self._cache = UnfinishedCache(self._directory, metadata, digests, allow_rounding=allow_rounding)
        self._claims = Claims(self._directory, stale_after_s)

        recorded_manifest(self._directory)  # raises for a directory that is not a cache
        try:
            self._begin(resume)
            if self._cache.is_finished and not allow_finished:
                raise CacheError(
                    f"{self._directory.path()}: found a finished cache with all its shards: nothing to resume. "
                    "Choose another directory to make a new one."
                )
            self._cache.write_tokenizer(files)
            self._cache.write_head(head)
        except BaseException:
            self._claims.close()
            raise
        self.next_row = self._first_missing(0)
        self._ahead = 0  # the first shard that `begin_shard` has not returned

    @property
    def bytes_written(self) -> int:
        """Bytes of shards written by this writer, the unfinished shard included."""
        shard = self._shard  # read once: another thread may be finishing it
        return self._finished_bytes + (shard.bytes_written if shard else 0)

    @property
    def tokens_written(self) -> int:
        """Tokens in `bytes_written`, without rows that wait for their record batch."""
        shard = self._shard
        return self._finished_tokens + (shard.tokens_written if shard else 0)

    @property
    def complete(self) -> CacheSize:
        """Size of the complete shards, whoever wrote them."""
        return self._cache.size()

    def complete_without(self, shards: Collection[int]) -> CacheSize:
        """`complete`, with some shards left out."""
        return self._cache.size(without=shards)

    @property
    def is_finished(self) -> bool:
        """Whether the manifest exists; valid after the block."""
        return self._cache.is_finished

    @property
    def wrote_manifest(self) -> bool:
        """Whether this writer finished the cache; a single writer also returns True if it was finished before."""
        return self._cache.is_finished

    @property
    def taken_over(self) -> list[Holder]:
        """Dead writers whose claims were taken over."""
        return self._claims.taken_over

    def begin_shard(self, *, wait: bool = True) -> int | None:
        """The next shard to compute; None if none is left.

        Several shards may be begun before the first of them is written; they must be written in this order.

        Args:
            wait: for other writers, where there are any; False: None means that no shard is free now.
        """
        with self._guard:
            while self._ahead in self._cache.complete:
                self._ahead += 1
            if self._ahead >= self._metadata.num_shards:
                return None
            self._ahead += 1
            return self._ahead - 1

    def write(self, rows: Sequence[CacheRow]) -> None:
        """Append rows, in order, any number at a time.

        Rows of complete shards are skipped, so a resuming caller may start at the first `next_row` and write all rows
        after it. Do not change the arrays until their record batch is full.

        Raises: ValueError for a row out of order, or one that breaks a rule of the format; ClaimLostError if another
            writer has taken over; the shard is then dropped. Call `abandon_shard` before the next shard is begun.
        """
        num_rows = self._metadata.num_rows
        with self._guard:
            for row in rows:
                if row.row // self._metadata.rows_per_shard in self._cache.complete:
                    continue
                if self._closed or row.row != self.next_row or row.row >= num_rows:
                    raise ValueError(f"row {row.row} given, expected row {self.next_row} of {num_rows}")
                self._pending.append(row)
                self.next_row += 1
                self._flush_if_full()

    def annotate(self, **facts: Any) -> None:
        """Record facts in the sidecar of the shard being written and of those after it; for the thread that writes."""
        self._annotations.update(facts)

    def recorded_fact(self, name: str) -> Any:
        """What the last of the complete shards was annotated with under this name; None: nothing."""
        return self._cache.recorded_fact(name)

    def abandon_shard(self) -> None:
        """Drop the unfinished shard and set `next_row` to its first row. All shards that were begun and are incomplete
        are to be begun again."""
        with self._guard:
            if self._shard or self._pending or self._waiting:
                last_row = self.next_row - 1
                self.next_row = last_row - last_row % self._metadata.rows_per_shard
            shard, self._shard = self._shard, None
            self._pending.clear()
            self._waiting.clear()
            self._ahead = self.next_row // self._metadata.rows_per_shard
            if shard:
                shard.abandon()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            next_row = self.next_row
            with self._guard:  # wait for a thread that is writing
                self._closed = True
                self.abandon_shard()
            if kind is None:
                self._end(next_row)
        finally:
            self._claims.close()

    @property
    def _metadata(self) -> CacheMetadata:
        return self._cache.metadata

    def _begin(self, resume: bool) -> None:
        """Claim the directory and find its complete shards."""
        claim_alone(self._directory, self._claims)
        self._cache.begin(resume=resume)
        self._cache.remove_temporary()

    def _end(self, next_row: int) -> None:
        if missing := self._metadata.num_shards - len(self._cache.complete):
            raise CacheError(
                f"{self._directory.path()}: rows written up to {next_row}, expected "
                f"{self._metadata.num_rows}: {quantity(missing, 'incomplete shard')}, so there is no "
                "manifest. Resume to write the rest."
            )
        self._cache.finish(self._claims)

    def _claim_of(self, shard: int) -> str:
        """Name of the claim under which a shard is written."""
        return WHOLE

    def _after_shard(self, shard: int) -> None:
        self.next_row = self._first_missing(shard + 1)

    def _flush_if_full(self) -> None:
        metadata, next_row = self._metadata, self.next_row
        shard = (next_row - 1) // metadata.rows_per_shard
        rows = metadata.shard_rows(shard)
        last_of_shard = next_row == rows.stop
        if (next_row - rows.start) % metadata.rows_per_record_batch and not last_of_shard:
            return
        batch = concatenate(self._pending)
        expected = range(next_row - len(self._pending), next_row)
        for find in (find_violation, find_invalid_value, find_repeated_token):
            if problem := find(batch, expected, metadata):
                raise ValueError(problem)
        self._waiting.append(batch)
        self._pending.clear()
        if self._cache.codec.needs_lexicon:
            if not last_of_shard:
                return  # the lexicon is learned from all of shard 0, which waits in memory until then
            self._cache.learn_lexicon(self._waiting)
        if self._shard is None:
            self._shard = ShardWriter(self._directory, self._cache.codec, shard, self._encoding_threads)
        for each in self._waiting:
            self._shard.write(each)
        self._waiting.clear()
        if last_of_shard:
            self._publish(shard)

    def _publish(self, index: int) -> None:
        assert self._shard is not None
        if self._claims.lost(self._claim_of(index)):
            raise self._lost(index)
        try:
            sidecar, digest = self._shard.finish(self._annotations | self._cache.shard_facts())
        except FileNotFoundError as error:  # a writer that takes over removes unfinished files
            if self._claims.lost(self._claim_of(index)):
                raise self._lost(index) from error
            raise
        self._shard = None
        self._finished_bytes += sidecar.file_bytes
        self._finished_tokens += sidecar.tokens
        self._cache.complete[index] = shard_info(index, sidecar, digest)
        self._after_shard(index)

    def _lost(self, index: int) -> ClaimLostError:
        CacheWriter.abandon_shard(self)  # what was begun beyond it is the caller's to abandon
        return ClaimLostError(
            f"{self._directory.path()}: shard {index} was taken over by another writer, because this process gave "
            f"no sign of life for {self._claims.stale_after_s:.0f} seconds. Nothing is lost: run the command again."
        )

    def _first_missing(self, shard: int) -> int:
        while shard in self._cache.complete:
            shard += 1
        return min(shard * self._metadata.rows_per_shard, self._metadata.num_rows)
