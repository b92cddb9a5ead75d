"""The rows of a source as dicts with the values that their author wrote.

    JSON files      kept as text, one row a line, and parsed when a row is read
    tables          Arrow columns: Parquet, CSV, `save_to_disk`, hub datasets, given rows

An Arrow column has one type, so that a struct has the keys of all rows and those that a row does not have are null.
They are left out here, at any depth (but see `_arguments`); what is null in a list, or in a column of JSON, stays.
JSON files are not read as tables, because types that `datasets` infers for them change what is in them: absent keys
become null, floats lose digits, a string that looks like a number, a date or JSON becomes one. JSON is parsed with the
standard library for the same reason: the parser of `datasets` rounds floats.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import datasets

from pipeline.errors import DataError

_LINE = "json line"  # the only column of a dataset of JSON rows
_LINE_FEATURES = datasets.Features({_LINE: datasets.Value("large_string")})
_ROWS_LOOKED_AT = 1000  # to find the columns of JSON rows
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RecordReader:
    """Rows of a dataset to dicts.

    Attributes:
        names: the columns; JSON rows may have further ones behind the first thousand.
        features: types of the columns; None for JSON rows.
        plain_text: the rows are those of .txt files, which may begin with a byte order mark.
    """

    names: tuple[str, ...]
    features: datasets.Features | None
    plain_text: bool = False

    @classmethod
    def of(cls, rows: datasets.Dataset, *, plain_text: bool = False) -> RecordReader:
        if rows.column_names != [_LINE]:
            return cls(tuple(rows.column_names), rows.features, plain_text)
        first = [json.loads(line) for line in rows[:_ROWS_LOOKED_AT][_LINE]]
        return cls(tuple(dict.fromkeys(key for row in first for key in row)), None)

    def read(self, batch: Mapping[str, Sequence[Any]], names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The rows of a batch with at least these columns, by default all; absent values are null."""
        names = self.names if names is None else names
        if self.features is None:
            return [{**dict.fromkeys(names), **json.loads(line)} for line in batch[_LINE]]
        if self.plain_text:
            # Not by the encoding: `datasets` does not pass it on for packed files.
            return [{"text": text.removeprefix("\ufeff")} for text in batch["text"]]
        columns = [[_as_given(value, self.features[name]) for value in batch[name]] for name in names]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]

    def row(self, rows: datasets.Dataset, index: int) -> dict[str, Any]:
        """One row with all its columns."""
        return self.read(rows[index : index + 1])[0]

    def string_columns(self, rows: datasets.Dataset) -> list[str]:
        if self.features is None:
            return [name for name in self.names if isinstance(self.first_value(rows, name), str)]
        kinds = (datasets.Value("string"), datasets.Value("large_string"))
        return [name for name, kind in self.features.items() if kind in kinds]

    def first_value(self, rows: datasets.Dataset, name: str) -> Any:
        """The first value of a column that is neither null nor an empty list, else an empty list, if there is one."""
        if self.features is None:
            every = (json.loads(row[_LINE]).get(name) for row in rows)
        else:
            feature = self.features[name]
            every = (_as_given(row[name], feature) for row in rows.select_columns(name))
        empty = None
        for value in every:
            if value == []:
                empty = value
            elif value is not None:
                return value
        return empty


def with_json_as_text(rows: datasets.Dataset) -> datasets.Dataset:
    """The same rows, whose columns of JSON are not parsed by `datasets`."""
    features = datasets.Features({name: _undecoded(feature) for name, feature in rows.features.items()})
    if features == rows.features:
        return rows
    info = rows.info.copy()
    info.features = features
    return datasets.Dataset(rows.data, info=info, indices_table=rows._indices, fingerprint=rows._fingerprint)


