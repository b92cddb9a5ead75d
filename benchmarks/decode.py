"""Reading a cache at top-64, and writing one: tokens per second of one core.

    iterate     open_cache, every row in order: checksum, Arrow, zstd, checks of the format, codebook look-up
    packed      the same of the packed encoding: entropy decoding instead of zstd
    batches     the same rows as stage two reads them: LocalShuffle, 8 rows at a time, padded into tensors
    encode      CacheWriter over rows in memory: checks, look-up, zstd, shard, sidecar, manifest

The rows are a teacher's targets on prose and code. Every record batch holds the same 32 rows: compression works within
a record batch, so copies take the same time and space as other text. One thread; time is processor time
(`time.process_time`), so other work on a shared machine does not count.

Bounds: for reading, SHA-256 of the same bytes, decompressing the same buffers, and copying the decoded arrays once; for
encoding, compressing the same buffers.

    python -m benchmarks decode
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

import cache_format as cf
from benchmarks.measure import Result, Settings, Table
from benchmarks.teacher import TextTargets, text_targets
from pipeline.student.data.dataset import WINDOW, CacheDataset, LocalShuffle, collate

BATCH_ROWS, ROWS_PER_RECORD_BATCH = 8, 32
LEVELS = (3, 9, 19)
TARGET_TOKENS_PER_S = 300_000


def run(settings: Settings) -> Result:
    exact = text_targets(settings)
    rows = cache_rows(exact, copies=2 if settings.quick else 8)
    threads = torch.get_num_threads(), pa.cpu_count()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            return _measure(settings, exact, rows, Path(scratch))
    finally:
        torch.set_num_threads(threads[0])
        pa.set_cpu_count(threads[1])


def cache_rows(exact: TextTargets, copies: int, **changes: object) -> list[cf.CacheRow]:
    """The teacher's rows as stage one passes them to the writer, repeated `copies` times."""
    count, length = exact.input_ids.shape
    k = exact.ids.shape[1]
    mask = np.ones(length, np.bool_)
    mask[-1] = False
    rows = []
    for number in range(count * copies):
        here = number % count
        positions = slice(here * length, (here + 1) * length)
        counts = np.full(length, k)
        rows.append(
            cf.CacheRow(
                row=number,
                input_ids=exact.input_ids[here],
                loss_mask=mask,
                segment_lengths=np.array([length]),
                targets=cf.SparseTargets(
                    counts=counts,
                    ids=exact.ids[positions].ravel(),
                    logprobs=exact.logprobs[positions].ravel(),
                    exact_counts=counts,
                    residual_logprob=exact.residual_logprob[positions],
                    entropy=exact.entropy[positions],
                ),
            )
        )
    return rows


def write_cache(
    path: Path, rows: Sequence[cf.CacheRow], vocab_size: int, level: int, encoding: str = "columns", threads: int = 1
) -> None:
    metadata = cf.CacheMetadata(
        teacher={"name": "benchmark"},
        tokenizer={},
        vocab_size=vocab_size,
        alignment="next",
        targets={"kind": "top-k", "k": int(rows[0].targets.counts[0]), "temperature": 1.0},
        corpus={"rows": len(rows)},
        rows_per_record_batch=ROWS_PER_RECORD_BATCH,
        encoding=encoding,
        compression={"codec": "zstd", "level": level},
    )
    with cf.CacheWriter(path, metadata, encoding_threads=threads) as writer:
        writer.write(rows)


