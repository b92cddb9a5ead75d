"""Writing a cache: rows in order, cut into shards, and a manifest when the last row is there.

While it is being written a cache has a `manifest.partial.json` and no `manifest.json`; a shard
exists when its sidecar does. That is all the state there is: a run that was killed anywhere
continues from the directory alone and produces the same bytes, because nothing in a shard depends
on when, or in how many calls, its rows arrived.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from cache_format.card import card
from cache_format.columns import arrow_schema
from cache_format.errors import CacheError, CorruptShardError, MismatchError
from cache_format.invariants import find_invalid_value, find_repeated_token, find_violation
from cache_format.lexicon import LEXICON, Lexicon
from cache_format.manifest import (
    MANIFEST,
    PARTIAL_MANIFEST,
    TOKENIZER_DIR,
    FileInfo,
    Manifest,
    ShardInfo,
    Sidecar,
    check_plain_name,
    manifest_bytes,
    partial_contents,
    sha256,
    shard_name,
    sidecar_name,
)
from cache_format.metadata import CacheMetadata
from cache_format.occupancy import recorded_manifest
from cache_format.row_batch import RowBatch, concatenate
from cache_format.shard_writer import ShardWriter
from cache_format.storage import is_temporary, open_directory, write_bytes
from cache_format.types import CacheRow


class CacheWriter:
    """Writes a cache directory; use it as a context manager.

    Leaving the block normally writes the manifest; leaving it by an exception keeps the complete
    shards, and a writer with `resume=True` goes on from there.

    Args:
        path: a local directory or an fsspec URL; must not exist, or be empty, unless resuming.
        metadata: what is known beforehand; `metadata.corpus["rows"]` rows must be written.
        tokenizer_files: name -> contents, stored under `tokenizer/`.
        resume: continue an unfinished cache, or redo the missing shards of a finished one.

    Raises: CacheError if the directory holds something else or a finished cache; MismatchError if
        the recorded metadata differ.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: CacheMetadata,
        *,
        tokenizer_files: Mapping[str, bytes] | None = None,
        resume: bool = False,
    ) -> None:
        self._directory = open_directory(path)
        self._metadata = metadata
        self._schema = arrow_schema(metadata)
        files = tokenizer_files or {}
        self._tokenizer_files = {check_plain_name(name): sha256(files[name]) for name in files}
        self._complete: dict[int, ShardInfo] = {}
        self._pending: list[CacheRow] = []  # rows of the next record batch
        self._shard: ShardWriter | None = None
        self._waiting: list[RowBatch] = []  # record batches of the unfinished shard, not yet written
        self._lexicon: Lexicon | None = None
        self._lexicon_file: FileInfo | None = None
        self._annotations: dict[str, Any] = {}
        self._finished_bytes = self._finished_tokens = 0

        self._claim(resume)
        self.next_row = self._first_missing(0)
        for name, contents in files.items():
            write_bytes(self._directory, f"{TOKENIZER_DIR}/{name}", contents)

    @property
    def bytes_written(self) -> int:
        """Bytes of shards written by this writer, on disk or on their way."""
        return self._finished_bytes + (self._shard.bytes_written if self._shard else 0)

    @property
    def tokens_written(self) -> int:
        """Tokens in `bytes_written`; rows still waiting for their record batch not included."""
        return self._finished_tokens + (self._shard.tokens_written if self._shard else 0)

    @property
    def complete_rows(self) -> int:
        """Rows of complete shards, found or written."""
        return sum(shard.rows for shard in self._complete.values())

    @property
    def complete_tokens(self) -> int:
        """Tokens of complete shards, found or written."""
        return sum(shard.tokens for shard in self._complete.values())

    def write(self, rows: Sequence[CacheRow]) -> None:
        """Append rows, in order, any number at a time.

        Rows of a shard that is already complete are skipped, so a resuming caller may go on from
        the first `next_row` without looking again. The arrays are kept until their record batch
        is full: do not change them meanwhile.

        Raises: ValueError for a row out of order, or one that breaks a rule of the format.
        """
        num_rows = self._metadata.num_rows
        for row in rows:
            if row.row // self._metadata.rows_per_shard in self._complete:
                continue
            if row.row != self.next_row or row.row >= num_rows:
                raise ValueError(f"row {row.row} given, expected row {self.next_row} of {num_rows}")
            self._pending.append(row)
            self.next_row += 1
            self._flush_if_full()

    def annotate(self, **facts: Any) -> None:
        """Record facts in the sidecar of the shard being written and of those after it."""
        self._annotations.update(facts)

    def abandon_shard(self) -> None:
        """Drop the unfinished shard: `next_row` goes back to its first row."""
        if self._shard or self._pending or self._waiting:
            last_row = self.next_row - 1
            self.next_row = last_row - last_row % self._metadata.rows_per_shard
        if self._shard:
            self._shard.abandon()
            self._shard = None
        self._pending.clear()
        self._waiting.clear()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        missing = self._metadata.num_shards - len(self._complete)
        if missing:
            next_row = self.next_row
            self.abandon_shard()
            if kind is None:
                raise CacheError(
                    f"{self._directory.path()}: rows written up to {next_row}, expected "
                    f"{self._metadata.num_rows}: {missing} shards are incomplete, so there is no "
                    "manifest. Resume to write the rest."
                )
        elif kind is None:
            self._write_manifest()

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
        if metadata.encoding == "packed" and self._lexicon is None:
            if not last_of_shard:
                return
            self._learn_lexicon()
        if self._shard is None:
            self._shard = ShardWriter(self._directory, metadata, self._schema, shard, self._lexicon)
        for each in self._waiting:
            self._shard.write(each)
        self._waiting.clear()
        if last_of_shard:
            self._finished_tokens += self._shard.tokens_written
            sidecar, digest = self._shard.finish(self._annotations | self._shard_facts())
            self._finished_bytes += sidecar.file_bytes
            self._shard = None
            self._complete[shard] = _shard_info(shard, sidecar, digest)
            self.next_row = self._first_missing(shard + 1)

    def _shard_facts(self) -> dict[str, Any]:
        return {} if self._lexicon_file is None else {"lexicon_sha256": self._lexicon_file.sha256}

    def _learn_lexicon(self) -> None:
        """From the first shard that is written, which is why it waits in memory until then."""
        contexts = [np.repeat(batch.input_ids.astype(np.int64), batch.counts) for batch in self._waiting]
        ids = [batch.ids.astype(np.int64) for batch in self._waiting]
        weight = self._metadata.num_rows / sum(len(batch) for batch in self._waiting)
        vocab_size = self._metadata.vocab_size
        self._lexicon = Lexicon.learn(np.concatenate(contexts), np.concatenate(ids), vocab_size, weight)
        data = self._lexicon.to_bytes()
        self._lexicon_file = FileInfo(sha256=sha256(data), bytes=len(data))
        write_bytes(self._directory, LEXICON, data)

    def _first_missing(self, shard: int) -> int:
        while shard in self._complete:
            shard += 1
        return min(shard * self._metadata.rows_per_shard, self._metadata.num_rows)

    def _claim(self, resume: bool) -> None:
        """Make sure that the directory is ours, and find out what is already there."""
        directory, where = self._directory, self._directory.path()
        recorded = recorded_manifest(directory)
        partial = manifest_bytes(self._metadata, self._tokenizer_files)
        if recorded and not resume:
            state = "a finished" if recorded == MANIFEST else "an unfinished"
            raise CacheError(
                f"{where}: found {state} cache, expected an empty directory: nothing was changed. "
                "Choose another directory, or resume."
            )
        if not recorded:
            write_bytes(directory, PARTIAL_MANIFEST, partial)
            return

        data = directory.read_bytes(recorded)
        self._check_same(data, partial, directory.path(recorded))
        for name in [*directory.names(), *(f"shards/{n}" for n in directory.names("shards"))]:
            if is_temporary(name.rpartition("/")[2]):
                directory.remove(name)
        self._find_complete_shards()
        if recorded == MANIFEST:
            if len(self._complete) == self._metadata.num_shards:
                raise CacheError(
                    f"{where}: found a finished cache with all its shards: nothing to resume. "
                    "Choose another directory to make a new one."
                )
            write_bytes(directory, PARTIAL_MANIFEST, partial)
            directory.remove(MANIFEST)

    def _check_same(self, recorded_data: bytes, partial: bytes, where: str) -> None:
        given = partial_contents(partial, where)
        recorded = partial_contents(recorded_data, where)
        recorded = {key: value for key, value in recorded.items() if key in given}
        if differences := _differences("", recorded, given):
            raise MismatchError(
                f"{where}: recorded and given metadata differ: {'; '.join(differences)}: a cache "
                "must be made with the same settings throughout. Choose another directory."
            )

    def _find_complete_shards(self) -> None:
        if self._metadata.encoding == "packed":
            if LEXICON not in self._directory.names():
                return  # without it the shards cannot be read
            data = self._directory.read_bytes(LEXICON)
            self._lexicon = Lexicon.from_bytes(data, self._metadata.vocab_size, self._directory.path(LEXICON))
            self._lexicon_file = FileInfo(sha256=sha256(data), bytes=len(data))
        names = set(self._directory.names("shards"))
        for index in range(self._metadata.num_shards):
            shard, sidecar_file = shard_name(index), sidecar_name(index)
            if not {shard.rpartition("/")[2], sidecar_file.rpartition("/")[2]} <= names:
                continue
            data = self._directory.read_bytes(sidecar_file)
            try:
                sidecar = Sidecar.from_bytes(data, self._directory.path(sidecar_file))
            except CorruptShardError:
                continue  # written again, like any shard without a sidecar
            rows_fit = sidecar.rows == len(self._metadata.shard_rows(index))
            if any(sidecar.annotations.get(key) != value for key, value in self._shard_facts().items()):
                continue  # of another lexicon, which is lost
            if rows_fit and sidecar.file_bytes == self._directory.open(shard).size:
                self._complete[index] = _shard_info(index, sidecar, sha256(data))

    def _write_manifest(self) -> None:
        shards = [self._complete[index] for index in range(self._metadata.num_shards)]
        data = manifest_bytes(self._metadata, self._tokenizer_files, shards, self._lexicon_file)
        manifest = Manifest.from_bytes(data, self._directory.path(MANIFEST))
        write_bytes(self._directory, "README.md", card(manifest).encode())
        write_bytes(self._directory, MANIFEST, data)
        self._directory.remove(PARTIAL_MANIFEST)


def _shard_info(index: int, sidecar: Sidecar, digest: str) -> ShardInfo:
    return ShardInfo(
        name=shard_name(index),
        bytes=sidecar.file_bytes,
        rows=sidecar.rows,
        tokens=sidecar.tokens,
        counted_tokens=sidecar.counted_tokens,
        entries=sidecar.entries,
        sidecar_sha256=digest,
    )


def _differences(prefix: str, recorded: Any, given: Any) -> list[str]:
    if isinstance(recorded, dict) and isinstance(given, dict):
        return [
            difference
            for key in sorted(set(recorded) | set(given))
            for difference in _differences(f"{prefix}.{key}" if prefix else key, recorded.get(key), given.get(key))
        ]
    if recorded == given:
        return []
    return [f"{prefix} recorded {_short(recorded)}, given {_short(given)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
