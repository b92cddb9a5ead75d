"""Conversions at once, and caches to convert."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import cache_format as cf
from cache_samples import contents, sample_metadata
from packed_samples import KINDS, THRESHOLD, metadata_of, row_of, write_cache


def convert(source: Path, output: Path, **changes: Any) -> cf.Cache:
    """Converted at once, and the source is what it was."""
    before = contents(source)
    rows = list(cf.convert_cache(source, output, cf.Conversion(**changes)))
    assert rows == [stop for _, stop in cf.open_cache(source).record_batches()]
    assert contents(source) == before
    cf.verify_cache(output, deep=True)
    return cf.open_cache(output)


def shards(path: Path) -> dict[str, bytes]:
    """The bytes of the Arrow files. Sidecars differ: they say which lexicon was used."""
    return {name: data for name, data in contents(path).items() if name.startswith("shards/") and "arrow" in name}


def assert_same_rows(found: cf.Cache, expected: cf.Cache) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        for name in ("input_ids", "loss_mask", "segment_lengths", "labels"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)
        for name in ("counts", "ids", "logprobs", "exact_counts", "residual_logprob", "entropy", "sample_counts"):
            np.testing.assert_array_equal(getattr(a.targets, name), getattr(b.targets, name), name)


def one_of_each(folder: Path) -> dict[str, Path]:
    """A cache of each kind of targets, as columns."""
    for kind, targets in KINDS.items():
        write_cache(folder / kind, metadata_of(targets))
    return {kind: folder / kind for kind in KINDS}


def with_equal_weights(row: cf.CacheRow, samples: int, threshold: float = 0.4) -> cf.CacheRow:
    """As a teacher with this threshold gives them: every sampled weight is τ/M."""
    targets = row.targets
    rank = np.arange(len(targets.ids)) - np.repeat(targets.offsets[:-1], targets.counts)
    sampled = rank >= np.repeat(targets.exact_counts, targets.counts)
    weight = np.float32(np.log(threshold / samples))
    return replace(
        row,
        loss_mask=row.loss_mask & (targets.exact_counts > 0),  # so that each sample alone has an entry
        targets=replace(targets, logprobs=np.where(sampled, weight, targets.logprobs)),
    )


def write_three_samples(path: Path) -> Path:
    """Threshold targets with the codebook that they are captured with."""
    book = cf.weight_codebook(64, 0.4 / 3)
    books = {**cf.default_codebooks(1000), "target_logprobs": book}
    metadata = sample_metadata(targets={**THRESHOLD, "samples": 3}, codebooks=books)
    with cf.CacheWriter(path, metadata) as writer:
        writer.write([with_equal_weights(row_of(metadata, row), 3) for row in range(10)])
    return path
