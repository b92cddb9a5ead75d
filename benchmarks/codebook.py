"""Bytes and error of encodings of top-K targets: codebook, order of entries, compression, size of record batches.

Real targets (a teacher on prose and code) are written column by column as the format does: ids, codes of the
log-probabilities, codes of tail mass and entropy, each zstd-compressed per record batch. `input_ids` are the same for
all and not included. The codebooks compared, all of at most 256 values (one byte):

    √p, n             n steps uniform in √p; the smallest probability is 1/n²
    √p, n + m below   the same down to 2/n, then m geometric steps of 2/3 in √p down to p = 1e-12
    log p, n          n values uniform in log p from 1 down to p = 1e-12
    float16           log-probabilities as half-precision floats, two bytes: what other tools store

Error: KL(exact ‖ decoded) over the K entries and the tail mass as one class, renormalised as the losses do; and the
largest changes of single values.

Rule for the default: the fewest bytes at top-64 among the codebooks with a mean KL below 0.001 nats that change no
probability above 1e-6 by more than 0.5 nats.

Bound: the order-zero entropy of the codes; for the ids, log2 C(V, K) / 8 bytes if all sets of ids are equally likely.

    python -m benchmarks codebook
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

import cache_format as cf
from benchmarks.measure import Result, Settings, Table
from benchmarks.teacher import TextTargets, text_targets
from cache_format.codecs.codebook import Codebook

SMALLEST = 1e-12
TOP_KS = (16, 50, 64)
LEVELS = (3, 9, 19)
BATCHES = (8, 32, 128)  # rows of a record batch
LEVEL, BATCH = 9, 32
MOST_KL, MOST_CHANGE = 0.001, 0.5  # nats
HALF = "float16"

Bytes = Mapping[str, float]  # column -> bytes per token


@dataclass(frozen=True)
class Targets:
    """Top-K targets of N positions."""

    ids: np.ndarray  # [N, K] ascending
    logprobs: np.ndarray  # [N, K]
    residual: np.ndarray  # [N]
    entropy: np.ndarray  # [N] nats


@dataclass(frozen=True)
class Books:
    """An encoding: codebooks for entries, tail mass and entropy, or half precision for all of them."""

    entries: Codebook | None
    residual: Codebook | None
    entropy: Codebook | None

    @property
    def values(self) -> int:
        return 2**16 if self.entries is None else len(self.entries.values)


@dataclass(frozen=True)
class Errors:
    kl: float  # mean over positions, nats
    root: float  # largest |Δ√p|
    above: Mapping[float, float]  # p -> largest |Δ log p| of entries above it


def run(settings: Settings) -> Result:
    exact = text_targets(settings)
    targets = {k: top(exact, k) for k in TOP_KS if k <= exact.ids.shape[1]}
    ks, most = list(targets), max(targets)
    written = functools.partial(bytes_per_token, vocab_size=exact.vocab_size, row_tokens=exact.input_ids.shape[1])

    books = candidates(exact.vocab_size)
    errors = {name: {k: quantisation_errors(targets[k], books[name]) for k in ks} for name in books}
    total = {name: {k: sum(written(targets[k], books[name]).values()) for k in ks} for name in books}
    fine = [n for n in books if errors[n][most].kl < MOST_KL and errors[n][most].above[1e-6] <= MOST_CHANGE]
    best = min(fine, key=lambda name: total[name][most], default="none")
    default = next(name for name in books if _is_default(books[name]))
    columns = written(targets[most], books[default])

    table = [
        [name, book.values]
        + [cell for k in ks for cell in (total[name][k], errors[name][k].kl)]
        + [written(targets[most], book)["logprobs"], code_entropy(targets[most], book)]
        + [errors[name][most].root, *errors[name][most].above.values()]
        for name, book in books.items()
    ]
    orders = [
        [f"top-{k}", *(sum(written(way, books[default]).values()) for way in (targets[k], by_probability(targets[k])))]
        for k in ks
    ]
    compression = [
        [f"zstd {level}", batch]
        + [sum(written(targets[k], books[default], level=level, batch_rows=batch).values()) for k in ks]
        for level, batch in itertools.product(LEVELS, BATCHES)
    ]
    entropy_error = np.abs(_decoded(exact.entropy, books[default].entropy) - exact.entropy)
    headings = ["codebook", "values", *(h for k in ks for h in (f"bytes/token, top-{k}", f"KL, top-{k}"))]
    headings += [f"codes, bytes/token, top-{most}", "order-zero entropy of the codes, bytes/token", "max |Δ√p|"]
    headings += ["max |Δlog p|, p > 1e-4", "max |Δlog p|, p > 1e-6"]
    return Result(
        name="codebook",
        question="Bytes per token and quantisation error (KL in nats) of encodings of top-K targets.",
        bound="order-zero entropy for the codes; for the ids, if all sets of ids were equally likely, "
        f"{_log2_choose(exact.vocab_size, most) / 8:.0f} bytes at top-{most}.",
        settings={
            "teacher": exact.teacher,
            "positions": exact.num_positions,
            "row_tokens": exact.input_ids.shape[1],
            "zstd level": LEVEL,
            "rows per record batch": BATCH,
        },
        tables=[
            Table("Codebooks", headings, table),
            Table(f"Order of entries, bytes/token ({default})", ["", "ascending id", "descending probability"], orders),
            Table(
                f"Compression, bytes/token ({default})",
                ["", "rows per record batch", *(f"top-{k}" for k in ks)],
                compression,
            ),
            Table(f"Bytes per column, top-{most} ({default})", ["column", "bytes/token"], list(columns.items())),
            Table(
                "Error of the stored entropy (64 values, uniform in its square root)",
                ["", "nats"],
                [["mean |Δ|", float(entropy_error.mean())], ["max |Δ|", float(entropy_error.max())]],
            ),
        ],
        summary={
            "default": default,
            "best_by_the_rule": best,
            **{f"bytes_per_token_top_{k}": round(total[default][k], 2) for k in ks},
            f"quantisation_kl_top_{most}_nats": float(f"{errors[default][most].kl:.3g}"),
        },
        conclusion=f"Fewest bytes with a KL below {MOST_KL} nats and no p > 1e-6 changed by more than {MOST_CHANGE} "
        f"nats: {best}. Default of the format: {default}.",
    )


def candidates(vocab_size: int) -> dict[str, Books]:
    def books(entries: Codebook) -> Books:
        # The tail mass uses the same table, with its smallest value replaced by exactly zero.
        residual = np.concatenate([[-np.inf], entries.values[-255:]]).astype(np.float32)
        entropy = cf.default_codebooks(vocab_size)["entropy"]
        return Books(entries, Codebook("residual", "sqrt_probability", residual), entropy)

    found = {f"√p, {n}": books(cf.sqrt_probability_codebook(n, smallest=None)) for n in (31, 63, 127, 255)}
    for steps in (31, 63, 72, 88, 104, 127, 160, 190, 234):
        # The last two levels of the uniform part start the geometric part, whose ratio is 2/3.
        below = math.ceil(math.log(2 / steps / math.sqrt(SMALLEST)) / math.log(3 / 2))
        book = cf.sqrt_probability_codebook(steps - 1 + below, smallest=SMALLEST)
        found[f"√p, {steps} + {below} below"] = books(book)
    for n in (64, 128, 256):
        levels = np.linspace(math.log(SMALLEST), 0, n).astype(np.float32)
        found[f"log p, {n}"] = books(Codebook("log", "sqrt_probability", levels))
    found[HALF] = Books(None, None, None)
    return found


def top(exact: TextTargets, k: int) -> Targets:
    """The K most likely entries, by ascending id; the mass of the others is added to the tail mass."""
    rank = np.argsort(-exact.logprobs, axis=1, kind="stable")
    kept = np.sort(rank[:, :k], axis=1)
    dropped = np.take_along_axis(exact.logprobs, rank[:, k:], axis=1)
    rest = np.concatenate([dropped, exact.residual_logprob[:, None]], axis=1).astype(np.float64)
    return Targets(
        ids=np.take_along_axis(exact.ids, kept, axis=1),
        logprobs=np.take_along_axis(exact.logprobs, kept, axis=1),
        residual=np.logaddexp.reduce(rest, axis=1).clip(max=0).astype(np.float32),
        entropy=exact.entropy,
    )


def by_probability(targets: Targets) -> Targets:
    order = np.argsort(-targets.logprobs, axis=1, kind="stable")
    ids, logprobs = (np.take_along_axis(values, order, axis=1) for values in (targets.ids, targets.logprobs))
    return replace(targets, ids=ids, logprobs=logprobs)


def bytes_per_token(
    targets: Targets, books: Books, *, vocab_size: int, row_tokens: int, level: int = LEVEL, batch_rows: int = BATCH
) -> Bytes:
    """Compressed bytes per token of each column, one zstd buffer per record batch."""
    codec = pa.Codec("zstd", compression_level=level)
    id_type = np.uint16 if vocab_size <= 2**16 else np.uint32
    columns = {
        "ids": targets.ids.astype(id_type),
        "logprobs": _coded(targets.logprobs, books.entries),
        "residual": _coded(targets.residual, books.residual),
        "entropy": _coded(targets.entropy, books.entropy),
    }
    positions = batch_rows * row_tokens
    total = dict.fromkeys(columns, 0)
    for name, values in columns.items():
        for start in range(0, len(values), positions):
            total[name] += codec.compress(np.ascontiguousarray(values[start : start + positions])).size
    return {name: size / len(targets.ids) for name, size in total.items()}


def quantisation_errors(targets: Targets, books: Books) -> Errors:
    exact = np.concatenate([targets.logprobs, targets.residual[:, None]], axis=1).astype(np.float64)
    coded = [_decoded(targets.logprobs, books.entries), _decoded(targets.residual, books.residual)[:, None]]
    decoded = np.concatenate(coded, axis=1).astype(np.float64)
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (exact, decoded))
    present = log_p > -np.inf
    # A tail mass that decodes to zero would make the KL infinite; losses skip it, so it counts as e-60 here.
    terms = np.exp(log_p) * (np.where(present, log_p, 0) - np.maximum(log_q, -60.0))
    before, after = exact[:, :-1], decoded[:, :-1]
    change = np.abs(after - before)
    return Errors(
        kl=float(np.where(present, terms, 0).sum(axis=1).mean()),
        root=float(np.abs(np.exp(after / 2) - np.exp(before / 2)).max()),
        above={p: float(change[before > math.log(p)].max()) for p in (1e-4, 1e-6)},
    )


def code_entropy(targets: Targets, books: Books) -> float:
    """Order-zero entropy of the entries' codes, in bytes per token."""
    _, counts = np.unique(_coded(targets.logprobs, books.entries), return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum() / 8 * targets.ids.shape[1])


def _coded(values: np.ndarray, book: Codebook | None) -> np.ndarray:
    return values.astype(np.float16) if book is None else book.encode(values)


def _decoded(values: np.ndarray, book: Codebook | None) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32) if book is None else book.decode(book.encode(values))


def _is_default(books: Books) -> bool:
    default = cf.sqrt_probability_codebook(cf.EXACT_LEVELS).values
    return books.entries is not None and np.array_equal(books.entries.values, default)


def _log2_choose(n: int, k: int) -> float:
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
