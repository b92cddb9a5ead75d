"""Writes one shard: record batches to an Arrow IPC file, and the sidecar that describes its bytes."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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

    Args:
        threads: that encode record batches, if more than one; this many are then kept in memory at most.

    Attributes:
        bytes_written: so far; another thread may read it.
    """

    def __init__(
        self,
        directory: Directory,
        codec: Codec,
        index: int,
        threads: int = 1,
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
        # Threads are started when all others are busy, so no more than encoding needs.
        self._threads = ThreadPoolExecutor(threads, "cache-encoder") if threads > 1 else None
        self._most_encoding = threads
        self._encoding: deque[tuple[RowBatch, Future[pa.RecordBatch]]] = deque()
        self.bytes_written = int(self._sink.tell())

    @property
    def tokens_written(self) -> int:
        return sum(counts["tokens"] for counts in self._counts)

    def write(self, batch: RowBatch) -> None:
        """Append a record batch.

        Raises: ValueError for a value that no code represents, of this record batch or, with several threads, of one
            before it. The shard can then only be abandoned.
        """
        if self._threads is None:
            self._append(batch, self._codec.encode(batch))
            return
        self._encoding.append((batch, self._threads.submit(self._codec.encode, batch)))
        while self._encoding and (len(self._encoding) > self._most_encoding or self._encoding[0][1].done()):
            self._append_next()

    def _append_next(self) -> None:
        batch, encoded = self._encoding.popleft()
        self._append(batch, encoded.result())

    def _append(self, batch: RowBatch, encoded: pa.RecordBatch) -> None:
        self._arrow.write_batch(encoded)
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
        """Rename the shard to its final name, then write its sidecar. Returns the sidecar and its sha256.

        Raises: as `write`.
        """
        while self._encoding:
            self._append_next()
        self._end_threads()
        self._arrow.close()
        self._sink.close()
        sidecar = self._describe(annotations)
        self._creation.__exit__(None, None, None)
        data = sidecar.to_bytes()
        write_bytes(self._directory, sidecar_name(self.index), data)
        return sidecar, sha256(data)

    def abandon(self) -> None:
        """Discard the shard; leaves no files behind."""
        self._encoding.clear()
        self._end_threads()
        with contextlib.suppress(OSError):  # a full disk, which may be why the shard is abandoned
            self._sink.close()
        reason = CacheError("shard abandoned")
        self._creation.__exit__(CacheError, reason, None)

    def _end_threads(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

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