def _measure(settings: Settings, exact: TextTargets, rows: Sequence[cf.CacheRow], scratch: Path) -> Result:
    tokens = sum(len(row.input_ids) for row in rows)
    path, packed_path = scratch / "cache", scratch / "packed"
    write_cache(path, rows, exact.vocab_size, 9)
    write_cache(packed_path, rows, exact.vocab_size, 9, "packed")
    buffers = _buffers(cf.open_cache(path), rows)
    compressed = [pa.compress(buffer, codec="zstd") for buffer in buffers]

    def iterate() -> None:
        for _ in cf.open_cache(path).iter_rows():
            pass

    def packed() -> None:
        for _ in cf.open_cache(packed_path).iter_rows():
            pass

    def batches() -> None:
        cache = cf.open_cache(path, cached_record_batches=WINDOW)
        order = list(LocalShuffle(cache.record_batches(), seed=0))
        dataset = CacheDataset(cache)
        for start in range(0, len(order), BATCH_ROWS):
            collate(dataset.__getitems__(order[start : start + BATCH_ROWS]))

    def checksum() -> None:
        for file in (path / "shards").glob("*.arrow"):
            hashlib.sha256(file.read_bytes()).digest()

    def decompress() -> None:
        for data, buffer in zip(compressed, buffers, strict=True):
            pa.decompress(data, buffer.nbytes, codec="zstd")

    decoded = np.empty(sum(r.targets.ids.nbytes // 4 + r.targets.logprobs.nbytes for r in rows), np.uint8)
    copy = np.empty_like(decoded)
    readers = {
        "iterate": iterate,
        "packed": packed,
        "batches": batches,
        "SHA-256 alone": checksum,
        "zstd alone": decompress,
    }
    readers["copying the decoded entries alone"] = lambda: np.copyto(copy, decoded)
    seconds = {name: _seconds(work, settings.rounds) for name, work in readers.items()}
    bound = sum(s for name, s in seconds.items() if name.endswith("alone"))
    table = [[name, tokens / s, s / bound, f"{s / tokens * 1e6:.3f}"] for name, s in seconds.items()]

    sample = rows[: len(rows) // 2] if settings.quick else rows[: 4 * ROWS_PER_RECORD_BATCH]
    written = sum(len(row.input_ids) for row in sample)
    encoded = []
    for level in LEVELS:
        codec = pa.Codec("zstd", compression_level=level)
        paths = iter(range(1000))
        write = _seconds(
            lambda: write_cache(scratch / f"{level}-{next(paths)}", sample, exact.vocab_size, level),  # noqa: B023
            settings.rounds,
        )
        # All record batches are alike, so compression per token is the same for any number of them.
        per_token = _seconds(lambda: [codec.compress(b) for b in buffers], settings.rounds) / tokens  # noqa: B023
        size = sum(f.stat().st_size for f in (scratch / f"{level}-0" / "shards").glob("*.arrow")) / written
        encoded.append([f"zstd {level}", written / write, write / (per_token * written), size])
    return Result(
        name="decode",
        question="Tokens per second and core at top-64: reading rows and batches of a cache, and writing one.",
        bound=f"reading: SHA-256, zstd, one copy of the entries: {tokens / bound:,.0f} tokens/s; writing: zstd alone.",
        settings={
            "teacher": exact.teacher,
            "tokens": tokens,
            "entries": exact.ids.shape[1],
            "batch_rows": BATCH_ROWS,
            "rows_per_record_batch": ROWS_PER_RECORD_BATCH,
            "rounds": settings.rounds,
        },
        tables=[
            Table("Reading (zstd 9)", ["work", "tokens/s", "time/bound", "µs/token"], table),
            Table("Writing", ["compression", "tokens/s", "time/compression alone", "bytes/token"], encoded),
        ],
        summary={
            "iterate_tokens_per_s": round(tokens / seconds["iterate"]),
            "packed_tokens_per_s": round(tokens / seconds["packed"]),
            "batches_tokens_per_s": round(tokens / seconds["batches"]),
            "encode_tokens_per_s": round(encoded[LEVELS.index(9)][1]),
            "target_tokens_per_s": TARGET_TOKENS_PER_S,
        },
    )


def _seconds(work: Callable[[], object], rounds: int) -> float:
    """Median processor seconds, after one warm-up run."""
    seconds = []
    work()
    for _ in range(rounds):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def _buffers(cache: cf.Cache, rows: Sequence[cf.CacheRow]) -> list[np.ndarray]:
    """Uncompressed buffers of the large columns in the layout of the format, per record batch."""
    metadata = cache.metadata
    found = []
    for start, stop in cache.record_batches():
        targets = [row.targets for row in rows[start:stop]]
        tokens = np.concatenate([row.input_ids for row in rows[start:stop]])
        found.append(tokens.astype(metadata.id_type))
        found.append(np.concatenate([t.ids for t in targets]).astype(metadata.id_type))
        for column, part in (("target_logprobs", "logprobs"), ("residual_logprob",) * 2, ("entropy",) * 2):
            values = np.concatenate([getattr(t, part) for t in targets])
            found.append(metadata.codebooks[column].encode(values))
    return found
