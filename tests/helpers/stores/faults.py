"""Caches on an S3 server that breaks requests: written, interrupted, resumed, verified, read; thousands of requests.

    PYTHONPATH=.:tests/cache_format python tests/helpers/stores/faults.py                   `make faults`: 10,000
    PYTHONPATH=.:tests/cache_format python tests/helpers/stores/faults.py --requests 300    a short run

Half of the rounds break 5 % of the requests, half 15 %: connections dropped before or after the request is carried out,
500, 503 SlowDown, truncated bodies, slow answers. Each round writes one cache in three runs that are interrupted at
random rows, verifies it, and reads all of its rows in random order, every second time through a local copy. The rows
must equal those written, and at the end the files on the server must equal those of a cache on a disk, byte for byte.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

import cache_format as cf
from cache_format.storage import remote
from cache_format.storage.directory import open_directory
from cache_format.storage.read_cache import ReadCache
from cache_samples import contents, sample_metadata, sample_row, several_samples
from s3 import FAULTS, Server, s3_server

TOKENIZER = {"tokenizer.json": b"{}"}
SHARES = (0.05, 0.15)  # of broken requests
SLOWEST = 0.05  # of these: each takes .3 seconds


@dataclass
class Outcome:
    """Outcome of the rounds with one share of broken requests."""

    share: float
    rounds: int = 0
    rows_read: int = 0
    seconds: float = 0.0
    requests: Counter[str] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)


def faults_of(share: float) -> dict[str, float]:
    """Probability of each fault: `share` in total, in equal parts except for slow answers."""
    others = [fault for fault in FAULTS if fault != "slow"]
    return {**dict.fromkeys(others, share * (1 - SLOWEST) / len(others)), "slow": share * SLOWEST}


def one_round(server: Server, scratch: Path, seed: int, rows: int, outcome: Outcome) -> None:
    """Writes, reads and compares one cache; records what was lost."""
    rng = np.random.default_rng(seed)
    name, encoding = f"round-{seed}", ("columns", "packed")[seed // 2 % 2]
    url, local = server.url(name), scratch / name
    metadata = sample_metadata(rows, encoding=encoding, **several_samples(1))
    expected = [sample_row(row) for row in range(rows)]
    with cf.CacheWriter(local, metadata, tokenizer_files=TOKENIZER) as writer:
        writer.write(expected)

    server.spoil(faults_of(outcome.share))
    began = time.monotonic()
    stops = [*sorted(rng.choice(np.arange(1, rows), 2, replace=False)), rows]
    for run, stop in enumerate(stops):
        try:
            with cf.CacheWriter(url, metadata, tokenizer_files=TOKENIZER, resume=run > 0) as writer:
                writer.write(expected[writer.next_row : stop])
                if stop < rows:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
    cf.verify_cache(url)
    copies = ReadCache(scratch / "copies", 1 << 30) if seed % 2 else None
    cache = cf.open_cache(url, cached_record_batches=1, read_cache=copies)
    for row in rng.permutation(rows):
        found, wanted = cache[int(row)], expected[row]
        same = all(
            np.array_equal(a, b)
            for a, b in (
                (found.input_ids, wanted.input_ids),
                (found.targets.counts, wanted.targets.counts),
                (found.targets.ids, wanted.targets.ids),
            )
        )
        if not same:
            outcome.lost.append(f"{name}: row {row} differs from the written one")
        outcome.rows_read += 1
    counts = server.counts()
    outcome.seconds += time.monotonic() - began
    outcome.requests.update(counts["requests"])
    outcome.injected.update(counts["injected"])
    outcome.rounds += 1

    server.spoil({})
    kept = contents(local)
    for file, data in downloaded(url).items():
        if kept.pop(file, None) != data:
            outcome.lost.append(f"{url}/{file}: not the bytes that a disk has")
    outcome.lost += [f"{url}/{file}: missing" for file in kept]


def downloaded(url: str) -> dict[str, bytes]:
    directory = open_directory(url)
    names = [
        *directory.names(),
        *(f"{folder}/{n}" for folder in ("shards", "tokenizer") for n in directory.names(folder)),
    ]
    return {name: directory.read_bytes(name) for name in names if name not in ("shards", "tokenizer")}


def record(outcomes: list[Outcome], results: Path | None, command: str) -> None:
    from benchmarks.measure import Result, Table, show, write

    methods = sorted({method for outcome in outcomes for method in outcome.requests})
    rows: list[list[Any]] = [
        [f"{o.share:.0%}", o.rounds, sum(o.requests.values()), *(o.requests[method] for method in methods)]
        + [*(o.injected[fault] for fault in FAULTS), o.rows_read, "; ".join(o.lost) or "nothing"]
        for o in outcomes
    ]
    result = Result(
        name="faults",
        question="Is a cache on an S3 server that breaks requests read correctly, and complete at the end?",
        bound="nothing lost.",
        settings={"runs_of_each_cache": 3, "rows_per_shard": 4},
        tables=[
            Table("Requests", ["broken requests", "caches", "requests", *methods, *FAULTS, "rows read", "lost"], rows)
        ],
        summary={
            "requests": sum(sum(o.requests.values()) for o in outcomes),
            "injected": sum(sum(o.injected.values()) for o in outcomes),
            "lost": sum(len(o.lost) for o in outcomes),
        },
    )
    show(result)
    if results is not None:
        write(result, results, command)


@click.command()
@click.option("--requests", default=10_000, show_default=True, help="Minimum number of requests over all rounds.")
@click.option("--rows", default=48, show_default=True, type=click.IntRange(8), help="Rows per cache; four per shard.")
@click.option("--seed", default=0, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), help="Directory for the results [default: only print them]")
def main(requests: int, rows: int, seed: int, results: Path | None) -> None:
    """Break requests until there are enough; exit status 1 if anything is lost."""
    logging.getLogger("s3fs").setLevel(logging.CRITICAL)
    remote.FIRST_WAIT_S, remote.LONGEST_WAIT_S = 0.001, 0.01
    outcomes = [Outcome(share) for share in SHARES]
    with tempfile.TemporaryDirectory() as scratch, s3_server() as server:
        while sum(sum(o.requests.values()) for o in outcomes) < requests:
            one_round(server, Path(scratch), seed, rows, outcome := outcomes[seed % len(outcomes)])
            click.echo(
                f"round {seed}: {outcome.share:.0%} broken, {sum(outcome.requests.values()):,} requests so far, "
                f"{len(outcome.lost)} lost",
                err=True,
            )
            seed += 1
    record(
        outcomes,
        results,
        f"PYTHONPATH=.:tests/cache_format python tests/helpers/stores/faults.py --requests {requests} --rows {rows}",
    )
    lost = [text for outcome in outcomes for text in outcome.lost]
    if lost:
        raise click.ClickException(f"{len(lost)} losses: {lost[0]}")


if __name__ == "__main__":
    main()
