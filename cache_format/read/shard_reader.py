"""One shard, opened: every byte is checked against the sidecar before anything parses it."""

from __future__ import annotations

import struct

import pyarrow as pa

from cache_format.cache_errors import CorruptShardError
from cache_format.codecs.encodings import Codec, PackedStreams
from cache_format.codecs.ipc import (
    MAGIC_BYTES,
    buffers_per_column,
    check_expansion,
    message_buffers,
    read_record_batch,
    read_schema,
)
from cache_format.manifest.manifest import (
    ByteRange,
    Manifest,
    RecordBatchInfo,
    Sidecar,
    sha256,
    sidecar_name,
)
from cache_format.manifest.metadata import CacheMetadata
from cache_format.rows.hidden import PREFIX
from cache_format.rows.invariants import find_violation
from cache_format.rows.row_batch import RowBatch
from cache_format.storage.directory import Directory, ShardFile
from cache_format.storage.read_cache import ReadCache


class ShardReader:
    """The record batches of one shard. Has no file position, so threads and forks may share it.

    Raises: CorruptShardError, from every method; OSError if a file is there but the disk or the store fails.
    """

    def __init__(
        self,
        directory: Directory,
        manifest: Manifest,
        index: int,
        codec: Codec,
        hidden_layers: tuple[int, ...] | None = None,
        read_cache: ReadCache | None = None,
    ) -> None:
        self._codec = codec
        self._read_cache = read_cache
        self._metadata = manifest.metadata
        self._name = manifest.shards[index].name
        self._where = directory.path(self._name)
        self.sidecar = self._read_sidecar(directory, manifest, index)
        self._file = self._open(directory)
        self._header = self._checked(self.sidecar.header, "header")
        self._checked(self.sidecar.footer, "footer")
        self._schema = codec.schema
        hidden = manifest.metadata.hidden
        wanted = [] if hidden is None else hidden.columns(hidden_layers)
        self._columns = [
            i for i, name in enumerate(self._schema.names) if not name.startswith(PREFIX) or name in wanted
        ]
        self._check_header()

    def record_batch(self, index: int, streams: PackedStreams | None = None) -> RowBatch:
        """Read, check and decode one record batch; `streams` collects the sizes of packed streams."""
        info, part = self.sidecar.record_batches[index], f"record batch {index}"
        data = self._checked(info, part)
        try:
            self._buffer_bytes(data, info)
            found = read_record_batch(self._header, data, self._columns)
            batch = self._codec.decode(found, info.entries, streams)
        except (ValueError, pa.ArrowException, OSError, struct.error) as error:
            raise self._false(part, _line(error)) from error
        rows = range(info.first_row, info.first_row + info.rows)
        if problem := find_violation(batch, rows, self._metadata):
            raise self._false(part, problem)
        counted = {"tokens": batch.num_tokens, "counted_tokens": batch.num_loss_tokens, "entries": batch.num_entries}
        for name, found in counted.items():
            if found != (expected := getattr(info, name)):
                raise self._false(part, f"{name} is {found}, the sidecar says {expected}")
        return batch

    def check_bytes(self, index: int) -> None:
        """Read one record batch, and compare its checksum."""
        self._checked(self.sidecar.record_batches[index], f"record batch {index}")

    def column_bytes(self) -> dict[str, int]:
        """Compressed bytes of each column; the rest of the file is framing and dictionaries."""
        total = dict.fromkeys(self._schema.names, 0)
        for index, info in enumerate(self.sidecar.record_batches):
            data = self._checked(info, f"record batch {index}")
            try:
                sizes = self._buffer_bytes(data, info)
            except (ValueError, struct.error) as error:
                raise self._false(f"record batch {index}", _line(error)) from error
            for name, size in sizes.items():
                total[name] += size
        return total

    def _elements(self, info: RecordBatchInfo) -> int:
        """Largest number of items of a list column, offsets included."""
        return max(info.rows, info.tokens * self._metadata.num_samples, info.entries) + 1

    def _buffer_bytes(self, data: pa.Buffer, info: RecordBatchInfo) -> dict[str, int]:
        """Compressed bytes by column, after checking the uncompressed sizes that the buffers announce."""
        (message,) = message_buffers(data)
        most = 8 * self._elements(info) + 64  # no item is wider, and Arrow pads to 64 bytes
        state = 0 if self._metadata.hidden is None else self._metadata.hidden.state_bytes
        sizes, first = {}, 0
        for name, count in buffers_per_column(self._schema).items():
            own = slice(first, first + count)
            allowed = most + self._codec.column_overhead(name)
            if name.startswith(PREFIX):
                allowed += info.tokens * state
            if max(message.uncompressed[own], default=allowed + 1) > allowed:
                raise ValueError(f"column {name} expands to more bytes than its entries need")
            sizes[name] = sum(message.compressed[own])
            first += count
        unannounced = self._codec.unannounced_bytes(info.tokens, info.entries)
        check_expansion(sum(message.uncompressed) + unannounced, data.size)
        return sizes

    def _read_sidecar(self, directory: Directory, manifest: Manifest, index: int) -> Sidecar:
        name = sidecar_name(index)
        where = directory.path(name)
        try:
            data = directory.read_bytes(name)
        except FileNotFoundError as error:
            raise self._missing(where, error) from error
        expected = manifest.shards[index].sidecar_sha256
        if sha256(data) != expected:
            raise self._damaged(where, sha256(data), expected)
        sidecar = Sidecar.from_bytes(data, where)
        lexicon = None if manifest.lexicon is None else manifest.lexicon.sha256
        if sidecar.annotations.get("lexicon_sha256") != lexicon:
            raise self._false("sidecar", "it was not packed with the manifest's lexicon")
        shard = manifest.shards[index]
        if not sidecar.is_for(manifest.metadata, index) or sidecar.file_bytes != shard.bytes:
            raise self._false("sidecar", "its rows or bytes are not those of the manifest")
        for total in ("tokens", "counted_tokens", "entries"):
            if getattr(sidecar, total) != getattr(shard, total):
                raise self._false("sidecar", f"its {total} are not those of the manifest")
        return sidecar

    def _open(self, directory: Directory) -> ShardFile:
        try:
            file = directory.open(self._name)
        except FileNotFoundError as error:
            raise self._missing(self._where, error) from error
        if file.size != self.sidecar.file_bytes:
            raise CorruptShardError(
                f"{self._where}: found {file.size} bytes, expected {self.sidecar.file_bytes}: the "
                f"file was cut short or replaced. {self._repair}"
            )
        return file

    def _checked(self, part: ByteRange, name: str) -> pa.Buffer:
        if self._read_cache is not None and (data := self._read_cache.get(part.sha256)) is not None:
            if sha256(data) == part.sha256:
                return data
            self._read_cache.drop(part.sha256)
        found = ""
        for _ in range(self._file.readings):
            try:
                data = self._file.read(part.start, part.stop)
            except FileNotFoundError as error:
                raise self._missing(f"{self._where}, {name}", error) from error
            if (found := sha256(data)) == part.sha256:
                if self._read_cache is not None:
                    self._read_cache.put(part.sha256, data)
                return data
        raise self._damaged(f"{self._where}, {name}", found, part.sha256)

    def _check_header(self) -> None:
        try:
            for message in message_buffers(self._header.slice(MAGIC_BYTES)):
                if max(message.uncompressed, default=0) > 8 * 256 + 64:
                    raise ValueError("a dictionary has more than 256 values")
            required, found = list(self._schema), list(read_schema(self._header))
            extra = found[len(required) :]
            if found[: len(required)] != required or not all(map(_is_optional, extra)):
                raise ValueError("its columns are not those of the manifest's metadata")
        except (ValueError, pa.ArrowException, OSError, struct.error) as error:
            raise self._false("header", _line(error)) from error

    def _missing(self, where: str, error: FileNotFoundError) -> CorruptShardError:
        return CorruptShardError(f"{where}: cannot be read ({_line(error)}), expected by the manifest. {self._repair}")

    def _damaged(self, where: str, found: str, expected: str) -> CorruptShardError:
        return CorruptShardError(
            f"{where}: checksum {found[:8]}…, expected {expected[:8]}…: the file was changed or "
            f"damaged after writing. {self._repair}"
        )

    @property
    def _repair(self) -> str:
        return repair(self._name, self._metadata)

    def _false(self, part: str, problem: str) -> CorruptShardError:
        return CorruptShardError(
            f"{self._where}, {part}: {problem}: the checksums hold, so it was written like this. {self._repair}"
        )


def _is_optional(field: pa.Field) -> bool:
    return bool(field.name.startswith(PREFIX))


def repair(shard: str, metadata: CacheMetadata) -> str:
    return f"Delete {shard} and run {metadata.command} again: it redoes only what is missing."


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
