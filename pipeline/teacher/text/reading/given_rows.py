"""Rows that are given as an iterable of dicts, as a `datasets.Dataset`.

They are written once to an Arrow file in the cache of `datasets` (HF_DATASETS_CACHE), a thousand at a time, and mapped
into memory. The file is named by its contents, so giving the same rows again finds the tokenised text again. Values
with objects in them, such as messages, are stored as JSON: as structs all rows would have the same keys. So are columns
whose first thousand values are null or empty.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter

from pipeline.errors import DataError

_ROWS_PER_BATCH = 1000


def rows_dataset(rows: Any, name: str, most: int | None = None) -> datasets.Dataset:
    """The rows of an iterable of dicts, which is read once; keys that a row does not have are null.

    Args:
        name: how errors call them.
        most: number of rows to read; the iterable may be endless. Default: all.

    Raises:
        DataError: no iterable, no rows, a row that is not a dict, or columns and types that differ between rows.
    """
    if isinstance(rows, Mapping | bytes) or not isinstance(rows, Iterable):
        raise DataError(f"{name}: expected a path, a Dataset, or rows such as [{{'text': '…'}}]. Give one of them.")
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "distill"
    cache.mkdir(parents=True, exist_ok=True)
    descriptor, written = tempfile.mkstemp(dir=cache, prefix="rows-", suffix=".tmp")
    os.close(descriptor)
    try:
        _write(islice(rows, most), written, name)
        with open(written, "rb") as file:
            fingerprint = _sha256(file)[:32]
        path = cache / f"rows-{fingerprint}.arrow"
        # An existing file has the same bytes; keep it, because other processes may have it mapped.
        if not path.is_file():
            os.replace(written, path)
    finally:
        Path(written).unlink(missing_ok=True)
    found = datasets.Dataset.from_file(str(path))
    return datasets.Dataset(found.data, info=found.info, fingerprint=fingerprint)


def _write(rows: Iterable[Any], path: str, name: str) -> None:
    batches = _batches(rows, name)
    first = next(batches, None)
    if first is None:
        raise DataError(f"{name}: no rows in it, expected dicts with text. A generator can be read only once.")
    columns = list(dict.fromkeys(key for row in first for key in row))
    writer = ArrowWriter(path=path)
    start, nested = 0, set[str]()
    try:
        for batch in chain([first], batches):
            stop = start + len(batch)
            if extra := {str(key) for row in batch for key in row} - set(columns):
                raise DataError(
                    f"{name}, rows {start} to {stop - 1}: found key {min(extra)!r}, expected {', '.join(columns)} as "
                    f"in the first {len(first)} rows. Give all rows the same keys."
                )
            try:
                values = {column: [row.get(column) for row in batch] for column in columns}
                if start == 0:
                    nested = {name for name, given in values.items() if _needs_json(given)}
                writer.write_batch({name: _as_json(v) if name in nested else v for name, v in values.items()})
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                raise DataError(
                    f"{name}, rows {start} to {stop - 1}: found values that cannot be stored as columns: "
                    f"{' '.join(str(error).split()).rstrip('.')}. Give each key values of one type."
                ) from error
            start = stop
        writer.finalize()
    finally:
        writer.close()


def _needs_json(values: list[Any]) -> bool:
    """Whether there are objects in a column's first values, or nothing that shows what there will be."""
    return any(map(_has_objects, values)) or all(map(_is_empty, values))


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, list | tuple) and all(map(_is_empty, value)))


def _has_objects(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list | tuple) and any(map(_has_objects, value)))


def _as_json(values: list[Any]) -> pa.Array:
    texts = [None if v is None else json.dumps(v, ensure_ascii=False, default=_plain) for v in values]
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))


def _plain(value: Any) -> Any:
    """What JSON has for a value of another library, such as a number of numpy."""
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _batches(rows: Iterable[Any], name: str) -> Iterator[list[dict[str, Any]]]:
    remaining = enumerate(rows)
    while batch := list(islice(remaining, _ROWS_PER_BATCH)):
        for index, row in batch:
            if not isinstance(row, Mapping) or not row or not all(isinstance(key, str) for key in row):
                what = f"keys {', '.join(map(repr, row)) or 'none'}" if isinstance(row, Mapping) else type(row).__name__
                raise DataError(f"{name}, row {index}: found {what}, expected a dict such as {{'text': '…'}}.")
        yield [dict(row) for _, row in batch]


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
