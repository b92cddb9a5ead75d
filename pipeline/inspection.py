"""A cache in numbers: one row token by token (`distill inspect`), and sizes and distributions (`distill stats`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import cache_format as cf
from cache_format.codecs.packed.streams import PackedStreams


def describe_targets(targets: Mapping[str, Any]) -> str:
    """One-line description of a manifest's `targets`, e.g. threshold, τ = 0.05, K = 1, seed 0."""
    names = {"tail_threshold": "τ", "k": "K", "top_p": "P", "draws": "N", "samples": "M", "temperature": "T"}
    usual = {"samples": 1, "temperature": 1.0, "k": 0}
    parts = [
        f"{symbol} = {targets[name]:g}"
        for name, symbol in names.items()
        if targets.get(name) is not None and targets[name] != usual.get(name)
    ]
    if "head" in targets and "hidden" in targets:
        parts.insert(0, f"D = {targets['hidden']['width']}, {targets['hidden']['dtype']}")
    if targets.get("renormalised"):
        parts.append("renormalised: tail mass unknown")
    return ", ".join([targets["kind"], *parts])


def inspect_row(
    cache: cf.Cache, row_index: int, text: Callable[[int], str], *, candidates: int, start: int, positions: int
) -> dict[str, Any]:
    """One row, token by token: the teacher's prediction after each, and the token that followed (`next`, `next_id`, …).

    For a masked model: its prediction for each token, and the original token (`label`, `label_id`, …).

    Args:
        text: token id -> its text.
        candidates: number of the teacher's most likely entries to show per position.
        start, positions: first position, and number of positions.
    """
    row = cache[row_index]
    end = min(start + positions, len(row.input_ids))
    targets = row.targets
    if (head := cache.head()) is not None:
        targets = cf.rebuilt_targets(row, head, min(candidates, cache.metadata.vocab_size), slice(start, end))
    by_probability = targets.merged().sorted_by_probability()
    labels, shown = row.label_ids, []
    about = "next" if cache.metadata.alignment == "next" else "label"
    for t in range(start, end):
        ids, logprobs = by_probability.at(t)
        probs = np.exp(logprobs.astype(np.float64))
        label = int(labels[t])
        among = np.flatnonzero(ids == label)
        shown.append(
            {
                "position": t,
                "segment": int(np.searchsorted(np.cumsum(row.segment_lengths), t, side="right")),
                "token_id": int(row.input_ids[t]),
                "token": text(int(row.input_ids[t])),
                "counted": bool(row.loss_mask[t]),
                f"{about}_id": label if label >= 0 else None,
                about: text(label) if label >= 0 else None,
                f"{about}_rank": int(among[0]) + 1 if len(among) else None,
                f"{about}_prob": float(probs[among[0]]) if len(among) else None,
                "entropy_nats": float(row.targets.entropy[t]),
                "exact_mass": float(-np.expm1(float(targets.residual_logprob[t]))),
                "candidates": [
                    {
                        "id": int(i),
                        "token": text(int(i)),
                        "prob": float(p),
                        "sampled": bool(k >= by_probability.exact_counts[t]),
                    }
                    for k, (i, p) in enumerate(zip(ids[:candidates], probs[:candidates], strict=True))
                ],
            }
        )
    return {
        "row": row_index,
        "alignment": cache.metadata.alignment,
        "tokens": len(row.input_ids),
        "loss_tokens": int(row.loss_mask.sum()),
        "segment_lengths": [int(n) for n in row.segment_lengths],
        "positions": shown,
    }