@contextmanager
def reading(where: str, rows: Sequence[int]) -> Iterator[None]:
    """Raises: DataError if inside the block a text of these rows turns out not to be UTF-8."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(not_utf8(f"{where}, in one of the rows {rows[0]} to {rows[-1]}", error)) from error


def json_dataset(files: Sequence[Path], split: str) -> datasets.Dataset:
    """The rows of JSON files, or the slice of them that `split` names, such as train[:10%].

    Raises:
        datasets.exceptions.DatasetsError: its cause is a DataError that names file and line.
        ValueError: no rows, or no such slice.
    """
    # Size and time, because the result is cached by the arguments.
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    rows = datasets.Dataset.from_generator(
        _json_rows,
        features=_LINE_FEATURES,
        gen_kwargs={"files": tuple(stats)},
        cache_dir=str(datasets.config.HF_DATASETS_CACHE),
    )
    if split == "train":
        return rows
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    return rows.select(list(chain.from_iterable(range(part.from_, part.to) for part in parts)))


def open_bytes(path: Path) -> IO[bytes]:
    """The file, unpacked if it is compressed."""
    return cast("IO[bytes]", gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def not_utf8(where: str, error: UnicodeDecodeError) -> str:
    found = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
    return f"{where}: found {found}, expected UTF-8 text. Convert the file, for example with iconv."


def _json_rows(files: Sequence[tuple[str, int, int]]) -> Iterator[dict[str, str]]:
    for path, *_ in files:
        with open_bytes(Path(path)) as file:
            for row in _rows_of(file, path):
                yield {_LINE: row}


def _rows_of(file: IO[bytes], path: str) -> Iterator[str]:
    """Each row as JSON text, of JSON lines or of one JSON value: a list of rows, or a single one."""
    lines = ((number, line) for number, line in enumerate(_without_mark(file), start=1) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    if _is_object(first[1]):
        for number, line in chain([first], lines):
            where = f"{path}, line {number}"
            text = _decoded(line, where)
            _check_row(_parsed(text, path, number), text, where)
            yield text
        return
    text = _decoded(b"".join(line for _, line in chain([first], lines)), path)
    value = _parsed(text, path, first[0])
    for index, item in enumerate(value if isinstance(value, list) else [value]):
        row = {"text": item} if isinstance(item, str) else item
        text = json.dumps(row, ensure_ascii=False)
        _check_row(row, text, f"{path}, row {index}")
        yield text


def _without_mark(file: IO[bytes]) -> Iterator[bytes]:
    """The lines without the byte order mark."""
    for line in file:
        yield line.removeprefix(_BYTE_ORDER_MARK)
        yield from file


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), Mapping)
    except ValueError:
        return False


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(not_utf8(where, error)) from error


def _parsed(text: str, path: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {first_line + error.lineno - 1}"
        found = error.msg.removesuffix(" at")  # "Unterminated string starting at"
        raise DataError(
            f"{where}: invalid JSON: {found} at column {error.colno}. Correct or remove the line."
        ) from error


def _check_row(row: Any, text: str, where: str) -> None:
    """Raises: DataError for a row that is not an object, or that has half of a surrogate pair."""
    if not isinstance(row, Mapping):
        raise DataError(f'{where}: found {type(row).__name__}, expected an object such as {{"text": "…"}}.')
    try:
        (json.dumps(row, ensure_ascii=False) if "\\u" in text else text).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{where}: found {half}, half of a character, expected Unicode. Correct the row.") from error


def _as_given(value: Any, feature: Any) -> Any:
    """The value without the null fields of its structs, and with its JSON parsed."""
    if isinstance(feature, datasets.Json):
        return json.loads(value) if isinstance(value, str) else value
    if isinstance(value, dict) and isinstance(feature, dict):
        return {
            key: _arguments(item, kind) if key == "arguments" and isinstance(item, dict) else _as_given(item, kind)
            for key, item, kind in ((key, item, feature.get(key)) for key, item in value.items())
            if item is not None
        }
    inner = _item_of(feature)
    if isinstance(value, list) and inner is not None and not isinstance(inner, datasets.Value):
        return [_as_given(item, inner) for item in value]
    return value


def _arguments(value: dict[str, Any], feature: Any) -> dict[str, Any]:
    """The arguments of a tool call. A key that is null in all rows has Arrow's null type; somebody has written it, and
    Arrow appends keys in the order in which rows bring them: it belongs to the calls that have the key before it."""
    found: dict[str, Any] = {}
    before = None
    for key, item in value.items():
        kind = feature.get(key) if isinstance(feature, dict) else None
        if item is not None:
            found[key] = _as_given(item, kind)
        elif before in found and kind == datasets.Value("null"):
            found[key] = None
        before = key
    return found


def _item_of(feature: Any) -> Any:
    """The type of the items of a list; None for another type."""
    return feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)


def _undecoded(feature: Any) -> Any:
    """The type with its JSON left as text."""
    if isinstance(feature, datasets.Json):
        return datasets.Json(decode=False)
    if isinstance(feature, dict):
        return {key: _undecoded(item) for key, item in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(item) for item in feature]
    return replace(feature, feature=_undecoded(feature.feature)) if hasattr(feature, "feature") else feature
