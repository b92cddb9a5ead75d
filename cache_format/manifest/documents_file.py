"""documents.arrow: for each document of each row, the values of the columns of the data that the cache keeps.

An Arrow IPC file of one record batch with a row for each row of the cache; a column is a list with one value for each
document packed there, as text. The manifest names the columns in `corpus.keep_columns`, and records the file's size and
checksum in `corpus.documents_file`. A column has few distinct values, such as domains or languages.

Cost: a byte per document and four per row and column, before compression.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cache_format.codecs.ipc import MAGIC_BYTES, UNREADABLE, check_expansion, message_buffers
from cache_format.manifest.fields import MOST_KEPT_CHARACTERS, MOST_KEPT_VALUES, is_kept_text
from cache_format.manifest.metadata import CacheMetadata
from cache_format.storage.checked_file import damaged, read_checked
from cache_format.storage.directory import Directory, open_directory, write_bytes

DOCUMENTS = "documents.arrow"
"""File of the kept columns, in caches that keep any."""
_LEVEL = 19  # of zstd
_TYPE = pa.list_(pa.field("item", pa.dictionary(pa.uint8(), pa.string()), nullable=False))


@dataclass(frozen=True, eq=False)
class KeptColumn:
    """A column of the data, by document. Row r has the documents `offsets[r]` to `offsets[r + 1]`.

    Attributes:
        values: the distinct values, in ascending order.
        codes: uint8 [documents], their numbers.
        offsets: int64 [rows + 1].
    """

    values: tuple[str, ...]
    codes: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, values: Sequence[str], codes: NDArray[Any], documents: NDArray[Any] | Sequence[int]) -> KeptColumn:
        """From values in any order, some of which may be unused.

        Args:
            codes: int [documents], the value of each document as its place in `values`.
            documents: int [rows], the number of documents of each row.

        Raises: ValueError for more than 256 values in use, or one that is not 1 to 100 printable characters.
        """
        used, places = np.unique(codes, return_inverse=True)
        names = [values[code] for code in used]
        if len(names) > MOST_KEPT_VALUES or not all(map(is_kept_text, names)):
            raise ValueError(
                f"found {len(names)} values, expected at most {MOST_KEPT_VALUES}, each of 1 to {MOST_KEPT_CHARACTERS} "
                "printable characters"
            )
        order = sorted(range(len(names)), key=names.__getitem__)
        rank = np.argsort(order)
        offsets = np.concatenate([[0], np.cumsum(documents, dtype=np.int64)])
        return cls(tuple(names[i] for i in order), rank[places].astype(np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> list[str]:
        """The value of each document of a row."""
        return [self.values[code] for code in self.codes_of(row)]

    def codes_of(self, row: int) -> NDArray[np.uint8]:
        return self.codes[self.offsets[row] : self.offsets[row + 1]]


def recorded_documents(metadata: CacheMetadata) -> Mapping[str, Any] | None:
    """`bytes` and `sha256` of the file, if this cache has one."""
    recorded: Mapping[str, Any] | None = metadata.corpus.get("documents_file")
    return recorded


def documents_bytes(columns: Mapping[str, KeptColumn]) -> bytes:
    """Contents of the file with these columns, by name. Deterministic."""
    arrays = []
    for column in columns.values():
        items = pa.DictionaryArray.from_arrays(pa.array(column.codes), pa.array(column.values, pa.string()))
        arrays.append(pa.ListArray.from_arrays(pa.array(column.offsets.astype(np.int32)), items, type=_TYPE))
    schema = pa.schema([pa.field(name, _TYPE, nullable=False) for name in columns])
    batch = pa.record_batch(arrays, schema=schema)
    packed = _file(batch, pa.Codec("zstd", compression_level=_LEVEL))
    try:
        _check_size(packed)
    except ValueError:  # a long run of the same value compresses more than readers accept
        return _file(batch, None)
    return packed


def describe_documents(contents: bytes) -> dict[str, Any]:
    """The file's entry for the manifest."""
    return {"bytes": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}


def write_documents(path: str | os.PathLike[str], contents: bytes) -> None:
    """Writes the file into a directory, unless it is there."""
    directory = open_directory(path)
    try:
        if directory.read_bytes(DOCUMENTS) == contents:
            return
    except FileNotFoundError:
        pass
    write_bytes(directory, DOCUMENTS, contents)


def read_documents(directory: Directory, metadata: CacheMetadata) -> bytes | None:
    """The whole file, checked against its checksum. Raises: FormatError if it is missing or not as it was written."""
    recorded = recorded_documents(metadata)
    return None if recorded is None else read_checked(directory, DOCUMENTS, recorded["sha256"])


def kept_columns(data: bytes, metadata: CacheMetadata, where: str) -> dict[str, KeptColumn]:
    """The columns in the contents of the file. Raises: FormatError, naming `where`."""
    names = list(metadata.corpus.get("keep_columns") or ())
    try:
        _check_size(data)
        # Read as a stream: a footer could point at buffers whose size was not checked.
        batch = pa.ipc.open_stream(pa.py_buffer(data).slice(MAGIC_BYTES)).read_next_batch()
        batch.validate(full=True)
        if batch.schema.names != names or len(batch) != metadata.num_rows:
            found = shortened(batch.schema.names)
            raise ValueError(f"{len(batch)} rows of {found}, expected {metadata.num_rows} of {names}")
        return {name: _column(batch.column(name)) for name in names}
    except UNREADABLE as error:
        raise damaged(where, f"not the kept columns of this cache ({' '.join(str(error).split())})") from error


def _column(array: pa.ListArray) -> KeptColumn:
    """Raises: ValueError."""
    if array.type != _TYPE or array.null_count or array.values.null_count:
        raise ValueError(f"{shortened(array.type)}, expected {_TYPE} without nulls")
    offsets = array.offsets.to_numpy().astype(np.int64)
    dictionary = array.values.dictionary
    if len(dictionary) > MOST_KEPT_VALUES:  # before each becomes a Python string
        raise ValueError(f"{len(dictionary):,} values, expected at most {MOST_KEPT_VALUES}")
    values = dictionary.to_pylist()
    if len(set(values)) != len(values) or not all(map(is_kept_text, values)):
        raise ValueError("values that repeat or cannot be printed")
    if offsets[0] != 0 or (np.diff(offsets) < 1).any() or offsets[-1] != len(array.values):
        raise ValueError("a row without a document")
    return KeptColumn(tuple(values), array.values.indices.to_numpy(), offsets)


def _file(batch: pa.RecordBatch, compression: pa.Codec | None) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as file:
        file.write_batch(batch)
    return sink.getvalue()


def _check_size(data: bytes) -> None:
    """Raises: ValueError, struct.error for anything else than messages that expand moderately."""
    stream = pa.py_buffer(data).slice(MAGIC_BYTES)
    check_expansion(sum(sum(each.uncompressed) for each in message_buffers(stream, with_end=True)), len(data))
