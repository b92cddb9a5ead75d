"""Caches of made-up numbers, written in milliseconds, for tests that need no real teacher.

cache = made_up(tmp / "a", rows=40)                       # record batches of 4, rows of 3 to 12 tokens
made_up(tmp / "b", rows=9, vocab_size=500, targets={...})  # fields of the metadata
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import cache_format as cf

TOP_K: dict[str, Any] = {"kind": "top-k", "k": 2, "temperature": 1.0}
THRESHOLD: dict[str, Any] = {
    "kind": "threshold",
    "k": 1,
    "temperature": 1.0,
    "tail_threshold": 0.4,
    "seed": 0,
    "samples": 1,
    "max_entries": 4,
}


def made_up(
    path: Path,
    rows: int = 40,
    *,
    lengths: tuple[int, int] = (3, 12),
    seed: int = 0,
    share: float = 1.0,
    tokenizer_files: Mapping[str, bytes] | None = None,
    **changes: Any,
) -> cf.Cache:
    """Writes a cache and opens it. The first token of a row is its row number modulo 1000.

    Args:
        lengths: number of tokens in the shortest and in the longest row.
        share: fraction of positions that are loss tokens.
        changes: fields of the metadata.
    """
    metadata = cf.CacheMetadata(
        **{
            "teacher": {"name": "made up", "weights_fingerprint": "0"},
            "tokenizer": {"vocabulary": "a" * 64, "segmentation": "b" * 64},
            "vocab_size": 1000,
            "alignment": "next",
            "targets": TOP_K,
            "corpus": {"rows": rows},
            "rows_per_shard": 16,
            "rows_per_record_batch": 4,
            **changes,
        }
    )
    with cf.CacheWriter(path, metadata, tokenizer_files=tokenizer_files) as writer:
        writer.write([_row(row, metadata, lengths, seed, share) for row in range(rows)])
    return cf.open_cache(path)


def _row(row: int, metadata: cf.CacheMetadata, lengths: tuple[int, int], seed: int, share: float) -> cf.CacheRow:
    rng = np.random.default_rng((seed, row))
    tokens = int(rng.integers(lengths[0], lengths[1] + 1))
    mask = rng.random(tokens) < share
    mask[-1] &= metadata.alignment == "same"
    samples = metadata.num_samples
    counts = np.full(tokens, 1 + samples)  # one exact entry, and one in each sample
    ids = np.concatenate([[i, *range(500, 500 + samples)] for i in rng.integers(0, 400, tokens)])
    input_ids = rng.integers(0, 400, tokens)
    input_ids[0] = row % 1000
    return cf.CacheRow(
        row=row,
        input_ids=input_ids,
        loss_mask=mask,
        segment_lengths=np.array([tokens]),
        targets=cf.SparseTargets(
            counts=counts,
            ids=ids,
            logprobs=np.tile(np.log([0.5, *[0.4] * samples]), tokens).astype(np.float32),
            exact_counts=np.full(tokens, 1 if metadata.sampled else 2),
            residual_logprob=np.full(tokens, np.log(0.5 if metadata.sampled else 0.1), np.float32),
            entropy=np.full(tokens, 1.0, np.float32),
            sample_counts=np.ones((tokens, samples), np.int64) if samples > 1 else None,
        ),
        labels=rng.integers(0, 400, tokens) if metadata.alignment == "same" else None,
    )
