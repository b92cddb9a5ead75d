"""The encoding `columns`: every field of the targets is a list column of a native Arrow type, so that any Arrow reader
shows it. Log-probabilities and entropies are dictionary-encoded with their codebooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from cache_format.codecs.codec import Codec, ListColumns
from cache_format.codecs.packed.streams import PackedStreams
from cache_format.rows.row_batch import RowBatch

# Column -> field of RowBatch.
PER_POSITION = {
    "target_counts": "counts",
    "exact_counts": "exact_counts",
    "residual_logprob": "residual_logprob",
    "entropy": "entropy",
}
PER_ENTRY = {"target_ids": "ids", "target_logprobs": "logprobs"}


class ColumnsCodec(Codec):
    def _target_types(self) -> Mapping[str, pa.DataType]:
        metadata = self.metadata
        token, count = pa.from_numpy_dtype(metadata.id_type), pa.from_numpy_dtype(metadata.count_type)
        code = pa.dictionary(pa.uint8(), pa.float32())
        types = {
            "target_counts": count,
            "target_ids": token,
            "target_logprobs": code,
            "exact_counts": count,
            "residual_logprob": code,
            "entropy": code,
        }
        if metadata.alignment == "same":
            types["labels"] = pa.int32()
        if metadata.num_samples > 1:
            types["sample_counts"] = count
        return types

    def _encode_targets(self, batch: RowBatch) -> dict[str, pa.Array]:
        columns = {
            name: self._list(name, offsets, getattr(batch, field))
            for group, offsets in ((PER_POSITION, batch.token_offsets), (PER_ENTRY, batch.entry_offsets))
            for name, field in group.items()
        }
        if batch.sample_counts is not None:
            offsets = batch.token_offsets * batch.sample_counts.shape[1]
            columns["sample_counts"] = self._list("sample_counts", offsets, batch.sample_counts.ravel())
        return columns

    def _decode_targets(
        self, record_batch: pa.RecordBatch, lists: ListColumns, most_entries: int, streams: PackedStreams | None
    ) -> dict[str, Any]:
        lists.check_per_position(tuple(PER_POSITION))
        offsets, samples = lists.offsets, self.metadata.num_samples
        sample_counts = lists.values.get("sample_counts")
        if sample_counts is not None:
            if not np.array_equal(offsets["sample_counts"], offsets["input_ids"] * samples):
                raise ValueError(f"sample_counts has not {samples} numbers for each of input_ids")
            sample_counts = sample_counts.reshape(-1, samples)
        if not np.array_equal(offsets["target_logprobs"], offsets["target_ids"]):
            raise ValueError("the lists of target_logprobs and target_ids differ in length")
        fields = {field: lists.values[name] for name, field in (PER_POSITION | PER_ENTRY).items()}
        return {**fields, "entry_offsets": offsets["target_ids"], "sample_counts": sample_counts}
