"""A `RowBatch` as an Arrow record batch and back: the two encodings of a shard, encoding beside decoding.

    columns    every field is a column of a native Arrow type; log-probabilities through their codebooks
    packed     tokens, loss mask and segments are columns; the targets of all rows are one block of bytes (`packed`)

Hidden states, if there are any, are columns behind these in both (`hidden`).

Going from arrays to columns is a table lookup for the quantised ones, going back is the same lookup.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cache_format.codecs.packed.block import pack, unpack
from cache_format.codecs.packed.lexicon import Lexicon
from cache_format.codecs.packed.streams import PackedStreams
from cache_format.manifest.metadata import FORMAT_NAME, CacheMetadata
from cache_format.rows.hidden import PREFIX, from_arrow, to_arrow
from cache_format.rows.row_batch import Offsets, RowBatch

POSITION_COLUMNS = ("loss_mask", "target_counts", "exact_counts", "residual_logprob", "entropy")


def arrow_schema(metadata: CacheMetadata) -> pa.Schema:
    """The schema of every shard of a cache: fully determined by its metadata."""
    token, count = pa.from_numpy_dtype(metadata.id_type), pa.from_numpy_dtype(metadata.count_type)
    logprob = pa.dictionary(pa.uint8(), pa.float32())
    columns = {
        "input_ids": token,
        "loss_mask": pa.bool_(),
        "segment_lengths": pa.int32(),
    }
    targets = {
        "target_counts": count,
        "target_ids": token,
        "target_logprobs": logprob,
        "exact_counts": count,
        "residual_logprob": logprob,
        "entropy": logprob,
    }
    packed = metadata.encoding == "packed"
    if not packed:
        columns |= targets
    if metadata.alignment == "same":
        columns["labels"] = pa.int32()
    if metadata.num_samples > 1 and not packed:
        columns["sample_counts"] = count
    of_targets, of_hidden = (
        [
            pa.field(name, pa.list_(pa.field("item", item, nullable=False)), nullable=False)
            for name, item in group.items()
        ]
        for group in (columns, {} if metadata.hidden is None else metadata.hidden.types())
    )
    about = {
        "format": FORMAT_NAME,
        "format_version": str(metadata.format_version),
        "spec": "cache_format/SPEC.md",
    }
    block = [pa.field("packed", pa.binary(), nullable=False)] if packed else []
    return pa.schema([pa.field("row", pa.uint64(), nullable=False), *of_targets, *block, *of_hidden], metadata=about)


def encode(
    batch: RowBatch, schema: pa.Schema, metadata: CacheMetadata, lexicon: Lexicon | None = None
) -> pa.RecordBatch:
    """A checked batch as Arrow columns. Raises: ValueError for a value that no code stands for.

    Args:
        lexicon: for the packed encoding.
    """
    codebooks = metadata.codebooks
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
    if batch.sample_counts is not None:
        columns["sample_counts"] = (tokens * batch.sample_counts.shape[1], batch.sample_counts.ravel())
    if (batch.hidden is None) != (metadata.hidden is None):
        raise ValueError(f"{'no' if batch.hidden is None else 'some'} hidden states, unlike the metadata")
    arrays = [pa.array(batch.rows)]
    for name in schema.names[1:]:
        if batch.hidden is not None and metadata.hidden is not None and name.startswith(PREFIX):
            arrays.append(to_arrow(name, batch.hidden, metadata.hidden, tokens, schema.field(name).type))
            continue
        if name == "packed":
            assert lexicon is not None
            # All of the record batch in its first row: what rows have in common is coded once.
            blocks = [pack(batch, metadata, lexicon)] + [b""] * (len(batch) - 1)
            arrays.append(pa.array(blocks, pa.binary()))
            continue
        offsets, values = columns[name]
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


def decode(
    record_batch: pa.RecordBatch,
    metadata: CacheMetadata,
    lexicon: Lexicon | None = None,
    most_entries: int = 2**31,
    streams: PackedStreams | None = None,
) -> RowBatch:
    """Inverse of `encode`, up to the quantisation of the codebooks.

    Args:
        lexicon: for the packed encoding.
        most_entries: that packed targets may have.
        streams: to which is added what each stream of packed targets takes.

    Raises: ValueError if the columns disagree in length, hold nulls or carry another codebook;
    pa.ArrowInvalid if the batch is not well formed.
    """
    record_batch.validate(full=True)
    codebooks = metadata.codebooks
    offsets: dict[str, Offsets] = {}
    values: dict[str, NDArray[Any]] = {}
    hidden: dict[str, pa.ListArray] = {}
    for name, column in zip(record_batch.schema.names, record_batch.columns, strict=True):
        if name.startswith(PREFIX):
            hidden[name] = column
            continue
        items = column if name in ("row", "packed") else column.values
        if column.null_count or items.null_count:
            raise ValueError(f"column {name} holds nulls, expected none")
        if name == "row":
            values[name] = items.to_numpy()
        if name in ("row", "packed"):
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
    states = None if metadata.hidden is None else from_arrow(hidden, metadata.hidden, offsets["input_ids"])
    if metadata.encoding == "packed":
        batch = _unpacked(record_batch, values, offsets, metadata, lexicon, most_entries, streams)
        return replace(batch, hidden=states)
    for name in POSITION_COLUMNS + (("labels",) if "labels" in values else ()):
        if not np.array_equal(offsets[name], offsets["input_ids"]):
            raise ValueError(f"the lists of {name} and input_ids differ in length")
    samples = values.get("sample_counts")
    if samples is not None:
        if not np.array_equal(offsets["sample_counts"], offsets["input_ids"] * metadata.num_samples):
            raise ValueError(f"sample_counts has not {metadata.num_samples} numbers for each of input_ids")
        samples = samples.reshape(-1, metadata.num_samples)
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
        sample_counts=samples,
        hidden=states,
    )


def _unpacked(
    record_batch: pa.RecordBatch,
    values: dict[str, NDArray[Any]],
    offsets: dict[str, Offsets],
    metadata: CacheMetadata,
    lexicon: Lexicon | None,
    most_entries: int,
    streams: PackedStreams | None,
) -> RowBatch:
    assert lexicon is not None
    tokens = offsets["input_ids"]
    for name in ("loss_mask", *(("labels",) if "labels" in values else ())):
        if not np.array_equal(offsets[name], tokens):
            raise ValueError(f"the lists of {name} and input_ids differ in length")
    block = record_batch.column("packed")
    if not len(block):
        raise ValueError("there are no rows")
    if any(len(cell.as_buffer()) for cell in block[1:]):
        raise ValueError("packed targets in another row than the first")
    input_ids = values["input_ids"].astype(np.int64)
    if (input_ids >= metadata.vocab_size).any():
        raise ValueError(f"an input id is outside the vocabulary of {metadata.vocab_size}")
    data = memoryview(block[0].as_buffer())
    mask = values["loss_mask"]
    fields: dict[str, Any] = dict(unpack(data, input_ids, mask, metadata, lexicon, most_entries, streams))
    entries = np.concatenate([[0], np.cumsum(fields["counts"], dtype=np.int64)])
    for array in fields.values():
        array.setflags(write=False)
    return RowBatch(
        rows=values["row"],
        token_offsets=tokens,
        segment_offsets=offsets["segment_lengths"],
        entry_offsets=entries[tokens],
        input_ids=values["input_ids"],
        loss_mask=values["loss_mask"],
        segment_lengths=values["segment_lengths"],
        labels=values.get("labels"),
        **fields,
    )
