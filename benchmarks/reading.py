"""Reading at scale: does a cache a thousand times as large take longer to open, more memory, or more time per token?

    size       caches of 10^5 to 10^8 tokens: time to open, tokens/s of shuffled batches, memory of the process
    shards     time to open a cache of 10 to 10,000 shards, and to list its record batches
    workers    tokens/s of shuffled batches by number of DataLoader workers

Targets are synthetic (about eight entries per position, ids by Zipf's law), since a teacher would need days for 10^8
tokens. Each size is read in a new process. Memory is anonymous memory (RssAnon), without the pages of mapped shards,
which the kernel may drop at any time.

    python -m benchmarks reading
"""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader

import cache_format as cf
from benchmarks.measure import Result, Settings, Table
from cache_format.manifest.manifest import ShardInfo, manifest_bytes
from pipeline.student.data.dataset import WINDOW, CacheDataset, LocalShuffle, collate

VOCAB, TOKENS, BATCH_ROWS = 32_768, 1024, 8
ROWS_PER_RECORD_BATCH, ROWS_PER_SHARD = 32, 256
SIZES = (10**5, 10**6, 10**7, 10**8)
SHARD_BYTES = 4_000_000
SHARDS = (10, 100, 1000, 10_000)
WORKERS = (0, 1, 2)
READ_TOKENS = 4_000_000  # maximum per cache

Found = TypeVar("Found")


def run(settings: Settings) -> Result:
    sizes = SIZES[:2] if settings.quick else SIZES
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        by_size, by_shards, by_workers = [], [], []
        for size in sizes:
            path = Path(scratch) / str(size)
            began = time.perf_counter()
            write_cache(path, size)
            written = time.perf_counter() - began
            found = [in_a_process(read_shuffled, path, 0) for _ in range(settings.rounds)]
            cache = cf.open_cache(path)
            by_size.append(
                [
                    f"{cache.num_tokens:,}",
                    len(cache.manifest.shards),
                    cache.manifest.stored_bytes / 1e6,
                    cache.num_tokens / written,
                    statistics.median(each["open_s"] for each in found) * 1e3,
                    statistics.median(each["tokens"] / each["seconds"] for each in found),
                    statistics.median(each["grown_mb"] for each in found),
                ]
            )
        for count in SHARDS[:2] if settings.quick else SHARDS:
            path = Path(scratch) / f"shards-{count}"
            forge_manifest(path, count)
            found = [in_a_process(open_only, path) for _ in range(settings.rounds)]
            by_shards.append(
                [count, *(statistics.median(e[name] for e in found) * 1e3 for name in ("open_s", "list_s"))]
            )
        path = Path(scratch) / str(sizes[-1])
        for workers in WORKERS:
            found = [in_a_process(read_shuffled, path, workers) for _ in range(settings.rounds)]
            speeds = [each["tokens"] / each["seconds"] for each in found]
            by_workers.append([workers, statistics.median(speeds), f"{min(speeds):,.0f} to {max(speeds):,.0f}"])
    return Result(
        name="reading",
        question="How opening, memory and reading speed depend on the size of a cache.",
        bound="opening and memory grow only with the list of shards, about 220 bytes per shard; tokens/s of one core "
        "are those of benchmarks/decode.py and grow with workers up to the number of cores.",
        settings={
            "vocab": VOCAB,
            "tokens_per_row": TOKENS,
            "rows_per_shard": ROWS_PER_SHARD,
            "rounds": settings.rounds,
        },
        tables=[
            Table(
                "Size",
                [
                    "tokens",
                    "shards",
                    "MB",
                    "writing, tokens/s",
                    "opening, ms",
                    "reading, tokens/s",
                    "memory growth, MB",
                ],
                by_size,
            ),
            Table("Shards", ["shards", "opening, ms", "listing record batches, ms"], by_shards),
            Table("Workers", ["DataLoader workers", "tokens/s", "range"], by_workers),
        ],
        summary={
            "largest_tokens": sizes[-1],
            "memory_mb": round(by_size[-1][-1], 1),
            "memory_mb_smallest": round(by_size[0][-1], 1),
            "open_ms_most_shards": round(by_shards[-1][1], 1),
        },
    )


