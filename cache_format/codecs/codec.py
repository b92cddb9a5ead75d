"""Row batches as Arrow record batches and back: the interface of an encoding, and the columns that all encodings share.

    Codec           row, tokens, loss mask, segments, labels, hidden states; checks and schema
    ColumnsCodec    targets as columns of native Arrow types                            (`columns`)
    PackedCodec     targets of all rows as one entropy-coded block of bytes             (`packed`)

Reader and writer take the codec of a cache from `encodings.codec_for` and use nothing else of an encoding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cache_format.codecs.packed.streams import PackedStreams
from cache_format.manifest.metadata import FORMAT_NAME, CacheMetadata
from cache_format.rows.hidden import PREFIX, from_arrow, to_arrow
from cache_format.rows.row_batch import Offsets, RowBatch


@dataclass(frozen=True)
class ListColumns:
    """List columns of a record batch as flat arrays, by name.

    Attributes:
        values: items of all rows; `row` is here as well.
        offsets: [R + 1] where the items of each row begin.
    """

    values: dict[str, NDArray[Any]]
    offsets: dict[str, Offsets]

    def check_per_position(self, names: Sequence[str]) -> None:
        """Raises: ValueError unless these columns have one item for each of `input_ids`."""
        for name in names:
            if name in self.offsets and not np.array_equal(self.offsets[name], self.offsets["input_ids"]):
                raise ValueError(f"the lists of {name} and input_ids differ in length")


class Codec(ABC):
    """One encoding of the row batches of a cache.

    Attributes:
        schema: of every shard; it follows from the metadata alone.
        needs_lexicon: True while shards can be neither written nor read for lack of the file lexicon.arrow.
    """

    needs_lexicon = False

    def __init__(self, metadata: CacheMetadata) -> None:
        self.metadata = metadata
        self.schema = self._schema()

    def encode(self, batch: RowBatch) -> pa.RecordBatch:
        """A checked batch as a record batch of `schema`. Raises: ValueError for a value that no code represents."""
        metadata, tokens = self.metadata, batch.token_offsets
        if (batch.hidden is None) != (metadata.hidden is None):
            raise ValueError(f"{'no' if batch.hidden is None else 'some'} hidden states, unlike the metadata")
        columns = {
            "row": pa.array(batch.rows),
            "input_ids": self._list("input_ids", tokens, batch.input_ids),
            "loss_mask": self._list("loss_mask", tokens, batch.loss_mask),
            "segment_lengths": self._list("segment_lengths", batch.segment_offsets, batch.segment_lengths),
            **self._encode_targets(batch),
        }
        if batch.labels is not None:
            columns["labels"] = self._list("labels", tokens, batch.labels)
        if batch.hidden is not None and metadata.hidden is not None:
            for name in metadata.hidden.columns():
                kind = self.schema.field(name).type
                columns[name] = to_arrow(name, batch.hidden, metadata.hidden, tokens, kind)
        return pa.record_batch([columns[name] for name in self.schema.names], schema=self.schema)

    def decode(
        self, record_batch: pa.RecordBatch, most_entries: int = 2**31, streams: PackedStreams | None = None
    ) -> RowBatch:
        """Inverse of `encode`, up to the rounding of the codebooks; hidden columns may be missing.

        Args:
            most_entries: limit for entries whose number no column states.
            streams: collects the size of each stream of a packed batch.

        Raises: ValueError if columns disagree in length, hold nulls or use another codebook; pa.ArrowInvalid if the
            batch is not well formed.
        """
        record_batch.validate(full=True)
        lists, hidden = self._read(record_batch)
        tokens, spec = lists.offsets["input_ids"], self.metadata.hidden
        states = None if spec is None else from_arrow(hidden, spec, tokens)
        lists.check_per_position(("loss_mask", "labels"))
        targets = self._decode_targets(record_batch, lists, most_entries, streams)
        return RowBatch(
            rows=lists.values["row"],
            token_offsets=tokens,
            segment_offsets=lists.offsets["segment_lengths"],
            input_ids=lists.values["input_ids"],
            loss_mask=lists.values["loss_mask"],
            segment_lengths=lists.values["segment_lengths"],
            labels=lists.values.get("labels"),
            hidden=states,
            **targets,
        )

    def column_overhead(self, name: str) -> int:
        """Bytes that a column may take besides those of its items."""
        return 0

    def unannounced_bytes(self, tokens: int, entries: int) -> int:
        """Bytes that decoding allocates without a buffer that announces them."""
        return 0

    def with_lexicon(self, data: bytes, where: str) -> Codec:
        """The codec with the contents of lexicon.arrow. Raises: FormatError, naming `where`."""
        raise TypeError(f"encoding {self.metadata.encoding!r} has no lexicon")

    def learn_lexicon(self, batches: Sequence[RowBatch]) -> bytes:
        """Contents of lexicon.arrow, learned from the record batches of shard 0."""
        raise TypeError(f"encoding {self.metadata.encoding!r} has no lexicon")

    @abstractmethod
    def _target_types(self) -> Mapping[str, pa.DataType]:
        """Item types of the list columns behind `segment_lengths`, labels included."""

    @abstractmethod
    def _encode_targets(self, batch: RowBatch) -> dict[str, pa.Array]: ...

    @abstractmethod
    def _decode_targets(
        self, record_batch: pa.RecordBatch, lists: ListColumns, most_entries: int, streams: PackedStreams | None
    ) -> dict[str, Any]:
        """The fields of `RowBatch` that describe targets, `entry_offsets` included."""

    def _blocks(self) -> list[pa.Field]:
        """Columns without lists, behind the targets."""
        return []

    def _schema(self) -> pa.Schema:
        metadata = self.metadata
        tokens = {
            "input_ids": pa.from_numpy_dtype(metadata.id_type),
            "loss_mask": pa.bool_(),
            "segment_lengths": pa.int32(),
        }
        fields = [
            pa.field("row", pa.uint64(), nullable=False),
            *_list_fields({**tokens, **self._target_types()}),
            *self._blocks(),
            *_list_fields({} if metadata.hidden is None else metadata.hidden.types()),
        ]
        about = {
            "format": FORMAT_NAME,
            "format_version": str(metadata.format_version),
            "spec": "cache_format/SPEC.md",
        }
        return pa.schema(fields, metadata=about)

    def _list(self, name: str, offsets: Offsets, values: NDArray[Any]) -> pa.Array:
        kind, codebook = self.schema.field(name).type, self.metadata.codebooks.get(name)
        if codebook is not None:
            items = pa.DictionaryArray.from_arrays(pa.array(codebook.encode(values)), pa.array(codebook.values))
        else:
            items = pa.array(values.astype(kind.value_type.to_pandas_dtype(), copy=False))
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), items, type=kind)

    def _read(self, record_batch: pa.RecordBatch) -> tuple[ListColumns, dict[str, pa.ListArray]]:
        """The list columns, and the columns of hidden states as they are."""
        found, hidden = ListColumns({}, {}), {}
        for name, column in zip(record_batch.schema.names, record_batch.columns, strict=True):
            if name.startswith(PREFIX):
                hidden[name] = column
                continue
            is_list = pa.types.is_list(column.type)
            items = column.values if is_list else column
            if column.null_count or items.null_count:
                raise ValueError(f"column {name} holds nulls, expected none")
            if name == "row":
                found.values[name] = items.to_numpy()
            if not is_list:
                continue
            starts = column.offsets.to_numpy().astype(np.int64)
            found.offsets[name] = starts - starts[0]
            items = items.slice(starts[0], starts[-1] - starts[0])
            if (codebook := self.metadata.codebooks.get(name)) is not None:
                if items.dictionary.to_numpy().tobytes() != codebook.values.tobytes():
                    raise ValueError(f"the dictionary of {name} is not the codebook of the manifest")
                values: NDArray[Any] = codebook.decode(items.indices.to_numpy())
            else:
                values = items.to_numpy(zero_copy_only=False)
            values.setflags(write=False)
            found.values[name] = values
        return found, hidden


def _list_fields(items: Mapping[str, pa.DataType]) -> list[pa.Field]:
    return [
        pa.field(name, pa.list_(pa.field("item", item, nullable=False)), nullable=False) for name, item in items.items()
    ]
