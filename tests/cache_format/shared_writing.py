"""A cache that several writers share, and the same cache as one writer leaves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cache_format as cf
from cache_samples import contents
from packed_samples import TOP_K, metadata_of, row_of

ROWS = 26  # 7 shards of 4, the last of 2
FILES = {"tokenizer.json": b"{}"}


def metadata(encoding: str = "columns", **changes: Any) -> cf.CacheMetadata:
    return metadata_of(TOP_K, ROWS, encoding=encoding, **changes)


def sample_row(row: int) -> cf.CacheRow:
    return row_of(metadata(), row)


def shared(path: Path | str, share: cf.Share | None = None, *, encoding: str = "columns", **options: Any):
    options = {"tokenizer_files": FILES, "share": share or cf.Share(), "stale_after_s": 2.0, **options}
    return cf.SharedCacheWriter(path, metadata(encoding), **options)


def write_shard(writer: cf.SharedCacheWriter) -> int | None:
    """Asks for a shard and writes it. Returns: which."""
    shard = writer.begin_shard()
    if shard is not None:
        writer.write([sample_row(row) for row in metadata().shard_rows(shard)])
    return shard


def work(path: Path | str, share: cf.Share | None = None, **options: Any) -> list[int]:
    """One writer's whole life. Returns: the shards it wrote."""
    with shared(path, share, **options) as writer:
        return list(iter(lambda: write_shard(writer), None))


def alone(path: Path | str, encoding: str = "columns") -> dict[str, bytes]:
    with cf.CacheWriter(path, metadata(encoding), tokenizer_files=FILES) as writer:
        writer.write([sample_row(row) for row in range(ROWS)])
    return contents(Path(path))
