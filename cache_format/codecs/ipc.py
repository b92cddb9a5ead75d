"""The bytes of a shard: an Arrow IPC file cut into ranges, and the buffers inside a range.

An IPC file is `ARROW1\\0\\0`, then encapsulated messages, then a footer. Cutting it behind the last
dictionary and behind each record batch partitions the file into

    header (magic, schema, dictionaries) | record batch 0 | record batch 1 | ... | footer

and header (without its magic) followed by one record batch is a valid IPC *stream*. So a reader
needs two checked ranges for any record batch, and never trusts an offset that it did not check.

The sizes of the compressed buffers, and the uncompressed sizes that they announce, are read here
from the message's flatbuffer (https://arrow.apache.org/docs/format/Columnar.html): pyarrow does not
expose them, and a size has to be checked before it is allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

MAGIC_BYTES = 8
EXPANDS = 64  # largest ratio of uncompressed to compressed bytes ...
EXPANDS_ANYWAY = 2**26  # ... above this number of uncompressed bytes
VERSION_5 = 4  # MetadataVersion, in Schema.fbs
COMPRESSION = 3  # field of RecordBatch
SCHEMA, DICTIONARY_BATCH, RECORD_BATCH = 1, 2, 3  # MessageHeader in Arrow's Message.fbs
# What pyarrow and the parser below raise for bytes of something else.
UNREADABLE = (pa.ArrowException, ValueError, OSError, LookupError, AttributeError, struct.error, StopIteration)


@dataclass(frozen=True)
class MessageBuffers:
    """The body of one dictionary or record batch message."""

    compressed: list[int]  # bytes on disk of each buffer, in schema order
    uncompressed: list[int]  # bytes in memory that each announces


def cut_points(path: str) -> list[int]:
    """Ends of the header and of each record batch of a file written here."""
    header_end, batch_ends = MAGIC_BYTES, []
    with pa.memory_map(path) as file:
        file.seek(MAGIC_BYTES)
        for message in pa.ipc.MessageReader.open_stream(file):
            if message.type == "record batch":
                batch_ends.append(file.tell())
            else:
                header_end = file.tell()
    return [header_end, *batch_ends]


def buffers_per_column(schema: pa.Schema) -> dict[str, int]:
    """Number of buffers of each column in a message: validity and values; of a list also offsets."""

    def buffers(kind: pa.DataType) -> int:
        if pa.types.is_list(kind):
            return 2 + buffers(kind.value_type)
        if pa.types.is_fixed_size_list(kind):
            return 1 + buffers(kind.value_type)
        return 3 if pa.types.is_binary(kind) else 2

    return {field.name: buffers(field.type) for field in schema}


def check_expansion(expanded: int, stored: int) -> None:
    """Limit the expansion of compressed bytes: zeros compress a thousandfold. Raises: ValueError."""
    if expanded > max(EXPANDS_ANYWAY, EXPANDS * stored):
        raise ValueError(f"{stored:,} bytes expand to {expanded:,}, expected at most {EXPANDS} times as many")


def message_buffers(data: pa.Buffer | memoryview, *, with_end: bool = False) -> Iterator[MessageBuffers]:
    """Buffer sizes of the messages in a range, schema messages left out.

    Args:
        with_end: stop at the end-of-stream marker, as in a file.

    Raises: ValueError, struct.error for anything that is not a sequence of messages.
    """
    view, position = memoryview(data), 0
    while position < len(view):
        marker, length = struct.unpack_from("<Ii", view, position)
        if with_end and marker == 0xFFFFFFFF and length == 0:
            return
        if marker != 0xFFFFFFFF or length <= 0:
            raise ValueError("not an Arrow message")
        message = _root(view[position + 8 : position + 8 + length])
        body = position + 8 + length
        body_length = message.scalar(3, "<q")
        if not 0 <= body_length <= len(view) - body:
            raise ValueError("an Arrow message reaches beyond its range")
        kind, header = message.scalar(1, "<B"), message.table(2)
        if kind != SCHEMA:
            batch = header.table(1) if kind == DICTIONARY_BATCH else header
            # Before version 5 compression could be declared elsewhere: then treat all buffers as compressed.
            plain = message.scalar(0, "<h") == VERSION_5 and not batch.has(COMPRESSION)
            yield _buffers(batch, view[body : body + body_length], plain)
        position = body + body_length


def read_record_batch(header: pa.Buffer, batch: pa.Buffer, columns: list[int]) -> pa.RecordBatch:
    """One record batch from its two ranges, only the columns asked for.

    Raises: pa.ArrowException, OSError.
    """
    stream = b"".join([memoryview(header)[MAGIC_BYTES:], memoryview(batch)])
    # No threads: the reader lives in forked DataLoader workers, one core each.
    options = pa.ipc.IpcReadOptions(included_fields=columns, use_threads=False)
    with pa.ipc.open_stream(pa.py_buffer(stream), options=options) as reader:
        return reader.read_next_batch()


def read_schema(header: pa.Buffer) -> pa.Schema:
    """Raises: pa.ArrowException, OSError."""
    return pa.ipc.read_schema(header.slice(MAGIC_BYTES))


@dataclass(frozen=True)
class _Table:
    """A flatbuffer table: fields are found through its vtable, by number."""

    view: memoryview
    position: int

    def _field(self, index: int) -> int:
        vtable = self.position - self._read("<i", self.position)
        entry = 4 + 2 * index
        inside = entry < self._read("<H", vtable)
        return self._read("<H", vtable + entry) if inside else 0

    def has(self, index: int) -> bool:
        return self._field(index) != 0

    def scalar(self, index: int, form: str) -> int:
        offset = self._field(index)
        return self._read(form, self.position + offset) if offset else 0

    def _target(self, index: int) -> int:
        if not (offset := self._field(index)):
            raise ValueError("an Arrow message lacks a field")
        return self.position + offset + self._read("<I", self.position + offset)

    def table(self, index: int) -> _Table:
        return _Table(self.view, self._target(index))

    def structs(self, index: int, form: str) -> Iterator[tuple[Any, ...]]:
        start = self._target(index)
        stop = start + 4 + self._read("<I", start) * struct.calcsize(form)
        if not 0 <= start <= stop <= len(self.view):
            raise ValueError("an Arrow message is cut short")
        return struct.iter_unpack(form, self.view[start + 4 : stop])

    def _read(self, form: str, position: int) -> int:
        if position < 0:
            raise ValueError("an Arrow message points outside itself")
        return int(struct.unpack_from(form, self.view, position)[0])


def _root(view: memoryview) -> _Table:
    return _Table(view, struct.unpack_from("<I", view)[0])


def _buffers(batch: _Table, body: memoryview, plain: bool) -> MessageBuffers:
    compressed, uncompressed = [], []
    for offset, length in batch.structs(2, "<qq"):
        if plain:
            compressed.append(length)
            uncompressed.append(length)
            continue
        announced = struct.unpack_from("<q", body, offset)[0] if length else 0
        if announced < -1:
            raise ValueError("an Arrow buffer announces a negative size")
        stored_plain = announced == -1  # compression did not pay
        compressed.append(length)
        uncompressed.append(length - 8 if stored_plain else announced)
    return MessageBuffers(compressed, uncompressed)
