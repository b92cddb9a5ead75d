"""Where the text comes from: what `--data` names, opened as one memory-mapped `datasets.Dataset`.

    a file, glob or directory of .txt .jsonl .json .parquet .csv .tsv .arrow, each also as .gz
    a folder written by `Dataset.save_to_disk`
    the name of a dataset on the hub

What looks like a local path is only looked for locally: a misspelt file name must not become a
request to a server. `datasets` converts the files to Arrow in its cache (HF_DATASETS_CACHE), so the
memory needed does not depend on their size; its progress bars and log lines are kept quiet, because
the pipeline never prints.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from pipeline.errors import DataError

# Extension -> (builder in `datasets`, its options).
# For pandas "NA", "None" or "null" in a CSV cell is a missing value; in a corpus it is text.
_CSV_OPTIONS: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", _CSV_OPTIONS),
    ".tsv": ("csv", {**_CSV_OPTIONS, "sep": "\t"}),
    ".arrow": ("arrow", {}),
}
_KNOWN = " ".join(_BUILDERS)
_NO_ROWS = "no rows in it, expected text. Check how it was written."

# Hashing reads everything once more: seconds up to here, minutes beyond.
_HASHED_BYTES = 1 << 30


@dataclass(frozen=True)
class Source:
    """The rows of one split, and what they were read from."""

    rows: datasets.Dataset
    files: tuple[Path, ...]  # empty for a dataset from the hub
    ignored_files: int  # in a directory: files of other kinds

    def describe_files(self) -> list[dict[str, Any]]:
        """Name and size of each file, with its sha256, or its time of change if they are large."""
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


def load_source(data: str, *, data_config: str | None, split: str, sample_by: str) -> Source:
    """Open `data`, which has at least one row; DataError for anything that a user can put right."""
    with quiet_datasets():
        source = _open(data, data_config, split, sample_by)
    if len(source.rows) == 0:
        raise DataError(f"{data}: {_NO_ROWS}")
    return source


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Within the block `datasets` draws no bars and logs nothing; then all is as before."""
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


def _open(data: str, data_config: str | None, split: str, sample_by: str) -> Source:
    path = Path(data).expanduser()
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved_source(path, data, split)
    if path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if p.is_file() and not _hidden(p, path)]
        files = [p for p in found if _extension(p) in _BUILDERS]
        if not files:
            raise DataError(
                f"{data}: no text among the {len(found)} files of this directory, "
                f"expected some of {_KNOWN} (also .gz). Name the files or convert them."
            )
        return _file_source(files, data, split, sample_by, ignored=len(found) - len(files))
    if path.is_file():
        return _file_source([path], data, split, sample_by)
    if glob.has_magic(data):
        matches = (Path(match) for match in glob.glob(str(path), recursive=True))
        files = sorted(match for match in matches if match.is_file())
        if not files:
            raise DataError(f"{data}: no file matches this pattern. Check it with ls.")
        return _file_source(files, data, split, sample_by)
    if _looks_local(data):
        raise DataError(f"{data}: no such file or directory. Check the path given as data.")
    return _hub_source(data, data_config, split)


def _file_source(files: Sequence[Path], data: str, split: str, sample_by: str, ignored: int = 0) -> Source:
    unknown = [path for path in files if _extension(path) not in _BUILDERS]
    if unknown:
        raise DataError(
            f"{unknown[0]}: found extension {_extension(unknown[0]) or 'none'}, expected one of "
            f"{_KNOWN} (also .gz): it says how to read the file. Rename or convert it."
        )
    kinds = {_BUILDERS[_extension(path)][0] for path in files}
    if len(kinds) > 1:
        raise DataError(
            f"{data}: found {', '.join(sorted(kinds))} files together, expected one kind. "
            "Name one kind with a pattern, such as 'folder/*.jsonl'."
        )
    if not any(path.stat().st_size for path in files):
        raise DataError(f"{data}: the file is empty, expected text. Check how it was written.")
    builder, options = _BUILDERS[_extension(files[0])]
    if builder == "text":
        options = {"sample_by": sample_by}
    if not split.startswith("train"):
        raise DataError(
            f"{data}: no split {split!r}, expected 'train' or a slice of it such as 'train[:10%]': "
            "local files have no other. Name the files of the split instead."
        )
    try:
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
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"{data}: no split {split!r}, found {', '.join(saved)}. Choose one of them.")
        path, saved = path / split, saved[split]
    elif split not in ("train", str(saved.split)):
        raise DataError(f"{data}: no split {split!r}, found a single dataset. Leave the split at its default.")
    return Source(saved, tuple(sorted(path.glob("data-*.arrow"))), ignored_files=0)


def _hub_source(name: str, config: str | None, split: str) -> Source:
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name}: neither a local file or directory nor a dataset that the hub could give: "
            f"{_one_line(error)}. Check the spelling and the network; a private one needs a login."
        ) from error
    except ValueError as error:  # an unknown configuration or split; the message lists those there are
        raise DataError(
            f"{name}: {_one_line(error)}. Choose the data configuration and the split accordingly."
        ) from error
    return Source(rows, (), ignored_files=0)


def _unreadable(data: str, files: Sequence[Path], builder: str, error: BaseException) -> str:
    if builder == "json" and (line := _first_bad_line(files)):
        return f"{line}. Correct or remove the line."
    if "corresponds to no data" in str(error):  # how `datasets` says that a file has no rows
        return f"{data}: {_NO_ROWS}"
    while isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
        error = error.__cause__
    return f"{data}: cannot be read as {builder}: {_one_line(error)}. Check file and extension."


def _first_bad_line(files: Sequence[Path]) -> str | None:
    """`datasets` names neither the file nor, in a later block of it, the line: look again."""
    for path in files:
        if path.name.removesuffix(".gz").endswith(".jsonl"):
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
                for number, line in enumerate(lines, start=1):
                    try:
                        json.loads(line) if line.strip() else None
                    except ValueError as error:
                        return f"{path}, line {number}: invalid JSON: {_one_line(error)}"
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(f"{error}".split()).rstrip(".!") or type(error).__name__


def _extension(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _looks_local(data: str) -> bool:
    """Hub names are `name` or `owner/name`, without a file's extension."""
    return (
        data.startswith(("/", ".", "~"))
        or data.endswith("/")
        or "\\" in data
        or data.count("/") > 1
        or _extension(Path(data)) in _BUILDERS
        or data.lower().endswith(".gz")
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
