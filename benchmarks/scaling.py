"""Stage one with one process and with two: the speed-up from a second worker on a machine.

    1 × 1    one process, one thread
    1 × 2    one process, two threads: the default on a CPU
    2 × 1    two processes of one thread each, which share the shards through claims

Every process is new, reads the same tokenised text and loads the same teacher. Time runs from the moment when all are
ready to the finished manifest. On a CPU the processes compete for cores and memory bandwidth; with a GPU each, they
share nothing but the directory.

Bound: twice the tokens per second of 1 × 1; on a CPU, the tokens per second of 1 × 2.

    python -m benchmarks scaling
"""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.files import write_json_lines
from benchmarks.measure import Result, Settings, Table, ratio, spread
from benchmarks.text import prose

WAYS = {"1 × 1": (1, 1), "1 × 2": (1, 2), "2 × 1": (2, 1)}  # processes, threads of each
BATCH_ROWS, ROWS_PER_SHARD = 4, 4
READY_S = 300.0


def run(settings: Settings) -> Result:
    documents, row_tokens = (16, 64) if settings.quick else (64, 512)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    tokens = shards = 0
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.jsonl"
        write_json_lines(text, ({"text": each} for each in itertools.islice(prose(4 * row_tokens), documents)))
        for i in range(settings.rounds):
            for name in list(WAYS)[:: -1 if i % 2 else 1]:
                output = Path(scratch) / f"cache-{i}-{name}"
                seconds, tokens, shards = _seconds(settings.teacher, text, output, row_tokens, *WAYS[name])
                times[name].append(seconds)
    rows = [
        [name, *WAYS[name], tokens / statistics.median(times[name]), ratio(times, "1 × 1", name)]
        + [spread(times, "1 × 1", name)]
        for name in WAYS
    ]
    return Result(
        name="scaling",
        question="cache-teacher with one and with two processes on a machine, from the loaded teacher to the manifest.",
        bound="2, twice one process of one thread; on a CPU, the speed of one process of two threads.",
        settings={"tokens": tokens, "shards": shards, "row_tokens": row_tokens, "batch_rows": BATCH_ROWS}
        | {"rounds": settings.rounds},
        tables=[
            Table(
                "Tokens per second",
                ["processes × threads", "processes", "threads", "tokens/s", "speed-up", "range"],
                rows,
            )
        ],
        summary={f"speedup {name}": round(ratio(times, "1 × 1", name), 2) for name in WAYS},
    )


def _seconds(
    teacher: Path, text: Path, output: Path, row_tokens: int, processes: int, threads: int
) -> tuple[float, int, int]:
    """Seconds from when all processes are ready to the end of the last one; tokens; shards."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with running threads may hang
    ready, ends = context.Barrier(processes), context.Queue()
    given = {"teacher": str(teacher), "text": str(text), "output": str(output), "row_tokens": row_tokens}
    workers = [
        context.Process(target=_work, args=(given, index, processes, threads, ready, ends))
        for index in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise RuntimeError(f"a process ended with {worker.exitcode}")
    found = [ends.get() for _ in workers]
    begin, end = max(begin for begin, *_ in found), max(end for _, end, *_ in found)
    return end - begin, found[0][2], found[0][3]


def _work(given: dict[str, Any], index: int, processes: int, threads: int, ready: Any, ends: Any) -> None:
    import torch

    import cache_format as cf
    from pipeline.teacher.cache_config import CacheTeacherConfig
    from pipeline.teacher.capture import cache_teacher
    from pipeline.teacher.targets.rules import TargetRule
    from pipeline.teacher.text.data_config import DataConfig
    from pipeline.teacher.writing.worker_config import WorkerConfig

    torch.set_num_threads(threads)
    began = 0.0

    def on_stage(text: str) -> None:
        nonlocal began
        if text.startswith("caching"):
            ready.wait(READY_S)
            began = time.time()

    share = WorkerConfig(num_workers=processes, worker_index=index) if processes > 1 else WorkerConfig()
    cache_teacher(
        CacheTeacherConfig(
            teacher=given["teacher"],
            data=DataConfig(data=given["text"], seq_len=given["row_tokens"]),
            output=given["output"],
            targets=TargetRule(kind="threshold", top_k=1, tail_threshold=0.05, samples=1, seed=0),
            batch_size=BATCH_ROWS,
            device="cpu",
            rows_per_shard=ROWS_PER_SHARD,
            workers=share,
        ),
        on_stage=on_stage,
    )
    cache = cf.open_cache(given["output"])
    ends.put((began, time.time(), cache.num_tokens, len(cache.manifest.shards)))
