"""Writes one shard: record batches to an Arrow IPC file, and the sidecar that describes its bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import pyarrow as pa

from cache_format.cache_errors import CacheError
from cache_format.codecs.encodings import Codec
from cache_format.codecs.ipc import check_expansion, cut_points, message_buffers
from cache_format.manifest.manifest import (
    ByteRange,
    RecordBatchInfo,
    Sidecar,
    sha256,
    shard_name,
    sidecar_name,
)
from cache_format.rows.row_batch import RowBatch
from cache_format.storage.directory import Directory, write_bytes


class ShardWriter:
    """Owns the file of the shard that is being written. Call `finish` or `abandon` at the end.

    Attributes:
        bytes_written: so far; another thread may read it.
    """

    def __init__(
        self,
        directory: Directory,
        codec: Codec,
        index: int,
    ) -> None:
        self.index = index
        self._directory, self._codec = directory, codec
        self._creation: AbstractContextManager[str] = directory.create(shard_name(index))
        self._path = self._creation.__enter__()
        level = codec.metadata.compression["level"]
        options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=level))
        self._sink = pa.OSFile(self._path, "wb")
        self._arrow = pa.ipc.new_file(self._sink, codec.schema, options=options)
        self._counts: list[dict[str, Any]] = []  # of each record batch
        self.bytes_written = int(self._sink.tell())

    @property
    def tokens_written(self) -> int:
        return sum(counts["tokens"] for counts in self._counts)

    def write(self, batch: RowBatch) -> None:
        """Append a record batch. Raises: ValueError; then nothing has been written."""
        self._arrow.write_batch(self._codec.encode(batch))
        self._counts.append(
            {
                "first_row": int(batch.rows[0]),
                "rows": len(batch),
                "tokens": batch.num_tokens,
                "counted_tokens": batch.num_loss_tokens,
                "entries": batch.num_entries,
            }
        )
        self.bytes_written = int(self._sink.tell())

    def finish(self, annotations: Mapping[str, Any]) -> tuple[Sidecar, str]:
        """Rename the shard to its final name, then write its sidecar. Returns the sidecar and its sha256."""
        self._arrow.close()
        self._sink.close()
        sidecar = self._describe(annotations)
        self._creation.__exit__(None, None, None)
        data = sidecar.to_bytes()
        write_bytes(self._directory, sidecar_name(self.index), data)
        return sidecar, sha256(data)

    def abandon(self) -> None:
        """Discard the shard; leaves no files behind."""
        with contextlib.suppress(OSError):  # a full disk, which may be why the shard is abandoned
            self._sink.close()
        reason = CacheError("shard abandoned")
        self._creation.__exit__(CacheError, reason, None)

    def _describe(self, annotations: Mapping[str, Any]) -> Sidecar:
        # Hash what is in the file, not what was meant to be written.
        cuts = cut_points(self._path)
        with pa.memory_map(self._path) as file:
            data = file.read_buffer()

        def checked(start: int, stop: int) -> dict[str, Any]:
            return {"start": start, "stop": stop, "sha256": sha256(data.slice(start, stop - start))}

        batches = tuple(
            RecordBatchInfo(**checked(start, stop), **counts)
            for (start, stop), counts in zip(pairwise(cuts), self._counts, strict=True)
        )
        total = {
            name: sum(counts[name] for counts in self._counts)
            for name in ("rows", "tokens", "counted_tokens", "entries")
        }
        for batch in batches:  # never write what readers would reject
            (message,) = message_buffers(data.slice(batch.start, batch.stop - batch.start))
            expanded = sum(message.uncompressed) + self._codec.unannounced_bytes(batch.tokens, batch.entries)
            check_expansion(expanded, batch.stop - batch.start)
        return Sidecar(
            file_bytes=data.size,
            first_row=self._counts[0]["first_row"],
            **total,
            header=ByteRange(**checked(0, cuts[0])),
            record_batches=batches,
            footer=ByteRange(**checked(cuts[-1], data.size)),
            annotations=dict(annotations),
        )