def write_cache(path: Path, tokens: int) -> None:
    rows = -(-tokens // TOKENS)
    metadata = _metadata(rows)
    made = [_row(i, np.random.default_rng(i)) for i in range(ROWS_PER_RECORD_BATCH)]
    with cf.CacheWriter(path, metadata) as writer:
        for row in range(rows):
            # Record batches repeat: compression works within one, so copies are as large as other rows would be.
            like = made[row % len(made)]
            copy = cf.CacheRow(
                row=row,
                input_ids=like.input_ids,
                loss_mask=like.loss_mask,
                segment_lengths=like.segment_lengths,
                targets=like.targets,
            )
            writer.write([copy])


def _metadata(rows: int) -> cf.CacheMetadata:
    return cf.CacheMetadata(
        teacher={"name": "synthetic"},
        tokenizer={},
        vocab_size=VOCAB,
        alignment="next",
        targets={"kind": "top-k", "k": 16, "temperature": 1.0},
        corpus={"rows": rows},
        rows_per_shard=ROWS_PER_SHARD,
        rows_per_record_batch=ROWS_PER_RECORD_BATCH,
        compression={"codec": "zstd", "level": 1},
    )


def _row(index: int, rng: np.random.Generator) -> cf.CacheRow:
    counts = rng.integers(1, 16, TOKENS)
    of_zipf = np.minimum(rng.zipf(1.2, (TOKENS, 16)), VOCAB) - 1
    ids = np.concatenate([np.sort(_distinct(row)[:n]) for row, n in zip(of_zipf, counts, strict=True)])
    counts = np.array([len(_distinct(row)[:n]) for row, n in zip(of_zipf, counts, strict=True)])
    mask = np.ones(TOKENS, bool)
    mask[-1] = False
    return cf.CacheRow(
        row=index,
        input_ids=np.minimum(rng.zipf(1.2, TOKENS), VOCAB) - 1,
        loss_mask=mask,
        segment_lengths=np.array([TOKENS]),
        targets=cf.SparseTargets(
            counts=counts,
            ids=ids,
            logprobs=np.log(rng.uniform(0.001, 0.05, len(ids))).astype(np.float32),
            exact_counts=counts,
            residual_logprob=np.log(rng.uniform(0.05, 0.5, TOKENS)).astype(np.float32),
            entropy=rng.uniform(0, 6, TOKENS).astype(np.float32),
        ),
    )


def _distinct(ids: np.ndarray) -> np.ndarray:
    return ids[np.sort(np.unique(ids, return_index=True)[1])]


def forge_manifest(path: Path, shards: int) -> None:
    """Writes the manifest of a cache whose shards are sparse files: opening and listing only look at their sizes."""
    (path / "shards").mkdir(parents=True)
    infos = [
        ShardInfo(
            name=f"shards/shard-{i:05}.arrow",
            bytes=SHARD_BYTES,
            rows=ROWS_PER_SHARD,
            tokens=ROWS_PER_SHARD * TOKENS,
            counted_tokens=ROWS_PER_SHARD * TOKENS,
            entries=8 * ROWS_PER_SHARD * TOKENS,
            sidecar_sha256=f"{i:064x}",
        )
        for i in range(shards)
    ]
    for info in infos:
        with open(path / info.name, "wb") as file:
            file.truncate(info.bytes)
    (path / "manifest.json").write_bytes(manifest_bytes(_metadata(shards * ROWS_PER_SHARD), {}, infos))


def open_only(path: Path) -> dict[str, float]:
    began = time.perf_counter()
    cache = cf.open_cache(path)
    opened = time.perf_counter()
    cache.record_batches()
    return {"open_s": opened - began, "list_s": time.perf_counter() - opened}


def read_shuffled(path: Path, workers: int) -> dict[str, float]:
    """Reads shuffled batches as training does."""
    before, began = _anonymous_mb(), time.perf_counter()
    cache = cf.open_cache(path, cached_record_batches=WINDOW + 1)
    opened = time.perf_counter() - began
    sampler = LocalShuffle(cache.record_batches(), seed=0)
    loader = DataLoader(
        CacheDataset(cache), batch_size=BATCH_ROWS, sampler=sampler, collate_fn=collate, num_workers=workers
    )
    tokens, most, began = 0, 0.0, time.perf_counter()
    for i, batch in enumerate(_until(loader, READ_TOKENS)):
        if i == 0:
            began = time.perf_counter()  # all workers have started
        else:
            tokens += int(batch["num_tokens"])
        if i % 16 == 0:
            most = max(most, _anonymous_mb())
    return {
        "open_s": opened,
        "tokens": tokens,
        "seconds": time.perf_counter() - began,
        "grown_mb": max(most, _anonymous_mb()) - before,
    }


def _until(loader: DataLoader[Any], tokens: int) -> Iterator[dict[str, torch.Tensor]]:
    return itertools.islice(loader, max(1, tokens // (BATCH_ROWS * TOKENS)))


def _anonymous_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1e3


def in_a_process(work: Callable[..., Found], *arguments: Any) -> Found:
    """Runs `work` in a new interpreter, so that memory belongs to it alone."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.submit(work, *arguments).result()
