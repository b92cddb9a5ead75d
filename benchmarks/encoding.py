"""Writing a cache at top-64 with several threads that encode: tokens per second by the clock.

Checks and the order of record batches stay in the thread that writes, so threads help up to the time that these take;
pyarrow compresses the columns of a record batch in threads of its own in any case. Packed targets are entropy-coded,
and compressed no further.

Bound: the cores of the machine.

    python -m benchmarks encoding
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.decode import ROWS_PER_RECORD_BATCH, cache_rows, write_cache
from benchmarks.measure import Result, Settings, Table, Value, interleave, ratio, spread
from benchmarks.teacher import text_targets
from cache_format.cores import available_cores, encoding_threads

LEVEL = 9
RECORD_BATCHES = 12


def run(settings: Settings) -> Result:
    exact = text_targets(settings)
    rows = cache_rows(exact, copies=2 if settings.quick else 8)
    rows = rows[: ROWS_PER_RECORD_BATCH * RECORD_BATCHES]
    tokens = sum(len(row.input_ids) for row in rows)
    several = encoding_threads()
    table: list[list[Value]] = []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        paths = map(str, itertools.count())

        def write(encoding: str, threads: int) -> None:
            write_cache(Path(scratch, next(paths)), rows, exact.vocab_size, LEVEL, encoding, threads)

        for encoding in ("columns", "packed"):
            ways: dict[str, Callable[[], None]] = {
                "one": partial(write, encoding, 1),
                "several": partial(write, encoding, several),
            }
            times = interleave(ways, settings.rounds)
            faster = 1 / ratio(times, "several", "one")
            speeds = [tokens / min(times[way]) for way in ways]
            table.append([encoding, *speeds, faster, spread(times, "one", "several")])
    return Result(
        name="encoding",
        question="Tokens per second of writing a cache at top-64, with one thread that encodes and with several.",
        bound=f"{available_cores()}, the cores; less what the writing thread alone does.",
        settings={"teacher": exact.teacher, "tokens": tokens, "threads": several, "rounds": settings.rounds},
        tables=[
            Table(
                "Writing with several threads",
                ["encoding", "tokens/s, one thread", "tokens/s, several", "times as fast", "range"],
                table,
            )
        ],
        summary={f"{row[0]}_times_as_fast": round(float(row[3]), 2) for row in table},
    )
