"""How long training waits for its batches: steps that only sleep, fed by the data loader of stage two.

    nothing        torch's loader alone, over a dataset of nothing: the least that any dataset takes
    when asked     the training process decodes and pads when it needs a batch
    threads        its threads do, before it needs the batch: `BatchesAhead`, as in training
    worker         the same in a worker, whose batches then go through shared memory

All are compared with steps that only sleep, which also take longer than 14 ms, more so on a machine with other work.

A step of 14 ms is what a student of 0.1 B parameters would take on an H100 for 8 rows of 1,024 tokens. The targets are
synthetic, and every record batch holds the same rows. Record batches have the rows of one batch, a quarter of the
default, so that a window lasts 16 steps; the steps of two windows are measured, after those of a first one, in which
the loader finds out whether one thread decodes fast enough. On a machine with other work on it, or with fewer cores
than decoding needs, ratios are larger.

    python -m benchmarks loader
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import BatchSampler, DataLoader

import cache_format as cf
from benchmarks.measure import Result, Settings, Table
from benchmarks.reading import in_a_process
from pipeline.losses import RaggedTargets, SparseTargetBatch
from pipeline.student.data.batches_ahead import BatchesAhead
from pipeline.student.data.dataset import WINDOW, CacheDataset

VOCAB, TOKENS, BATCH_ROWS = 49_152, 1024, 8
WARM_UP = WINDOW + 2  # batches
WINDOWS = 2  # measured; the cache has two more
SLEEP_S, TARGET = 0.014, 1.02
LOADERS = {"when asked": (0, False), "threads": (0, True), "worker": (1, True)}
NONE, NOTHING = "none", "nothing"
CACHES = {
    "columns, 64 entries": ("columns", 64),
    "packed, 8 entries": ("packed", 8),
    "packed, 64 entries": ("packed", 64),
}


def run(settings: Settings) -> Result:
    steps = 10 if settings.quick else WINDOWS * WINDOW
    rows, sizes, summary = [], [], {}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        for name, (encoding, entries) in CACHES.items():
            path = Path(scratch) / f"{encoding}-{entries}"
            write_cache(path, encoding, entries, record_batches=steps + 2 * WINDOW)
            read = cf.open_cache(path)[:BATCH_ROWS]
            ragged, padded = (_bytes(kind.from_rows(read)) for kind in (RaggedTargets, SparseTargetBatch))
            decoding = _decoding_seconds(path)
            sizes.append([name, ragged / 1e6, padded / 1e6, decoding * 1e3, BATCH_ROWS * TOKENS / decoding])
            found = in_a_process(step_seconds, path, steps, settings.rounds)
            sleeps = found.pop(NONE)
            for loader, seconds in found.items():
                ratios = [each / sleep for each, sleep in zip(seconds, sleeps, strict=True)]
                middle = statistics.median(ratios)
                rows.append([name, loader, middle, f"{min(ratios):.2f} to {max(ratios):.2f}"])
                summary[f"{encoding}_{entries}_{loader.replace(' ', '_')}"] = round(middle, 3)
    return Result(
        name="loader",
        question=f"Time of a step that sleeps {SLEEP_S * 1e3:g} ms, with its batch from the loader ÷ without a batch.",
        bound=f"that of nothing; the target is {TARGET}. A batch cannot come faster than it is decoded (second table).",
        settings={"rows": BATCH_ROWS, "tokens_per_row": TOKENS, "steps": steps, "rounds": settings.rounds},
        tables=[
            Table("Steps", ["targets", "loader", "step/sleep", "range"], rows),
            Table(
                "A batch",
                ["targets", "ragged, MB", "padded, MB", "decoding, processor ms", "tokens/s per core"],
                sizes,
            ),
        ],
        summary=summary,
    )


def write_cache(path: Path, encoding: str, entries: int, record_batches: int) -> None:
    """Record batches of the same rows."""
    metadata = cf.CacheMetadata(
        teacher={"name": "synthetic"},
        tokenizer={},
        vocab_size=VOCAB,
        alignment="next",
        targets={"kind": "top-k", "k": entries, "temperature": 1.0},
        corpus={"rows": record_batches * BATCH_ROWS},
        rows_per_record_batch=BATCH_ROWS,
        encoding=encoding,
    )
    rows = [_row(entries, np.random.default_rng(i)) for i in range(BATCH_ROWS)]
    with cf.CacheWriter(path, metadata) as writer:
        for number in range(record_batches * BATCH_ROWS):
            writer.write([replace(rows[number % len(rows)], row=number)])


def step_seconds(path: Path, steps: int, rounds: int) -> dict[str, list[float]]:
    """Mean seconds of a step in each round, by loader and without one; they take turns."""
    found: dict[str, list[float]] = {loader: [] for loader in (NONE, NOTHING, *LOADERS)}
    for _ in range(rounds):
        found[NONE].append(sleep_seconds(itertools.repeat(None), steps))
        nothing = DataLoader(range(steps * BATCH_ROWS), BATCH_ROWS, collate_fn=lambda _: None)  # type: ignore[arg-type]
        found[NOTHING].append(sleep_seconds(iter(nothing), steps))
        for loader, options in LOADERS.items():
            found[loader].append(wait(path, *options, steps))
    return found


def wait(path: Path, workers: int, ahead: bool, steps: int) -> float:
    """Mean seconds of a step."""
    rows = CacheDataset(cf.open_cache(path, cached_record_batches=WINDOW + 1))
    batches = BatchSampler(rows.sampler(seed=0), BATCH_ROWS, drop_last=False)
    dataset = BatchesAhead(rows, batches) if ahead else rows
    context = "fork" if workers else None  # as in training on Linux
    options = {"num_workers": workers, "multiprocessing_context": context}
    loader = iter(DataLoader(dataset, batch_sampler=batches, collate_fn=dataset.collate, **options))
    for _ in range(WARM_UP):
        next(loader)
    return sleep_seconds(loader, steps)


def sleep_seconds(batches: Iterator[Any], steps: int) -> float:
    """Mean seconds of a step that takes a batch and sleeps."""
    start = time.perf_counter()
    for _ in range(steps):
        time.sleep(SLEEP_S)
        next(batches)
    return (time.perf_counter() - start) / steps


def _row(entries: int, rng: np.random.Generator) -> cf.CacheRow:
    """Entries at random places: harder to decode in packed form than a teacher's."""
    block = VOCAB // entries
    ids = rng.integers(0, block, (TOKENS, entries)) + block * np.arange(entries)
    probs = rng.dirichlet(np.full(entries, 0.3), TOKENS) * 0.9 + 1e-6
    counts = np.full(TOKENS, entries)
    return cf.CacheRow(
        row=0,
        input_ids=rng.integers(0, VOCAB, TOKENS),
        loss_mask=np.arange(TOKENS) < TOKENS - 1,
        segment_lengths=np.array([TOKENS]),
        targets=cf.SparseTargets(
            counts=counts,
            ids=ids.ravel(),
            logprobs=np.log(probs).ravel().astype(np.float32),
            exact_counts=counts,
            residual_logprob=np.full(TOKENS, np.log(0.1), np.float32),
            entropy=np.full(TOKENS, 2.0, np.float32),
        ),
    )


def _decoding_seconds(path: Path) -> float:
    """Processor time of a record batch, which is a batch; the median of seven."""
    cache = cf.open_cache(path, cached_record_batches=1)
    seconds = []
    for record_batch in range(8):
        start = time.process_time()
        _ = cache[record_batch * BATCH_ROWS]
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:])


def _bytes(targets: RaggedTargets | SparseTargetBatch) -> int:
    tensors = [x for x in vars(targets).values() if hasattr(x, "element_size")]
    return sum(x.numel() * x.element_size() for x in tensors)