def cache_statistics(
    cache: cf.Cache, *, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Sizes and distributions of a whole cache; reads every record batch once.

    Sizes: the columns and, next to them (`beside_…`), framing (the rest of the shards: schemas, dictionaries, Arrow
    messages) and other files; together they add up to `bytes`. The column `packed` is the sum of its streams
    (`cache_format.codecs.packed.streams`) plus the coder's states, which make up the difference. Manifest, sidecars,
    tokenizer and card are not included.

    Column entropy: order-zero entropy over the whole cache, i.e. the size under an ideal coder that knows how often
    each value occurs but not what precedes it; for a packed cache, that of the columns it would have. Stream entropy:
    within each record batch, in the contexts that the stream is coded in. Exact mass: Σp of the exact entries; entropy:
    of the teacher's full distribution, in nats; weight sum: with sampled targets, Σw over all entries of a position,
    whose expectation is 1 up to the rounding of exact entries. These three are over loss tokens.
    """
    kept, entropies, weights = [], [], []
    occurring: dict[str, np.ndarray] = {}  # column -> how often each value occurs
    packed = PackedStreams()
    rows = 0
    for batch in cache.iter_record_batches(packed):
        for name, values in _symbols(batch, cache.metadata).items():
            occurring[name] = _add(occurring.get(name, np.zeros(0, np.int64)), np.bincount(values))
        kept.append(-np.expm1(batch.residual_logprob[batch.loss_mask].astype(np.float64)))
        entropies.append(batch.entropy[batch.loss_mask])
        if cache.metadata.sampled:
            weights.append(_sums(batch)[batch.loss_mask])
        rows += len(batch)
        on_progress(rows, cache.num_rows)
    mass, entropy = np.concatenate(kept), np.concatenate(entropies)
    columns = cache.column_bytes()
    tokens, total = cache.num_tokens, cache.manifest.stored_bytes
    beside = {"framing": cache.manifest.shard_bytes - sum(columns.values()), **cache.manifest.bytes_beside}
    edges = np.arange(0.0, np.ceil(max(entropy.max(initial=0.0), 1.0)) + 0.5, 0.5)
    counts, _ = np.histogram(entropy, edges)
    full = cache.metadata.head is not None  # no tail
    return {
        "path": cache.path,
        "teacher": cache.metadata.teacher["name"],
        "targets": dict(cache.metadata.targets),
        "rows": cache.num_rows,
        "tokens": tokens,
        "loss_tokens": cache.num_loss_tokens,
        "entries": cache.manifest.num_entries,
        "shards": len(cache.manifest.shards),
        "bytes": total,
        "bytes_per_token": total / tokens,
        "head_bytes": cache.manifest.head_bytes,
        "column_bytes_per_token": {name: value / tokens for name, value in columns.items()},
        "column_entropy_bytes_per_token": {name: _bits(counts) / 8 / tokens for name, counts in occurring.items()},
        "beside_bytes_per_token": {name: value / tokens for name, value in beside.items()},
        "stream_bytes_per_token": {name: bits / 8 / tokens for name, bits in packed.bits.items()},
        "stream_entropy_bytes_per_token": {name: bits / 8 / tokens for name, bits in packed.entropy_bits.items()},
        "exact_mass_mean": float(mass.mean()) if len(mass) and not full else None,
        "exact_mass_p5": float(np.quantile(mass, 0.05)) if len(mass) and not full else None,
        **_of_weights(weights),
        "entropy_mean_nats": float(entropy.mean()) if len(entropy) else None,
        "entropy_histogram": {"edges_nats": edges.tolist(), "counts": counts.tolist()},
    }


def _symbols(batch: cf.RowBatch, metadata: cf.CacheMetadata) -> dict[str, np.ndarray]:
    """The symbols of each column, as non-negative integers."""
    symbols: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "loss_mask": batch.loss_mask.view(np.uint8),
        "segment_lengths": batch.segment_lengths,
        "target_counts": batch.counts,
        "exact_counts": batch.exact_counts,
        "target_ids": batch.ids,
    }
    for name in cf.CODEBOOK_COLUMNS:
        values = batch.logprobs if name == "target_logprobs" else getattr(batch, name)
        symbols[name] = np.searchsorted(metadata.codebooks[name].values, values)
    if batch.labels is not None:
        symbols["labels"] = np.where(batch.loss_mask, batch.labels.astype(np.int64) + 1, 0)
    if batch.sample_counts is not None:
        symbols["sample_counts"] = batch.sample_counts.ravel()
    return symbols


def _sums(batch: cf.RowBatch) -> np.ndarray:
    """[N] Σw over the entries of each position, all samples together."""
    position = np.repeat(np.arange(batch.num_tokens), batch.counts)
    return np.bincount(position, np.exp(batch.logprobs.astype(np.float64)), batch.num_tokens)


def _of_weights(sums: list[np.ndarray]) -> dict[str, float | None]:
    """Mean of Σw and its standard error; None if nothing is sampled."""
    values = np.concatenate(sums) if sums else np.zeros(0)
    some = len(values) > 1
    return {
        "weight_sum_mean": float(values.mean()) if some else None,
        "weight_sum_standard_error": float(values.std(ddof=1) / np.sqrt(len(values))) if some else None,
    }


def _add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    total = longer.copy()
    total[: len(shorter)] += shorter
    return total


def _bits(counts: np.ndarray) -> float:
    """Order-zero empirical entropy in bits, summed over all symbols."""
    counts = counts[counts > 0]
    return abs(float((counts * np.log2(counts / counts.sum())).sum()))
