"""Changes of a shard that only the rules of the format can notice; `cache_samples.forge_shard` applies them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from cache_samples import SHARD, SIDECAR, contents, seal_manifest


def relist(column: pa.ListArray, values: pa.Array, offsets: pa.Array | None = None) -> pa.Array:
    offsets = column.offsets if offsets is None else offsets
    return pa.ListArray.from_arrays(offsets, values, type=column.type)


def put(name: str, index: int, value: int):
    """Set one item of the flat values of a list column."""

    def change(columns):
        values = columns[name].values.to_numpy(zero_copy_only=False).copy()
        values[index] = value
        columns[name] = relist(columns[name], pa.array(values))

    return change


def swap_ids(columns):
    column = columns["target_ids"]
    columns["target_ids"] = relist(column, column.values.take(_reversed(len(column.values))))


def _reversed(length: int) -> pa.Array:
    return pa.array(np.arange(length)[::-1])


def damaged(path: Path, part: str) -> Iterator[None]:
    """150 times another byte of the first shard, in the header or the first record batch, under true checksums."""
    good, rng = contents(path), np.random.default_rng(0)
    sidecar = json.loads(good[SIDECAR])
    span = sidecar["header"] if part == "header" else sidecar["record_batches"][0]
    for _ in range(150):
        data = bytearray(good[SHARD])
        data[rng.integers(span["start"], span["stop"])] = rng.integers(256)
        (path / SHARD).write_bytes(data)
        # The ranges stay where they are: Arrow could not find them in damaged messages.
        span["sha256"] = hashlib.sha256(data[span["start"] : span["stop"]]).hexdigest()
        (path / SIDECAR).write_text(json.dumps(sidecar))
        seal_manifest(path)
        yield
