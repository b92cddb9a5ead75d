"""How good is a shuffle that only mixes what lies in a window of record batches?

Training reads record batches in random order and shuffles the rows of `WINDOW` consecutive ones, see
pipeline.student.data. Against a full permutation, on a corpus whose rows stand in an order of their own:

    position     correlation of a row's place in the epoch with its place in the corpus
    places       distinct record batches that the rows of a training batch come from
    domains      variance of a domain's share of a training batch ÷ that of as many rows drawn without replacement:
                 V means that a batch of n rows holds the domains no more evenly than n/V rows would
    readers      record batches decoded when processes or workers share the rows, ÷ when one reads alone

Two rows of a window of M = 32·W rows are from the same record batch with probability 31/(M−1), so on a corpus whose
domains are longer than a record batch V = 1 + (n−1)·31/(M−1) for n ≤ M, and 32 beyond. Printed beside what was counted.

Needs no model and no cache: indices are all there is to an order.

    python -m benchmarks shuffle
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from benchmarks.measure import Result, Settings, Table
from pipeline.student.data import WINDOW, LocalShuffle
from pipeline.student.mixing import MixedShuffle

RECORD_BATCH = 32
WINDOWS = (1, 4, 16, 64, 256, 1024)
BATCHES = (8, 64, 512)
DOMAINS = 10
BOOK_ROWS = 8
READERS = (1, 2, 8, 64)
READ_ROWS = 8  # that a reader takes at a time


def run(settings: Settings) -> Result:
    rows = 2**14 if settings.quick else 2**20
    rng = np.random.default_rng(0)
    place = np.arange(rows)
    full = "all rows"
    windows = [window for window in WINDOWS if window * RECORD_BATCH < rows // 8]  # more is nearly all
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
    sharing = [[readers, decoded_per_row(order(few, WINDOW, 0), readers)] for readers in READERS]
    by_name = {row[0]: row for row in quality}
    return Result(
        name="shuffle",
        question="How well are rows mixed by a shuffle that is local to a window of record batches?",
        bound="correlation: 1/√(record batches) by chance, whatever the window; distinct places: as many as rows; "
        "unevenness: 1, rows drawn without replacement (in brackets: by the formula of benchmarks/shuffle.py).",
        settings={
            "rows": rows,
            "rows_per_record_batch": RECORD_BATCH,
            "domains": DOMAINS,
            "epochs": settings.rounds,
            "shipped_window": WINDOW,
        },
        tables=[
            Table(
                "Window, on a corpus with one domain after the other",
                [
                    "record batches in a window",
                    "correlation with the place in the corpus, ±",
                    *(f"places in a batch of {n}" for n in BATCHES),
                    *(f"unevenness, batch of {n}" for n in BATCHES),
                ],
                quality,
            ),
            Table(
                f"Corpus, with the window of {WINDOW}",
                ["corpus", *(f"unevenness, batch of {n}" for n in BATCHES)],
                kinds,
            ),
            Table(
                f"Readers that take {READ_ROWS} rows in turn, window of {WINDOW}",
                ["processes or workers", "rows decoded ÷ rows of the cache, all readers together"],
                sharing,
            ),
        ],
        summary={
            f"places_in_{BATCHES[0]}": round(by_name[str(WINDOW)][2], 2),
            **{f"unevenness_{n}": round(kinds[0][1 + i], 2) for i, n in enumerate(BATCHES)},
            "decoded_by_8_readers": round(sharing[2][1], 2),
        },
        conclusion="A row is anywhere in the epoch, whatever its place in the corpus; but what stands together in the "
        f"corpus for {RECORD_BATCH} rows and more stays together: large batches hold domains as unevenly as "
        f"{RECORD_BATCH} times fewer rows would. Shuffle such text before it is cached, or cache its domains apart and "
        "mix them. Readers that share the rows decode each what lies in the window, whole.",
    )


def order(rows: int, window: int, epoch: int) -> np.ndarray:
    """[rows] which row comes when."""
    record_batches = [(start, start + RECORD_BATCH) for start in range(0, rows, RECORD_BATCH)]
    sampler = LocalShuffle(record_batches, seed=0, window=window)
    sampler.set_epoch(epoch)
    return np.fromiter(sampler, np.int64, rows)


def domain_of_mixed(rows: int, epoch: int) -> np.ndarray:
    """[rows] of which domain the row is that comes then, where each has a cache of its own."""
    each = rows // DOMAINS // RECORD_BATCH * RECORD_BATCH
    record_batches = [(start, start + RECORD_BATCH) for start in range(0, each, RECORD_BATCH)]
    few = 2**16 // DOMAINS  # the order of caches repeats itself
    sampler = MixedShuffle([record_batches] * DOMAINS, [few] * DOMAINS, seed=0, samples=[1] * DOMAINS)
    sampler.set_epoch(epoch)
    return np.fromiter(sampler, np.int64, few * DOMAINS) // each


def batches_of(values: np.ndarray, n: int) -> np.ndarray:
    """[batches, n], the last incomplete one left out."""
    return values[: len(values) // n * n].reshape(-1, n)


def distinct_places(rows: np.ndarray, n: int) -> float:
    """Mean over batches of n rows of the number of their record batches."""
    places = np.sort(batches_of(rows // RECORD_BATCH, n), axis=1)
    return float(1 + (np.diff(places, axis=1) != 0).sum(axis=1).mean())


def unevenness(domain: np.ndarray, n: int) -> float:
    """Variance of the number of rows of a domain in batches of n ÷ that of n rows drawn without replacement."""
    shares = np.bincount(domain, minlength=DOMAINS) / len(domain)
    drawn = n * shares * (1 - shares) * (len(domain) - n) / (len(domain) - 1)
    found = [((batches_of(domain == d, n).sum(axis=1) - n * share) ** 2).mean() for d, share in enumerate(shares)]
    return float(np.sum(found) / np.sum(drawn))


def cell(orders: Sequence[np.ndarray], domain: np.ndarray, n: int, window: int | None) -> str:
    counted = float(np.mean([unevenness(domain[each], n) for each in orders]))
    if window is None:
        return f"{counted:.2f} (1)"
    rows = window * RECORD_BATCH
    return f"{counted:.2f} ({1 + (min(n, rows) - 1) * (RECORD_BATCH - 1) / (rows - 1):.2f})"


def decoded_per_row(rows: np.ndarray, readers: int) -> float:
    """Rows of all record batches that `readers` decode, each with the window's record batches in memory, per row."""
    decoded = 0
    kept: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(readers)]
    for i, batch in enumerate(batches_of(rows // RECORD_BATCH, READ_ROWS).tolist()):
        mine = kept[i % readers]
        for place in batch:
            decoded += place not in mine
            mine[place] = None
            mine.move_to_end(place)
            if len(mine) > WINDOW + 1:
                mine.popitem(last=False)
    return decoded * RECORD_BATCH / len(rows)
