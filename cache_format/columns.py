"""Rows as one Arrow record batch and back: the columns of a shard, encoding beside decoding.

A `RowBatch` is the middle step: every column as one flat array over all rows, with the offsets that
cut it into rows. Going from rows to a record batch is a concatenation per column and a table lookup
for the quantised ones; going back is the same lookup, and rows are views, not copies. Nothing here
loops over positions.

Shapes: R rows, N positions of all rows, E entries of all positions, S segments of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cache_format.codebook import Codebook
from cache_format.metadata import FORMAT_NAME, FORMAT_VERSION, CacheMetadata
from cache_format.types import CacheRow, FloatArray, IntArray, SparseTargets

Offsets = NDArray[np.int64]
POSITION_COLUMNS = ("loss_mask", "target_counts", "exact_counts", "residual_logprob", "entropy")


@dataclass(frozen=True, eq=False)
class RowBatch:
    """Consecutive rows, column by column."""

    rows: NDArray[np.uint64]  # [R]
    token_offsets: Offsets  # [R + 1] into every per-position array
    segment_offsets: Offsets  # [R + 1] into segment_lengths
    entry_offsets: Offsets  # [R + 1] into ids and logprobs
    input_ids: IntArray  # [N]
    loss_mask: NDArray[np.bool_]  # [N]
    segment_lengths: IntArray  # [S]
    counts: IntArray  # [N]
    ids: IntArray  # [E]
    logprobs: FloatArray  # [E]
    exact_counts: IntArray  # [N]
    residual_logprob: FloatArray  # [N]
    entropy: FloatArray  # [N]
    labels: IntArray | None  # [N], alignment "same"

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_counted_tokens(self) -> int:
        return int(np.count_nonzero(self.loss_mask))

    @property
    def num_entries(self) -> int:
        return len(self.ids)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> CacheRow:
        tokens = slice(self.token_offsets[index], self.token_offsets[index + 1])
        segments = slice(self.segment_offsets[index], self.segment_offsets[index + 1])
        entries = slice(self.entry_offsets[index], self.entry_offsets[index + 1])
        return CacheRow(
            row=int(self.rows[index]),
            input_ids=self.input_ids[tokens],
            loss_mask=self.loss_mask[tokens],
            segment_lengths=self.segment_lengths[segments],
            targets=SparseTargets(
                counts=self.counts[tokens],
                ids=self.ids[entries],
                logprobs=self.logprobs[entries],
                exact_counts=self.exact_counts[tokens],
                residual_logprob=self.residual_logprob[tokens],
                entropy=self.entropy[tokens],
            ),
            labels=None if self.labels is None else self.labels[tokens],
        )


def concatenate(rows: Sequence[CacheRow]) -> RowBatch:
    """Inverse of `RowBatch.row`. Raises: ValueError if the arrays of a row disagree in length."""
    for row in rows:
        _check_lengths(row)
    targets = [row.targets for row in rows]
    labels = [row.labels for row in rows if row.labels is not None]
    if len(labels) not in (0, len(rows)):
        raise ValueError("some rows have labels and some have none")
    return RowBatch(
        rows=np.array([row.row for row in rows], np.uint64),
        token_offsets=_offsets([len(row.input_ids) for row in rows]),
        segment_offsets=_offsets([len(row.segment_lengths) for row in rows]),
        entry_offsets=_offsets([len(t.ids) for t in targets]),
        input_ids=np.concatenate([row.input_ids for row in rows]),
        loss_mask=np.concatenate([row.loss_mask for row in rows]).astype(np.bool_),
        segment_lengths=np.concatenate([row.segment_lengths for row in rows]),
        counts=np.concatenate([t.counts for t in targets]),
        ids=np.concatenate([t.ids for t in targets]),
        logprobs=np.concatenate([t.logprobs for t in targets]).astype(np.float32),
        exact_counts=np.concatenate([t.exact_counts for t in targets]),
        residual_logprob=np.concatenate([t.residual_logprob for t in targets]).astype(np.float32),
        entropy=np.concatenate([t.entropy for t in targets]).astype(np.float32),
        labels=np.concatenate(labels) if labels else None,
    )


def arrow_schema(metadata: CacheMetadata) -> pa.Schema:
    """The schema of every shard of a cache: fully determined by its metadata."""
    token, count = pa.from_numpy_dtype(metadata.id_type), pa.from_numpy_dtype(metadata.count_type)
    logprob = pa.dictionary(pa.uint8(), pa.float32())
    columns = {
        "input_ids": token,
        "loss_mask": pa.bool_(),
        "segment_lengths": pa.int32(),
        "target_counts": count,
        "target_ids": token,
        "target_logprobs": logprob,
        "exact_counts": count,
        "residual_logprob": logprob,
        "entropy": logprob,
    }
    if metadata.alignment == "same":
        columns["labels"] = pa.int32()
    lists = [
        pa.field(name, pa.list_(pa.field("item", item, nullable=False)), nullable=False)
        for name, item in columns.items()
    ]
    about = {
        "format": FORMAT_NAME,
        "format_version": str(FORMAT_VERSION),
        "spec": "cache_format/SPEC.md",
    }
    return pa.schema([pa.field("row", pa.uint64(), nullable=False), *lists], metadata=about)


def encode(batch: RowBatch, schema: pa.Schema, codebooks: Mapping[str, Codebook]) -> pa.RecordBatch:
    """A checked batch as Arrow columns. Raises: ValueError for a value that no code stands for."""
    tokens, entries = batch.token_offsets, batch.entry_offsets
    columns: dict[str, tuple[Offsets, NDArray[Any]]] = {
        "input_ids": (tokens, batch.input_ids),
        "loss_mask": (tokens, batch.loss_mask),
        "segment_lengths": (batch.segment_offsets, batch.segment_lengths),
        "target_counts": (tokens, batch.counts),
        "target_ids": (entries, batch.ids),
        "target_logprobs": (entries, batch.logprobs),
        "exact_counts": (tokens, batch.exact_counts),
        "residual_logprob": (tokens, batch.residual_logprob),
        "entropy": (tokens, batch.entropy),
    }
    if batch.labels is not None:
        columns["labels"] = (tokens, batch.labels)
    arrays = [pa.array(batch.rows)]
    for name, (offsets, values) in columns.items():
        list_type = schema.field(name).type
        if name in codebooks:
            codes = pa.array(codebooks[name].encode(values))
            items = pa.DictionaryArray.from_arrays(codes, pa.array(codebooks[name].values))
        else:
            dtype = list_type.value_type.to_pandas_dtype()
            items = pa.array(values.astype(dtype, copy=False))
        starts = pa.array(offsets.astype(np.int32))
        arrays.append(pa.ListArray.from_arrays(starts, items, type=list_type))
    return pa.record_batch(arrays, schema=schema)


def decode(record_batch: pa.RecordBatch, codebooks: Mapping[str, Codebook]) -> RowBatch:
    """Inverse of `encode`, up to the quantisation of the codebooks.

    Raises: ValueError if the columns disagree in length, hold nulls or carry another codebook;
    pa.ArrowInvalid if the batch is not well formed.
    """
    record_batch.validate(full=True)
    offsets: dict[str, Offsets] = {}
    values: dict[str, NDArray[Any]] = {}
    for name, column in zip(record_batch.schema.names, record_batch.columns, strict=True):
        items = column if name == "row" else column.values
        if column.null_count or items.null_count:
            raise ValueError(f"column {name} holds nulls, expected none")
        if name == "row":
            values[name] = items.to_numpy()
            continue
        starts = column.offsets.to_numpy().astype(np.int64)
        offsets[name] = starts - starts[0]
        items = items.slice(starts[0], offsets[name][-1])
        if name in codebooks:
            codebook = codebooks[name]
            if items.dictionary.to_numpy().tobytes() != codebook.values.tobytes():
                raise ValueError(f"the dictionary of {name} is not the codebook of the manifest")
            values[name] = codebook.decode(items.indices.to_numpy())
        else:
            values[name] = items.to_numpy(zero_copy_only=False)
        values[name].setflags(write=False)
    for name in POSITION_COLUMNS + (("labels",) if "labels" in values else ()):
        if not np.array_equal(offsets[name], offsets["input_ids"]):
            raise ValueError(f"the lists of {name} and input_ids differ in length")
    if not np.array_equal(offsets["target_logprobs"], offsets["target_ids"]):
        raise ValueError("the lists of target_logprobs and target_ids differ in length")
    return RowBatch(
        rows=values["row"],
        token_offsets=offsets["input_ids"],
        segment_offsets=offsets["segment_lengths"],
        entry_offsets=offsets["target_ids"],
        input_ids=values["input_ids"],
        loss_mask=values["loss_mask"],
        segment_lengths=values["segment_lengths"],
        counts=values["target_counts"],
        ids=values["target_ids"],
        logprobs=values["target_logprobs"],
        exact_counts=values["exact_counts"],
        residual_logprob=values["residual_logprob"],
        entropy=values["entropy"],
        labels=values.get("labels"),
    )


def _offsets(lengths: Sequence[int]) -> Offsets:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _check_lengths(row: CacheRow) -> None:
    targets, num_tokens = row.targets, len(row.input_ids)
    lengths = {
        "loss_mask": len(row.loss_mask),
        "counts": len(targets.counts),
        "exact_counts": len(targets.exact_counts),
        "residual_logprob": len(targets.residual_logprob),
        "entropy": len(targets.entropy),
        "labels": num_tokens if row.labels is None else len(row.labels),
    }
    for name, length in lengths.items():
        if length != num_tokens:
            raise ValueError(f"row {row.row}: {name} has {length} positions, expected {num_tokens}")
    if len(targets.logprobs) != len(targets.ids):
        raise ValueError(f"row {row.row}: {len(targets.logprobs)} logprobs for {len(targets.ids)} ids")
