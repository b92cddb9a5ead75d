"""Rows of every kind of targets, and comparisons of what two encodings make of them.

`cache_samples.sample_row` has exact and sampled entries at once, which is what `threshold` targets are. The other kinds
are made from it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cache_format as cf
from cache_format.codecs.encodings import codec_for
from cache_format.codecs.packed import block, rans
from cache_format.codecs.packed import lexicon as lexicon_module
from cache_format.codecs.packed.lexicon import Lexicon
from cache_format.codecs.packed.loops import TOTAL, Loops
from cache_format.codecs.packed.packed_codec import PackedCodec
from cache_format.codecs.packed.rans import Model
from cache_format.rows.row_batch import concatenate
from cache_samples import VOCAB, sample_metadata, sample_row

TOP_K = {"kind": "top-k", "k": 9, "temperature": 1.0}
THRESHOLD = {"kind": "threshold", "k": 1, "temperature": 1.0, "tail_threshold": 0.4, "seed": 0, "max_entries": 9}
RANDOM = {"kind": "random", "draws": 9, "temperature": 1.0, "seed": 0, "max_entries": 9}

KINDS = {
    "top-k": TOP_K,
    "threshold, one sample": {**THRESHOLD, "samples": 1},
    "threshold, three samples": {**THRESHOLD, "samples": 3},
    "random, one sample": {**RANDOM, "samples": 1},
    "random, three samples": {**RANDOM, "samples": 3},
}


def exact_row(row: int, **options: Any) -> cf.CacheRow:
    """All entries exact, as in top-k and top-p targets."""
    made = sample_row(row, **options)
    targets = made.targets
    position = np.repeat(np.arange(len(targets.counts)), targets.counts)
    order = np.lexsort((targets.ids, position))
    kept = np.bincount(position, np.exp(targets.logprobs.astype(np.float64)), len(targets.counts))
    with np.errstate(divide="ignore"):
        residual = np.log(np.maximum(1 - kept, 0)).astype(np.float32)
    return replace(
        made,
        targets=replace(
            targets,
            ids=targets.ids[order],
            logprobs=targets.logprobs[order],
            exact_counts=targets.counts,
            residual_logprob=residual,
        ),
    )


def drawn_row(row: int, *, samples: int = 1, draws: int = 9, **options: Any) -> cf.CacheRow:
    """No entry exact, as in random targets; weights are multiples of 1 / (draws · samples)."""
    made = sample_row(row, samples=samples, **options)
    targets, rng = made.targets, np.random.default_rng(row)
    position = np.repeat(np.arange(len(targets.counts)), targets.counts)
    rank = np.arange(len(position)) - targets.offsets[position]
    kept = rank >= np.asarray(targets.exact_counts)[position]
    weights = rng.integers(1, draws + 1, int(kept.sum())) / (draws * samples)
    counts = np.asarray(targets.counts) - targets.exact_counts
    return replace(
        made,
        loss_mask=made.loss_mask & ((counts > 0) if samples == 1 else (targets.sample_counts > 0).all(axis=1)),
        targets=replace(
            targets,
            counts=counts,
            ids=targets.ids[kept],
            logprobs=np.log(weights).astype(np.float32),
            exact_counts=np.zeros_like(counts),
            residual_logprob=np.zeros(len(counts), np.float32),
        ),
    )


def draws_codebook(draws: int, samples: int) -> cf.Codebook:
    weights = np.append(np.arange(1, draws + 1) / (draws * samples), 1.0)
    return cf.Codebook("draws", "sqrt_probability", np.unique(np.log(weights).astype(np.float32)))


def metadata_of(targets: dict[str, Any], rows: int = 10, **changes: Any) -> cf.CacheMetadata:
    if targets["kind"] == "random":
        books = cf.default_codebooks(changes.get("vocab_size", VOCAB))
        books["target_logprobs"] = draws_codebook(targets["draws"], targets["samples"])
        changes["codebooks"] = books
    return sample_metadata(rows, targets=targets, **changes)


def row_of(metadata: cf.CacheMetadata, row: int, **options: Any) -> cf.CacheRow:
    """A row as the kind of targets has them."""
    options = {"vocab": metadata.vocab_size, "alignment": metadata.alignment, **options}
    if not metadata.sampled:
        return exact_row(row, **options)
    if metadata.targets["kind"] == "random":
        return drawn_row(row, samples=metadata.num_samples, draws=metadata.targets["draws"], **options)
    return sample_row(row, samples=metadata.num_samples, **options)


def write_cache(path: Path, metadata: cf.CacheMetadata, **options: Any) -> cf.CacheMetadata:
    with cf.CacheWriter(path, metadata, tokenizer_files={"tokenizer.json": b"{}"}) as writer:
        writer.write([row_of(metadata, row, **options) for row in range(metadata.num_rows)])
    return metadata


def lexicon_of(rows: Sequence[cf.CacheRow], vocab_size: int, weight: float = 1.0) -> Lexicon:
    batch = concatenate(rows)
    contexts = np.repeat(batch.input_ids.astype(np.int64), batch.counts)
    return Lexicon.learn(contexts, batch.ids.astype(np.int64), vocab_size, weight)


def empty_lexicon(vocab_size: int) -> Lexicon:
    nothing = np.zeros(0, np.int64)
    return Lexicon.learn(nothing, nothing, vocab_size, 1.0)


def through(batch: cf.RowBatch, metadata: cf.CacheMetadata, lexicon: Lexicon | None = None) -> cf.RowBatch:
    """Encoded and decoded: as columns, or packed if there is a lexicon."""
    metadata = replace(metadata, encoding="columns" if lexicon is None else "packed")
    codec = codec_for(metadata) if lexicon is None else PackedCodec(metadata, lexicon)
    return codec.decode(codec.encode(batch), batch.num_entries)


def assert_same_batch(found: cf.RowBatch, expected: cf.RowBatch) -> None:
    """Every array, to the bit, with its type; none can be written to."""
    for field in fields(cf.RowBatch):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert (a is None) == (b is None), field.name
        if b is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape), field.name
            np.testing.assert_array_equal(a, b, field.name)
            assert field.name.endswith("offsets") or not a.flags.writeable, field.name


def model_sizes(metadata: cf.CacheMetadata, longest: int) -> dict[str, tuple[int, int]]:
    """Contexts and symbols of each model, in their order: the table of SPEC.md §4.

    Args:
        longest: list of candidates.
    """
    books = {name: len(book["values"]) for name, book in metadata.to_json()["codebooks"].items()}
    most, residuals = metadata.max_entries + 1, books["residual_logprob"]
    ranks, codes = (68, 4 * ((metadata.vocab_size + longest).bit_length() + 1)), (64, books["target_logprobs"])
    return {
        "entropy": (2, books["entropy"]),
        "exact counts": (32, most),
        "exact ranks": ranks,
        "exact codes": codes,
        "residual": (16, 2 * residuals - 1),
        "sample counts": (residuals, most),
        "sample ranks": ranks,
        "sample codes": codes,
    }


def some_model(rng: np.random.Generator, contexts: int, symbols: int, skew: float) -> Model:
    """Any frequencies that add up; the greater the skew, the fewer symbols have nearly all places."""
    shares = rng.dirichlet(np.full(symbols, 1 / (1 + skew)), contexts)
    frequencies = np.floor(shares * (TOTAL - symbols)).astype(np.int64) + 1
    frequencies[np.arange(contexts), shares.argmax(axis=1)] += TOTAL - frequencies.sum(axis=1)
    return Model(frequencies)


def use_loops(patch: pytest.MonkeyPatch, implementation: Loops) -> None:
    """Decode with this implementation, whatever is installed."""
    for module in (block, lexicon_module, rans):
        patch.setattr(module, "loops", lambda: implementation)
