"""The files of a source, and their records one at a time: Parquet, Arrow and JSON lines.

Values stay as pyarrow scalars or plain Python lists until a reader asks for an array (`nested_values`), so that memory
holds a few records whatever the size of a file.
"""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError
from pipeline.importing.readers.foreign_rows import BadRow
from pipeline.teacher.text.reading.data_paths import find_local

ROWS_AT_ONCE = 8  # of a Parquet file: a row of 16,384 tokens with 128 entries takes tens of MB
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib")
JSON_LINES = (".jsonl", ".jsonl.gz", ".ndjson")
TABLES = (".parquet", ".arrow")
DATA_FILES = (*TABLES, *JSON_LINES)
BESIDE = ("dataset_info.json", "state.json", "dataset_dict.json")  # of datasets' save_to_disk


@dataclass(frozen=True)
class Record:
    """One row of a table or one line of JSON, by column; `where` names it in messages."""

    where: str
    data: Any

    def column(self, name: str) -> Any:
        """Raises: BadRow if there is no such column, or if it is null."""
        if (found := self.get(name)) is None:
            there = ", ".join(sorted(self.data)) if isinstance(self.data, Mapping) else "none"
            raise BadRow(f"no value in column {name!r} (columns: {there})")
        return found

    def get(self, name: str) -> Any:
        """The value of a column, None if it is null or absent."""
        value = self.data.get(name)
        return None if value is None or (isinstance(value, pa.Scalar) and not value.is_valid) else value


def find_files(source: str, *, endings: Sequence[str] = DATA_FILES) -> list[Path]:
    """The files that a path, directory or pattern names, in order.

    Args:
        endings: of the files to take from a directory, all of the first kind that is there.

    Raises: DataError if there is none, or if one is a pickle.
    """
    found = find_local(source)
    if found is None:
        raise DataError(f"{source}: no such file or directory. Download the data set first, and give its directory.")
    files = []
    for path in found:
        files += _inside(path, endings) if path.is_dir() else [path]
    for path in files:
        _refuse_pickle(path)
    return files


def _inside(folder: Path, endings: Sequence[str]) -> list[Path]:
    there = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    for ending in endings:
        if chosen := [path for path in there if path.name.endswith(ending) and path.name not in BESIDE]:
            return chosen
    if pickled := next((path for path in there if path.name.endswith(PICKLES)), None):
        _refuse_pickle(pickled)
    raise DataError(f"{folder}: found no file that ends in {', '.join(endings)}. Check the directory and the `format`.")


def _refuse_pickle(path: Path) -> None:
    with path.open("rb") as stream:
        start = stream.read(2)
    pickled = path.name.lower().endswith(PICKLES) or (len(start) == 2 and start[0] == 0x80 and start[1] <= 5)
    if not pickled and start == b"PK" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickled = any(name.endswith(".pkl") for name in archive.namelist())
    if pickled:
        raise DataError(
            f"{path}: a pickle, which can run its author's code when it is read. Save the arrays as Parquet or JSON "
            "lines on a machine where that may happen, and import those."
        )


def records(files: Sequence[Path], columns: Sequence[str] | None = None) -> Iterator[Record]:
    """All records of tables and JSON lines, in order.

    Args:
        columns: those to read of a table; None for all.

    Raises: DataError for a file that cannot be read, with the file and the line or row.
    """
    for path in files:
        if path.name.endswith(".parquet"):
            yield from _of_batches(path, _parquet_batches, columns)
        elif path.name.endswith(".arrow"):
            yield from _of_batches(path, _arrow_batches, columns)
        else:
            yield from _json_lines(path)


def count_records(files: Sequence[Path]) -> int | None:
    """Number of records if all files are Parquet, whose footers tell it; else None."""
    if not all(path.name.endswith(".parquet") for path in files):
        return None
    try:
        return sum(pq.read_metadata(path).num_rows for path in files)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{files[0].parent}: a Parquet file cannot be read: {error}. Download it again.") from error


def open_text(path: Path) -> Any:
    return gzip.open(path, "rt", encoding="utf-8") if path.name.endswith(".gz") else path.open(encoding="utf-8")


Batches = Callable[[Path, Sequence[str] | None], Iterator[pa.RecordBatch]]


def _of_batches(path: Path, batches: Batches, columns: Sequence[str] | None) -> Iterator[Record]:
    row = 0
    try:
        for batch in batches(path, columns):
            for i in range(batch.num_rows):
                yield Record(f"{path}, row {row}", {name: batch[name][i] for name in batch.schema.names})
                row += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}, row {row}: it cannot be read: {error}. Download or write it again.") from error


def _parquet_batches(path: Path, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        wanted = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
        yield from file.iter_batches(batch_size=ROWS_AT_ONCE, columns=wanted)


def _arrow_batches(path: Path, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(path)) as mapped:
        if mapped.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(mapped)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            mapped.seek(0)
            yield from pa.ipc.open_stream(mapped)


def _json_lines(path: Path) -> Iterator[Record]:
    try:
        with open_text(path) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield Record(f"{path}, line {number}", json_object(line, f"{path}, line {number}"))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: it cannot be read as JSON lines: {error}. Check the file.") from error


def json_object(line: str | bytes, where: str) -> dict[str, Any]:
    """One line of a JSON lines file. Raises: DataError."""
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}. Expected one JSON object per line.") from error
    if not isinstance(found, dict):
        raise DataError(f"{where}: found a {type(found).__name__}, expected one JSON object per line.")
    return found
