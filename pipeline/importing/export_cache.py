"""Export: a cache with exact entries ─▶ Parquet files, one for each shard.

    parquet   input_ids [T], loss_mask [T] (of the token itself), segment_ids [T] (1, 2, …), top_ids and logprobs [T][n]
    axolotl   input_ids, labels, attention_mask [T], target_token_ids, target_logprobs, target_mask [T][K]: its prepared
              columns, lists of equal length; list t predicts token t + 1

Entries are written most likely first. What is lost: tail mass and entropy, which readers compute from the entries or do
without; log-probabilities stay those of the cache, rounded as they are there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import cache_format as cf
from cache_format.storage.directory import inside
from pipeline.errors import ConfigError
from pipeline.importing.exported_facts import ExportedFacts

FORMATS = ("parquet", "axolotl")
IGNORED = -100  # label of a token that is not in the loss


@dataclass(frozen=True)
class ExportSummary:
    output: str
    format: str
    rows: int
    files: int
    bytes: int


def export_cache(
    path: str, output: str, format: str, *, on_step: Callable[[float, float], None] = lambda done, total: None
) -> ExportSummary:
    """Writes all files, or none if there is an error.

    Raises:
        MismatchError: targets that a list of entries cannot express.
        ConfigError: an unknown `format`; or `output` is a URL, or lies in the cache.
        CacheError: the cache cannot be read, or `output` is not empty.
    """
    if format not in FORMATS:
        raise ConfigError(f"`format` {format}: expected {' or '.join(FORMATS)}.")
    cache, output = cf.open_cache(path), os.path.expanduser(output)
    _check(cache)
    _check_output(path, output)
    folder = Path(output)
    shards = cache.metadata.num_shards
    with _removed_on_error(folder) as written:
        for shard in range(shards):
            # A file that is not complete has another name, so that no reader takes it for one.
            file, partial = (folder / f"{dot}part-{shard:05d}.parquet" for dot in ("", "."))
            written += [file, partial]
            schema = _schema(format, cache.metadata)
            with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
                for rows in _rows_of(cache, shard):
                    columns = _columns(format, rows, cache.metadata.max_entries)
                    writer.write_batch(pa.record_batch(columns, schema=schema))
                    on_step(rows[-1].row + 1, cache.num_rows)
            os.replace(partial, file)
    size = sum(each.stat().st_size for each in folder.iterdir())
    return ExportSummary(output, format, cache.num_rows, shards, size)


@contextmanager
def _removed_on_error(folder: Path) -> Iterator[list[Path]]:
    """The files of an export. After an error or an interrupt they are removed, so that it can be repeated."""
    existed, written = folder.exists(), list[Path]()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield written
    except BaseException:
        for file in written:
            file.unlink(missing_ok=True)
        if not existed:
            with suppress(OSError):
                folder.rmdir()
        raise


def _check(cache: cf.Cache) -> None:
    metadata = cache.metadata
    problem = None
    if metadata.head is not None:
        problem = "hidden targets have no entries. Make lists of them with distill convert and `top_k`"
    elif metadata.sampled:
        problem = "entries of a sample are weights, and not log-probabilities. Export a cache with `targets=top-k`"
    elif metadata.alignment != "next":
        problem = "targets at masked tokens fit neither format. Export a cache of a causal model"
    if problem is not None:
        raise cf.MismatchError(f"{cache.path}: {problem}.")


def _check_output(path: str, output: str) -> None:
    if "://" in output:
        raise ConfigError(
            f"`output` {output}: found a URL, expected a local directory, because files are renamed there when "
            "they are complete. Export to a local directory and copy the files afterwards."
        )
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise cf.CacheError(f"{output}: found files there, expected an empty directory or none. Choose another.")
    if inside(output, path):
        raise ConfigError(
            f"`output` {output}: it lies in the cache to export ({path}), which no command would accept afterwards. "
            "Choose another directory."
        )


def _rows_of(cache: cf.Cache, shard: int) -> Iterator[list[cf.CacheRow]]:
    for rows in cache.metadata.record_batch_rows(shard):
        yield [cache[row] for row in rows]


def _schema(format: str, metadata: cf.CacheMetadata) -> pa.Schema:
    ids, value = pa.list_(pa.int32()), pa.list_(pa.list_(pa.float32()))
    lists = pa.list_(pa.list_(pa.int32()))
    if format == "parquet":
        columns = {"input_ids": ids, "loss_mask": pa.list_(pa.bool_()), "segment_ids": ids}
        columns |= {"top_ids": lists, "logprobs": value}
    else:
        columns = {"input_ids": ids, "labels": ids, "attention_mask": ids}
        columns |= {"target_token_ids": lists, "target_logprobs": value, "target_mask": lists}
    return pa.schema(columns, ExportedFacts.of_cache(metadata).to_schema())


def _columns(format: str, rows: list[cf.CacheRow], width: int) -> list[pa.Array]:
    columns: list[list[Any]] = []
    for row in rows:
        targets = row.targets.sorted_by_probability()
        counts = np.where(row.loss_mask, targets.counts, 0)
        kept = np.repeat(row.loss_mask, targets.counts)
        ids, logprobs = targets.ids[kept].astype(np.int32), targets.logprobs[kept]
        predicted = np.zeros(len(row.input_ids), np.bool_)  # whether the token itself is in the loss
        predicted[1:] = row.loss_mask[:-1]
        input_ids = row.input_ids.astype(np.int32)
        segments = np.repeat(np.arange(1, len(row.segment_lengths) + 1, dtype=np.int32), row.segment_lengths)
        if format == "parquet":
            columns.append([input_ids, predicted, segments, _lists(ids, counts), _lists(logprobs, counts)])
            continue
        labels = np.where(predicted, input_ids, IGNORED).astype(np.int32)
        there = np.arange(width) < counts[:, None]  # [T, K]
        padded_ids = np.broadcast_to(np.arange(width, dtype=np.int32), there.shape).copy()
        padded = np.full(there.shape, -np.inf, np.float32)
        padded_ids[there], padded[there] = ids, logprobs
        full = np.full(len(counts), width)
        lists = [_lists(values.ravel(), full) for values in (padded_ids, padded, there.astype(np.int32))]
        columns.append([input_ids, labels, segments, *lists])
    return [_column(list(values)) for values in zip(*columns, strict=True)]


def _lists(items: np.ndarray, counts: np.ndarray) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(items))


def _column(values: list[Any]) -> pa.Array:
    """One list for each row."""
    arrays = [value if isinstance(value, pa.Array) else pa.array(value) for value in values]
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in arrays])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.concat_arrays(arrays))
