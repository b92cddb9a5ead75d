"""The encoding `packed`: the targets of a record batch are one block of bytes in a binary column (`block`), in which
tokens are named by their rank in a lexicon that the cache stores once (`lexicon`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cache_format.codecs.codec import Codec, ListColumns
from cache_format.codecs.packed.block import pack, unpack
from cache_format.codecs.packed.lexicon import Lexicon
from cache_format.codecs.packed.streams import PackedStreams
from cache_format.manifest.metadata import CacheMetadata
from cache_format.rows.row_batch import RowBatch, offsets

COLUMN = "packed"
OVERHEAD = 2**20  # bytes of a block that are not entries: frequencies and final states


class PackedCodec(Codec):
    def __init__(self, metadata: CacheMetadata, lexicon: Lexicon | None = None) -> None:
        super().__init__(metadata)
        self.lexicon = lexicon

    @property
    def needs_lexicon(self) -> bool:  # type: ignore[override]
        return self.lexicon is None

    def with_lexicon(self, data: bytes, where: str) -> PackedCodec:
        return PackedCodec(self.metadata, Lexicon.from_bytes(data, self.metadata.vocab_size, where))

    def learn_lexicon(self, batches: Sequence[RowBatch]) -> bytes:
        contexts = np.concatenate([np.repeat(batch.input_ids.astype(np.int64), batch.counts) for batch in batches])
        ids = np.concatenate([batch.ids.astype(np.int64) for batch in batches])
        weight = self.metadata.num_rows / sum(len(batch) for batch in batches)
        return Lexicon.learn(contexts, ids, self.metadata.vocab_size, weight).to_bytes()

    def column_overhead(self, name: str) -> int:
        return OVERHEAD if name == COLUMN else 0

    def unannounced_bytes(self, tokens: int, entries: int) -> int:
        return 8 * entries + 2 * tokens * self.metadata.num_samples

    def _target_types(self) -> Mapping[str, pa.DataType]:
        return {"labels": pa.int32()} if self.metadata.alignment == "same" else {}

    def _blocks(self) -> list[pa.Field]:
        return [pa.field(COLUMN, pa.binary(), nullable=False)]

    def _encode_targets(self, batch: RowBatch) -> dict[str, pa.Array]:
        assert self.lexicon is not None
        # The first row holds the block of all rows, so that their frequencies are stored once.
        blocks = [pack(batch, self.metadata, self.lexicon)] + [b""] * (len(batch) - 1)
        return {COLUMN: pa.array(blocks, pa.binary())}

    def _decode_targets(
        self, record_batch: pa.RecordBatch, lists: ListColumns, most_entries: int, streams: PackedStreams | None
    ) -> dict[str, Any]:
        assert self.lexicon is not None
        blocks = record_batch.column(COLUMN)
        if not len(blocks):
            raise ValueError("there are no rows")
        if any(len(cell.as_buffer()) for cell in blocks[1:]):
            raise ValueError("packed targets in a row that is not the first")
        input_ids = lists.values["input_ids"].astype(np.int64)
        if (input_ids >= self.metadata.vocab_size).any():
            raise ValueError(f"an input id is outside the vocabulary of {self.metadata.vocab_size}")
        data, mask = memoryview(blocks[0].as_buffer()), lists.values["loss_mask"]
        fields = unpack(data, input_ids, mask, self.metadata, self.lexicon, most_entries, streams)
        for array in fields.values():
            array.setflags(write=False)
        return {**fields, "entry_offsets": offsets(fields["counts"])[lists.offsets["input_ids"]]}
