"""The text that `data` names or holds, opened as one memory-mapped `datasets.Dataset`.

    a file, glob or directory of .txt .jsonl .json .parquet .csv .tsv .arrow, each also as .gz, or a list of them
    a folder written by `Dataset.save_to_disk`
    the name of a dataset on the hub
    a `Dataset`, or an iterable of rows as dicts (see `given_rows`)

`datasets` converts files to Arrow in its cache (HF_DATASETS_CACHE), so the memory needed does not depend on their size.
Its progress bars and log lines are switched off, because the pipeline never prints. JSON is kept as text until a row is
read (see `records`).
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from pipeline.errors import DataError
from pipeline.hub import copies_if_unreachable
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.reading.data_paths import (
    EXTENSIONS,
    data_name,
    extension,
    find_local,
    is_path_list,
)
from pipeline.teacher.text.reading.given_rows import rows_dataset
from pipeline.teacher.text.reading.records import RecordReader, json_dataset, not_utf8, open_bytes, with_json_as_text

# For pandas "NA", "None" or "null" in a CSV cell is a missing value; in a corpus it is text.
_CSV_OPTIONS: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
# Extension -> (builder in `datasets`, its options).
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", _CSV_OPTIONS),
    ".tsv": ("csv", {**_CSV_OPTIONS, "sep": "\t"}),
    ".arrow": ("arrow", {}),
}
_KNOWN = " ".join(EXTENSIONS)
_NO_ROWS = "no rows in it, expected text. Check how it was written."

# Hashing reads all files once more: seconds up to this size, minutes beyond.
_HASHED_BYTES = 1 << 30


@dataclass(frozen=True)
class Source:
    """The rows of one split, and what they were read from."""

    rows: datasets.Dataset  # `reader` gives their contents
    files: tuple[Path, ...]  # empty for a dataset from the hub and for objects
    ignored_files: int  # files of other kinds in a directory
    given: bool = False  # the rows came as an object

    @cached_property
    def reader(self) -> RecordReader:
        plain_text = bool(self.files) and extension(self.files[0]) == ".txt"
        return RecordReader.of(self.rows, plain_text=plain_text)

    def describe_files(self) -> list[dict[str, Any]]:
        """Name, size and sha256 of each file, or its modification time if together they are large.

        For rows that came as an object, their fingerprint.
        """
        if self.given:
            return [{"name": "rows", "fingerprint": self.rows._fingerprint}]
        if not self.files:
            # Keys are addresses on the hub, which contain the revision.
            downloads = self.rows.info.download_checksums or {}
            return [{"name": url, "bytes": downloads[url]["num_bytes"]} for url in sorted(downloads)]
        root = os.path.commonpath([path.parent for path in self.files])
        stats = [path.stat() for path in self.files]
        hashed = sum(stat.st_size for stat in stats) <= _HASHED_BYTES
        return [
            {
                "name": path.relative_to(root).as_posix(),
                "bytes": stat.st_size,
                **({"sha256": _sha256(path)} if hashed else {"mtime_ns": stat.st_mtime_ns}),
            }
            for path, stat in zip(self.files, stats, strict=True)
        ]


def load_source(config: DataConfig) -> Source:
    """Open `config.data`, which has at least one row, up to `max_documents` rows. An iterable may be endless.

    Raises:
        DataError: there is nothing to read, or it cannot be read; names the file, and the line where possible.
    """
    with quiet_datasets():
        source = _open(config)
    if len(source.rows) == 0:
        raise DataError(f"{data_name(config.data)}: {_NO_ROWS}")
    rows, most = with_json_as_text(source.rows), config.max_documents
    return replace(source, rows=rows if most is None else rows.select(range(min(most, len(rows)))))


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Inside the block `datasets` draws no progress bars and logs nothing."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    had_bars = not datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    if had_bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if had_bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _open(config: DataConfig) -> Source:
    data, split, sample_by = config.data, config.split, config.sample_by
    if is_path_list(data) and len(data) == 1:
        [data] = data
    if isinstance(data, str | os.PathLike):
        return _open_path(os.fspath(data), config.data_config, split, sample_by)
    if is_path_list(data):
        return _open_paths([os.fspath(path) for path in data], split, sample_by)
    name = data_name(data)
    if isinstance(data, datasets.Dataset | datasets.DatasetDict):
        rows = _choose_split(data, name, split)
        if rows.format["type"] == "custom":
            raise DataError(
                f"{name}: found a transform (`set_transform`), which is applied only where rows are read, expected "
                "rows that hold the text. Apply it with `map` first, or remove it with `reset_format`."
            )
        # A format such as torch would give tensors instead of strings and lists.
        return Source(rows if rows.format["type"] is None else rows.with_format(None), (), 0, given=True)
    if split != "train":
        raise DataError(f"{name}: no split {split!r} in given rows. Leave `split` at its default.")
    return Source(rows_dataset(data, name, config.max_documents), (), 0, given=True)


def _open_path(data: str, data_config: str | None, split: str, sample_by: str) -> Source:
    found = find_local(data)
    if found is None:
        return _hub_source(data, data_config, split)
    if len(found) > 1 or not found[0].is_dir():
        return _file_source(found, data, split, sample_by)
    path = found[0]
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved_source(path, data, split)
    files, ignored = _text_files(path)
    if not files:
        raise DataError(
            f"{data}: no text among the {ignored} files of this directory, "
            f"expected some of {_KNOWN} (also .gz). Name the files or convert them."
        )
    return _file_source(files, data, split, sample_by, ignored=ignored)


def _open_paths(data: Sequence[str], split: str, sample_by: str) -> Source:
    """Several files, patterns or directories, in their order."""
    files: list[Path] = []
    ignored = 0
    for name in data:
        found = find_local(name)
        if found is None:
            raise DataError(f"{name}: no such file or directory, expected a list of local paths. Check the path.")
        for path in found:
            inside, others = _text_files(path) if path.is_dir() else ([path], 0)
            files += [each.absolute() for each in inside]
            ignored += others
    if not files:
        raise DataError(f"{data_name(data)}: no text in these directories, expected some of {_KNOWN} (also .gz).")
    return _file_source(files, data_name(data), split, sample_by, ignored)


def _text_files(directory: Path) -> tuple[list[Path], int]:
    """The files of a directory that can be read, in order, and the number of others; hidden ones do not count."""
    found = [path for path in sorted(directory.rglob("*")) if path.is_file() and not _hidden(path, directory)]
    files = [path for path in found if extension(path) in _BUILDERS]
    return files, len(found) - len(files)


def _file_source(files: Sequence[Path], data: str, split: str, sample_by: str, ignored: int = 0) -> Source:
    unknown = [path for path in files if extension(path) not in _BUILDERS]
    if unknown:
        raise DataError(
            f"{unknown[0]}: found extension {extension(unknown[0]) or 'none'}, expected one of "
            f"{_KNOWN} (also .gz), which decides how the file is read. Rename or convert it."
        )
    kinds = {_BUILDERS[extension(path)][0] for path in files}
    if len(kinds) > 1:
        raise DataError(
            f"{data}: found {', '.join(sorted(kinds))} files together, expected one kind. "
            "Name one kind with a pattern, such as 'folder/*.jsonl'."
        )
    if not any(path.stat().st_size for path in files):
        raise DataError(f"{data}: the file is empty, expected text. Check how it was written.")
    builder, options = _BUILDERS[extension(files[0])]
    if builder == "text":
        options = {"sample_by": sample_by}
    if not split.startswith("train"):
        raise DataError(
            f"{data}: no split {split!r}, expected 'train' or a slice of it such as 'train[:10%]': local files have no "
            "other split. Give the files of the split as `data` instead."
        )
    try:
        if builder == "json":
            return Source(json_dataset(files, split), tuple(files), ignored)
        rows = datasets.load_dataset(
            builder,
            # Absolute, and escaped: `datasets` would read "[1]" in a file name as a pattern.
            data_files=[glob.escape(str(path.resolve())) for path in files],
            split=split,
            **options,
        )
    except (datasets.exceptions.DatasetsError, pa.ArrowException, OSError, ValueError) as error:
        raise DataError(_unreadable(data, files, builder, error)) from error
    return Source(rows, tuple(files), ignored)


def _saved_source(path: Path, data: str, split: str) -> Source:
    try:
        saved = datasets.load_from_disk(str(path))
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{data}: cannot be read as a folder written by save_to_disk: {_one_line(error)}. Save the dataset again."
        ) from error
    folder = path / split if isinstance(saved, datasets.DatasetDict) else path
    return Source(_choose_split(saved, data, split), tuple(sorted(folder.glob("data-*.arrow"))), ignored_files=0)


def _choose_split(given: datasets.Dataset | datasets.DatasetDict, name: str, split: str) -> datasets.Dataset:
    if isinstance(given, datasets.DatasetDict):
        if split not in given:
            raise DataError(f"{name}: no split {split!r}, found {', '.join(given)}. Choose one of them as `split`.")
        return given[split]
    if split not in ("train", str(given.split)):
        raise DataError(f"{name}: no split {split!r}, found a single dataset. Leave `split` at its default.")
    return given


def _hub_source(name: str, config: str | None, split: str) -> Source:
    try:
        with copies_if_unreachable():
            rows = datasets.load_dataset(name, config, split=split)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name}: neither a local file or directory nor a dataset that the hub can provide: "
            f"{_one_line(error)}. Check the spelling and the network; a private dataset needs a login."
        ) from error
    except ValueError as error:  # an unknown configuration or split; the message lists the known ones
        raise DataError(f"{name}: {_one_line(error)}. Choose `data_config` and `split` accordingly.") from error
    return Source(rows, (), ignored_files=0)


def _unreadable(data: str, files: Sequence[Path], builder: str, error: BaseException) -> str:
    if "corresponds to no data" in str(error):  # what `datasets` reports for a file without rows
        return f"{data}: {_NO_ROWS}"
    while isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
        error = error.__cause__
    if isinstance(error, DataError):
        return str(error)
    if builder in ("text", "csv") and (line := _first_undecodable_line(files)):
        return line
    return f"{data}: cannot be read as {builder}: {_one_line(error)}. Check file and extension."


def _first_undecodable_line(files: Sequence[Path]) -> str | None:
    """Where a text file is not UTF-8: what `datasets` reports is the place within a block."""
    for path in files:
        with open_bytes(path) as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    return not_utf8(f"{path}, line {number}", error)
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(f"{error}".split()).rstrip(".!") or type(error).__name__


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
