"""Read rows of a cache by number, in any order. Every byte range is checked when it is first used.

Opening reads only `manifest.json`. A row of a recently used record batch costs a lookup; any other row costs reading,
checking and decoding its record batch. Shuffle within record batches for speed (`Cache.record_batches` lists them).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import Any, overload

import pyarrow as pa

from cache_format.cache_errors import CacheError, CorruptShardError, FormatError
from cache_format.codecs.encodings import Codec, PackedStreams, codec_for
from cache_format.manifest.answers_file import answers_bytes, read_answers, recorded_answers
from cache_format.manifest.documents_file import DOCUMENTS, KeptColumn, kept_columns, read_documents
from cache_format.manifest.manifest import (
    LEXICON,
    MANIFEST,
    PARTIAL_MANIFEST,
    TOKENIZER_DIR,
    Manifest,
    metadata_of,
    sha256,
    sidecar_name,
)
from cache_format.manifest.metadata import CacheMetadata
from cache_format.manifest.stored_head import HEAD, StoredHead
from cache_format.read.read_ahead import ReadAhead
from cache_format.read.shard_reader import ShardReader, repair
from cache_format.rows.row_batch import RowBatch
from cache_format.rows.types import CacheRow
from cache_format.storage.checked_file import damaged, read_checked
from cache_format.storage.directory import Directory, LocalDirectory, open_directory
from cache_format.storage.read_cache import ReadCache

FETCHES = 8  # parallel requests to a remote cache
OPEN_SHARDS = 64  # each holds a memory map, and so a file descriptor


def open_cache(
    path: str | os.PathLike[str],
    *,
    cached_record_batches: int = 8,
    hidden_layers: Sequence[int] | None = None,
    read_cache: ReadCache | None = None,
) -> Cache:
    """Open a finished cache.

    Args:
        path: the directory, or an fsspec URL of it.
        cached_record_batches: number of decoded record batches to keep in memory.
        hidden_layers: layers whose hidden states to decode; default: all layers in the cache.
        read_cache: local copies of a remote cache; ignored for a local one.

    Raises: FormatError if there is no finished cache of this format version.
    """
    directory = open_directory(path)
    try:
        data = directory.read_bytes(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise _no_manifest(directory) from None
    manifest = Manifest.from_bytes(data, directory.path(MANIFEST))
    layers = None if hidden_layers is None else tuple(hidden_layers)
    if isinstance(directory, LocalDirectory):
        read_cache = None
    return Cache(directory, manifest, cached_record_batches, layers, read_cache)


class Cache(Sequence[CacheRow]):
    """The rows of a cache, as a sequence. Safe to pickle, to fork and to share between threads."""

    def __init__(
        self,
        directory: Directory,
        manifest: Manifest,
        cached_record_batches: int,
        hidden_layers: tuple[int, ...] | None = None,
        read_cache: ReadCache | None = None,
    ) -> None:
        self.manifest = manifest
        self._hidden_layers = hidden_layers
        self._directory = directory
        self._cached_record_batches = cached_record_batches
        self._read_cache = read_cache
        self._shard = lru_cache(OPEN_SHARDS)(self._open_shard)
        self._record_batch = lru_cache(cached_record_batches)(self._read_record_batch)
        self._ahead: ReadAhead | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        kept = self._cached_record_batches, self._hidden_layers, self._read_cache
        return Cache, (self._directory, self.manifest, *kept)

    def with_hidden(self, layers: Sequence[int]) -> Cache:
        """The same cache, decoding the hidden states of these layers only."""
        kept = self._cached_record_batches, tuple(layers), self._read_cache
        return Cache(self._directory, self.manifest, *kept)

    def with_states(self, layers: Sequence[int] = ()) -> Cache:
        """The same cache, decoding `layers` and, for hidden targets, the layer of the head."""
        head = self.metadata.head
        wanted = sorted({*layers, *([] if head is None else [head.layer])})
        return self.with_hidden(wanted) if wanted else self

    def __repr__(self) -> str:
        return f"Cache({self.path!r}, rows={self.num_rows}, tokens={self.num_tokens})"

    @property
    def path(self) -> str:
        return self._directory.path()

    @property
    def metadata(self) -> CacheMetadata:
        return self.manifest.metadata

    @property
    def num_rows(self) -> int:
        return self.manifest.num_rows

    @property
    def num_tokens(self) -> int:
        return self.manifest.num_tokens

    @property
    def num_loss_tokens(self) -> int:
        """Number of loss tokens."""
        return self.manifest.num_loss_tokens

    def __len__(self) -> int:
        return self.num_rows

    @overload
    def __getitem__(self, index: int) -> CacheRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[CacheRow]: ...
    def __getitem__(self, index: int | slice) -> CacheRow | list[CacheRow]:
        """`cache[i]`: a CacheRow; `cache[a:b]`: a list of them. Raises: IndexError."""
        rows = range(self.num_rows)[index]
        return self._row(rows) if isinstance(rows, int) else self.rows(rows)

    def rows(self, indices: Sequence[int]) -> list[CacheRow]:
        """The rows `indices`, in that order; each record batch is decoded once."""
        wanted = [range(self.num_rows)[int(index)] for index in indices]
        found = {row: self._row(row) for row in sorted(set(wanted))}
        return [found[row] for row in wanted]

    def fetch(self, rows: Sequence[int]) -> None:
        """Prefetch the record batches of these rows in parallel, at most `cached_record_batches` of them. Does nothing
        for a local cache.

        Raises: CorruptShardError.
        """
        if isinstance(self._directory, LocalDirectory):
            return
        places = sorted({self._place(row)[:2] for row in rows})[: self._cached_record_batches]
        _ = self._codec
        with ThreadPoolExecutor(FETCHES, thread_name_prefix="cache-fetch") as pool:
            list(pool.map(self._shard, sorted({shard for shard, _ in places})))
            list(pool.map(lambda place: self._record_batch(*place), places))

    def expect(self, rows: Iterator[int], record_batches: int, *, threads: int = 1) -> None:
        """Decode ahead in threads for a reader that will read exactly `rows`, in this order and one at a time.

        The first other row ends it. Does nothing for a remote cache, which has `fetch`.

        Args:
            rows: iterated as far as needed.
            record_batches: number of decoded record batches to keep, those in use included.
            threads: largest number of threads that decode.
        """
        self.expect_nothing()
        if isinstance(self._directory, LocalDirectory):
            _ = self._codec
            self._ahead = ReadAhead(rows, self._place, self._read_record_batch, record_batches, threads)

    def expect_nothing(self) -> None:
        """End what `expect` began, and drop the record batches that it has decoded."""
        if (ahead := self._ahead) is not None:
            self._ahead = None
            ahead.close()

    def iter_rows(self) -> Iterator[CacheRow]:
        """All rows in order, without the cache of decoded record batches."""
        for batch in self.iter_record_batches():
            yield from (batch.row(i) for i in range(len(batch)))

    def iter_record_batches(self, streams: PackedStreams | None = None) -> Iterator[RowBatch]:
        """All rows in order, a record batch at a time, as flat arrays.

        Args:
            streams: collects the size of each stream of packed targets.
        """
        for shard in range(len(self.manifest.shards)):
            for index, _ in enumerate(self.metadata.record_batch_rows(shard)):
                yield self._read_record_batch(shard, index, streams)

    def check_bytes(self) -> Iterator[int]:
        """Compare every byte of the shards with its checksum, without decoding; yields the number of rows done.

        Raises: CorruptShardError, FormatError.
        """
        for shard in range(len(self.manifest.shards)):
            reader = self._shard(shard)
            for index, rows in enumerate(self.metadata.record_batch_rows(shard)):
                reader.check_bytes(index)
                yield rows.stop

    def record_batches(self) -> list[tuple[int, int]]:
        """(start_row, stop_row) of each record batch. To shuffle, permute these, then the rows inside a few of them.

        Raises: CorruptShardError if a shard does not have the size that the manifest states.
        """
        self._check_sizes()
        return [
            (rows.start, rows.stop)
            for shard in range(len(self.manifest.shards))
            for rows in self.metadata.record_batch_rows(shard)
        ]

    def column_bytes(self) -> dict[str, int]:
        """Compressed bytes of each column on disk, over all shards."""
        total: dict[str, int] = {}
        for shard in range(len(self.manifest.shards)):
            for name, size in self._shard(shard).column_bytes().items():
                total[name] = total.get(name, 0) + size
        return total

    def tokenizer_files(self) -> dict[str, bytes]:
        """The teacher's tokenizer files, checked. Raises: FormatError."""
        return {
            name: read_checked(self._directory, f"{TOKENIZER_DIR}/{name}", expected)
            for name, expected in self.manifest.tokenizer_files.items()
        }

    def answers(self) -> Iterator[dict[str, Any]]:
        """For generated text, facts about each row (`cache_format.manifest.answers_file`); otherwise nothing.

        Raises: FormatError.
        """
        return read_answers(self._directory, self.metadata)

    def answers_bytes(self) -> bytes | None:
        """Contents of answers.jsonl, checked. Raises: FormatError."""
        recorded = recorded_answers(self.metadata)
        return None if recorded is None else answers_bytes(self._directory, recorded)

    def documents_bytes(self) -> bytes | None:
        """Contents of documents.arrow, checked; None without kept columns. Raises: FormatError."""
        return read_documents(self._directory, self.metadata)

    @cached_property
    def kept(self) -> dict[str, KeptColumn]:
        """The kept columns of the data by name (`cache_format.manifest.documents_file`). Raises: FormatError."""
        data = self.documents_bytes()
        return {} if data is None else kept_columns(data, self.metadata, self._directory.path(DOCUMENTS))

    def head(self) -> StoredHead | None:
        """The teacher's head of a cache of hidden targets, checked; otherwise None. Raises: FormatError."""
        metadata, data = self.metadata, self.head_bytes()
        if metadata.head is None or data is None or metadata.hidden is None:
            return None
        where = self._directory.path(HEAD)
        return StoredHead.of(data, metadata.head, metadata.vocab_size, metadata.hidden.width, where)

    def head_bytes(self) -> pa.Buffer | None:
        """Contents of head.safetensors, checked; a memory map on a local disk. Raises: FormatError."""
        if self.metadata.head is None:
            return None
        expected, where, found = self.metadata.head.sha256, self._directory.path(HEAD), ""
        if self._read_cache is not None and (data := self._read_cache.get(expected)) is not None:
            if sha256(data) == expected:
                return data
            self._read_cache.drop(expected)
        try:
            file = self._directory.open(HEAD)
            if file.size != self.metadata.head.bytes:
                raise damaged(where, f"{file.size:,} bytes, expected {self.metadata.head.bytes:,}")
            for _ in range(file.readings):
                data = file.read(0, file.size)
                if (found := sha256(data)) == expected:
                    if self._read_cache is not None:
                        self._read_cache.put(expected, data)
                    return data
        except FileNotFoundError as error:
            raise damaged(where, "no such file") from error
        raise damaged(where, f"checksum {found[:8]}…, expected {expected[:8]}…")

    @cached_property
    def _codec(self) -> Codec:
        """The codec, with the checked lexicon if the encoding needs one. Raises: FormatError."""
        codec = codec_for(self.metadata)
        if self.manifest.lexicon is None:
            return codec
        data = read_checked(self._directory, LEXICON, self.manifest.lexicon.sha256)
        return codec.with_lexicon(data, self._directory.path(LEXICON))

    def _check_sizes(self) -> None:
        """Compare file sizes with the manifest, so that a list of all record batches is never much longer than the
        files that it describes."""
        sizes = self._directory.sizes("shards")
        for shard in self.manifest.shards:
            if (found := sizes.get(shard.name.rpartition("/")[2])) != shard.bytes:
                problem = f"found {found} bytes, expected {shard.bytes}: the file was cut short or replaced"
                if found is None:
                    problem = "cannot be read (no such file), expected by the manifest"
                raise CorruptShardError(
                    f"{self._directory.path(shard.name)}: {problem}. {repair(shard.name, self.metadata)}"
                )

    def _place(self, row: int) -> tuple[int, int, int]:
        """(shard, record batch in the shard, row in the record batch)."""
        shard, inside = divmod(row, self.metadata.rows_per_shard)
        return shard, *divmod(inside, self.metadata.rows_per_record_batch)

    def _row(self, row: int) -> CacheRow:
        if (ahead := self._ahead) is not None:
            if (found := ahead.row(row)) is not None:
                return found
            self.expect_nothing()
        shard, batch, index = self._place(row)
        return self._record_batch(shard, batch).row(index)

    def _open_shard(self, shard: int) -> ShardReader:
        options = self._hidden_layers, self._read_cache
        return ShardReader(self._directory, self.manifest, shard, self._codec, *options)

    def _read_record_batch(self, shard: int, index: int, streams: PackedStreams | None = None) -> RowBatch:
        return self._shard(shard).record_batch(index, streams)


def _command(directory: Directory) -> str:
    """The command that was writing an unfinished cache; the usual one if its manifest cannot be read."""
    try:
        return metadata_of(directory.read_bytes(PARTIAL_MANIFEST), directory.path(PARTIAL_MANIFEST)).command
    except (CacheError, OSError):
        return "cache-teacher"


def _no_manifest(directory: Directory) -> FormatError:
    where, names = directory.path(), directory.names()
    if PARTIAL_MANIFEST in names:
        shards = set(directory.names("shards"))
        complete = 0
        while sidecar_name(complete).rpartition("/")[2] in shards:
            complete += 1
        return FormatError(
            f"{where}: found an unfinished cache with {complete} complete shards, expected "
            f"manifest.json: the run that wrote it has not ended. Run distill {_command(directory)} again to "
            "continue it."
        )
    if not names and not directory.exists():
        return FormatError(f"{where}: no such directory. Give the one that cache-teacher wrote.")
    return FormatError(f"{where}: found no manifest.json: not a cache. Give the one that cache-teacher wrote.")
