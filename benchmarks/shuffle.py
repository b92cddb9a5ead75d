"""How well are rows mixed by a shuffle within windows of record batches?

Training reads record batches in random order and shuffles the rows of `WINDOW` consecutive ones, see
pipeline.student.data.dataset. Compared with a full permutation, on an ordered corpus:

    correlation      of a row's position in the epoch with its position in the corpus
    record batches   number of distinct record batches that the rows of a training batch come from
    unevenness       variance of a domain's share of a training batch ÷ that of as many rows sampled without
                     replacement; V means that a batch of n rows has its domains only as even as n/V random rows
    rows decoded     by all processes that share the rows of each step ÷ rows of the cache: round robin, and sorted by
                     place as pipeline.student.data.rank_sampler does; the same with several loader workers per process

Two rows of a window of M = 32·W rows are from the same record batch with probability 31/(M−1). On a corpus whose
domains are longer than a record batch, V is therefore 1 + (n−1)·31/(M−1) for n ≤ M, and 32 beyond. The tables show this
formula next to the measured value.

Needs no model and no cache, only indices.

    python -m benchmarks shuffle
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from benchmarks.measure import Result, Settings, Table
from pipeline.student.data.dataset import WINDOW, LocalShuffle
from pipeline.student.data.mixed_dataset import MixedShuffle
from pipeline.student.data.rank_sampler import DividedByPlace

RECORD_BATCH = 32
WINDOWS = (1, 4, 16, 64, 256, 1024)
BATCHES = (8, 64, 512)
DOMAINS = 10
BOOK_ROWS = 8
PROCESSES = (2, 4, 8, 16, 24, 64)
BATCH_SIZES = (8, 32)
WORKERS = ((1, 1), (1, 4), (8, 1), (8, 4))  # (processes, micro-batches per step), each combined with
LOADER_WORKERS = (1, 2, 4)


def run(settings: Settings) -> Result:
    rows = 2**14 if settings.quick else 2**20
    rng = np.random.default_rng(0)
    place = np.arange(rows)
    full = "full permutation"
    windows = [window for window in WINDOWS if window * RECORD_BATCH < rows // 8]  # a larger one is almost all rows
    orders = {str(window): [order(rows, window, epoch) for epoch in range(settings.rounds)] for window in windows}
    orders[full] = [rng.permutation(rows) for _ in range(settings.rounds)]

    corpora = {
        "one domain after the other": place * DOMAINS // rows,
        f"books of {BOOK_ROWS} rows in random order": rng.integers(0, DOMAINS, rows // BOOK_ROWS).repeat(BOOK_ROWS),
        "rows in random order": rng.integers(0, DOMAINS, rows),
    }
    ordered, *_ = corpora.values()

    quality = []
    for name, found in orders.items():
        correlation = np.mean([abs(np.corrcoef(place, each)[0, 1]) for each in found])
        quality.append(
            [name, float(correlation)]
            + [float(np.mean([distinct_places(each, n) for each in found])) for n in BATCHES]
            + [cell(found, ordered, n, None if name == full else int(name)) for n in BATCHES]
        )
    shipped, kinds = orders[str(WINDOW)], []
    for name, domain in corpora.items():
        kinds.append([name, *(float(np.mean([unevenness(domain[each], n) for each in shipped])) for n in BATCHES)])
    mixed = [domain_of_mixed(rows, epoch) for epoch in range(settings.rounds)]
    kinds.append(
        ["a cache for each domain, mixed", *(float(np.mean([unevenness(m, n) for m in mixed])) for n in BATCHES)]
    )

    few = min(rows, 2**17)
    sharing = [
        [processes, *(value for size in BATCH_SIZES for value in decoded_both_ways(few, processes, size))]
        for processes in PROCESSES
    ]
    of_workers = [
        [
            processes,
            accumulation,
            *(
                decoded_both_ways(few, processes, BATCH_SIZES[0], accumulation, workers)[1]
                for workers in LOADER_WORKERS
            ),
        ]
        for processes, accumulation in WORKERS
    ]
    by_name = {row[0]: row for row in quality}
    return Result(
        name="shuffle",
        question="How well are rows mixed by a shuffle within windows of record batches?",
        bound="correlation: 1/√(record batches) by chance, for any window; record batches: as many as rows; "
        "unevenness: 1, rows sampled without replacement (in brackets: by the formula of benchmarks/shuffle.py).",
        settings={
            "rows": rows,
            "rows_per_record_batch": RECORD_BATCH,
            "domains": DOMAINS,
            "epochs": settings.rounds,
            "default_window": WINDOW,
        },
        tables=[
            Table(
                "Size of the window, on a corpus with one domain after the other",
                [
                    "record batches per window",
                    "correlation with the position in the corpus",
                    *(f"record batches in a batch of {n}" for n in BATCHES),
                    *(f"unevenness, batch of {n}" for n in BATCHES),
                ],
                quality,
            ),
            Table(
                f"Order of the corpus, window of {WINDOW}",
                ["corpus", *(f"unevenness, batch of {n}" for n in BATCHES)],
                kinds,
            ),
            Table(
                f"Rows decoded ÷ rows of the cache, all processes together, window of {WINDOW}",
                [
                    "processes",
                    *(f"batches of {n}, {how}" for n in BATCH_SIZES for how in ("round robin", "sorted by place")),
                ],
                sharing,
            ),
            Table(
                f"The same with several loader workers per process, batches of {BATCH_SIZES[0]}, sorted by place",
                ["processes", "gradient accumulation", *(f"loader workers: {n}" for n in LOADER_WORKERS)],
                of_workers,
            ),
        ],
        summary={
            f"record_batches_in_{BATCHES[0]}": round(by_name[str(WINDOW)][2], 2),
            **{f"unevenness_{n}": round(kinds[0][1 + i], 2) for i, n in enumerate(BATCHES)},
            **{f"decoded_by_{row[0]}_processes": round(row[2], 2) for row in sharing},
        },
        conclusion="Any row can come at any place in the epoch. But rows that are adjacent in the corpus stay "
        f"together, in runs of {RECORD_BATCH}: large batches have their domains as unevenly as "
        f"{RECORD_BATCH} times fewer random rows. Shuffle such text before it is cached, or make one cache "
        "per domain and mix them. Processes share the decoding, and share it better if each takes more rows "
        "of a step; nothing is decoded twice if a step is whole windows and each process takes whole record "
        "batches. The loader workers of a process share its decoding only across micro-batches.",
    )


def order(rows: int, window: int, epoch: int) -> np.ndarray:
    """[rows] the rows in the order of an epoch."""
    record_batches = [(start, start + RECORD_BATCH) for start in range(0, rows, RECORD_BATCH)]
    sampler = LocalShuffle(record_batches, seed=0, window=window)
    sampler.set_epoch(epoch)
    return np.fromiter(sampler, np.int64, rows)


def domain_of_mixed(rows: int, epoch: int) -> np.ndarray:
    """[rows] the domain of each row of an epoch, with one cache per domain."""
    each = rows // DOMAINS // RECORD_BATCH * RECORD_BATCH
    record_batches = [(start, start + RECORD_BATCH) for start in range(0, each, RECORD_BATCH)]
    few = 2**16 // DOMAINS  # the order of caches is periodic
    sampler = MixedShuffle([record_batches] * DOMAINS, [few] * DOMAINS, seed=0, samples=[1] * DOMAINS)
    sampler.set_epoch(epoch)
    return np.fromiter(sampler, np.int64, few * DOMAINS) // each


def batches_of(values: np.ndarray, n: int) -> np.ndarray:
    """[batches, n], the last incomplete one left out."""
    return values[: len(values) // n * n].reshape(-1, n)


def distinct_places(rows: np.ndarray, n: int) -> float:
    """Mean number of distinct record batches in batches of n rows."""
    places = np.sort(batches_of(rows // RECORD_BATCH, n), axis=1)
    return float(1 + (np.diff(places, axis=1) != 0).sum(axis=1).mean())


def unevenness(domain: np.ndarray, n: int) -> float:
    """Variance of the number of rows of a domain in batches of n ÷ that of n rows sampled without replacement."""
    shares = np.bincount(domain, minlength=DOMAINS) / len(domain)
    expected = n * shares * (1 - shares) * (len(domain) - n) / (len(domain) - 1)
    found = [((batches_of(domain == d, n).sum(axis=1) - n * share) ** 2).mean() for d, share in enumerate(shares)]
    return float(np.sum(found) / np.sum(expected))


def cell(orders: Sequence[np.ndarray], domain: np.ndarray, n: int, window: int | None) -> str:
    measured = float(np.mean([unevenness(domain[each], n) for each in orders]))
    if window is None:
        return f"{measured:.2f} (1)"
    rows = window * RECORD_BATCH
    return f"{measured:.2f} ({1 + (min(n, rows) - 1) * (RECORD_BATCH - 1) / (rows - 1):.2f})"


def decoded_both_ways(
    rows: int, processes: int, batch_size: int, accumulation: int = 1, workers: int = 1
) -> tuple[float, float]:
    """Rows decoded by all processes ÷ rows: assigned round robin, and sorted by place as in training."""
    record_batches = [(start, start + RECORD_BATCH) for start in range(0, rows, RECORD_BATCH)]
    plain = LocalShuffle(record_batches, seed=0, multiple_of=processes * batch_size)
    division = {"processes": processes, "accumulation": accumulation, "batch_size": batch_size}
    divided = plain if processes == 1 else DividedByPlace(plain, rows=rows, **division)
    found = [np.fromiter(each, np.int64, len(plain)) % rows for each in (plain, divided)]
    round_robin, by_place = (decoded_per_row(each, processes, batch_size, workers) for each in found)
    return round_robin, by_place


def decoded_per_row(rows: np.ndarray, processes: int, batch_size: int, workers: int) -> float:
    """Batches go to the processes round robin, and within a process to its workers. Each worker decodes for itself and
    caches the record batches of a window."""
    decoded = 0
    cached: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(processes * workers)]
    for i, batch in enumerate(batches_of(rows // RECORD_BATCH, batch_size).tolist()):
        mine = cached[i % (processes * workers)]
        for place in batch:
            decoded += place not in mine
            mine[place] = None
            mine.move_to_end(place)
            if len(mine) > WINDOW + 1:
                mine.popitem(last=False)
    return decoded * RECORD_BATCH / len(rows)
