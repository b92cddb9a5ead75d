"""What is in a cache, and where its bytes are: `distill stats`, as numbers and as a page for a terminal."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import cache_format as cf
from cache_format.codecs.packed.streams import FREQUENCIES, PackedStreams
from pipeline.terminal.views import bar, describe_targets, pairs, size


def cache_stats(cache: cf.Cache) -> dict[str, Any]:
    """Sizes and distributions of a whole cache; reads every record batch once.

    Sizes: of the columns, and beside them (`beside_…`) framing (what else is in the shards: schemas, dictionaries,
    Arrow's messages) and files; together they are `bytes`. The column `packed` is the sum of its streams
    (`cache_format.codecs.packed.streams`) and of the coder's states, which is what is left. Manifest, sidecars,
    tokenizer and card are not in it.

    Column entropy: of order zero over the whole cache, what an ideal coder takes that knows how often each value occurs
    but not what comes before it; of a packed cache too, of the columns that it would have. Stream entropy: within each
    record batch, in the contexts that the stream is coded in. Exact mass: Σp of the exact entries; entropy: of the
    teacher's full distribution, nats; weight sum: of sampled targets Σw, whose expectation is 1 but for the rounding of
    exact entries. All over counted positions.
    """
    kept, entropies, weights = [], [], []
    occurring: dict[str, np.ndarray] = {}  # column -> how often each value occurs
    packed = PackedStreams()
    for batch in cache.iter_record_batches(packed):
        for name, values in _symbols(batch, cache.metadata).items():
            occurring[name] = _add(occurring.get(name, np.zeros(0, np.int64)), np.bincount(values))
        kept.append(-np.expm1(batch.residual_logprob[batch.loss_mask].astype(np.float64)))
        entropies.append(batch.entropy[batch.loss_mask])
        if cache.metadata.sampled:
            weights.append(_sums(batch)[batch.loss_mask])
    mass, entropy = np.concatenate(kept), np.concatenate(entropies)
    columns = cache.column_bytes()
    tokens, total = cache.num_tokens, cache.manifest.stored_bytes
    beside = {"framing": cache.manifest.shard_bytes - sum(columns.values()), **cache.manifest.bytes_beside}
    edges = np.arange(0.0, np.ceil(max(entropy.max(initial=0.0), 1.0)) + 0.5, 0.5)
    counts, _ = np.histogram(entropy, edges)
    full = cache.metadata.head is not None  # nothing is left out
    return {
        "path": cache.path,
        "teacher": cache.metadata.teacher["name"],
        "targets": dict(cache.metadata.targets),
        "rows": cache.num_rows,
        "tokens": tokens,
        "counted_tokens": cache.num_counted_tokens,
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
    """Those of each column, as non-negative integers."""
    symbols = {
        "input_ids": batch.input_ids,
        "loss_mask": batch.loss_mask.view(np.uint8),
        "segment_lengths": batch.segment_lengths,
        "target_counts": batch.counts,
        "exact_counts": batch.exact_counts,
        "target_ids": batch.ids,
    }
    for name in cf.CODEBOOK_COLUMNS:
        values = {"target_logprobs": batch.logprobs}.get(name, getattr(batch, name, None))
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
    """Mean of Σw, and the standard error of it; none where nothing is sampled."""
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
    """Empirical entropy of order zero, of all symbols together."""
    counts = counts[counts > 0]
    return abs(float((counts * np.log2(counts / counts.sum())).sum()))


def stats_view(stats: dict[str, Any]) -> RenderableType:
    """`cache_stats` for people."""
    targets = stats["targets"]
    entries = f"{stats['entries']:,}, {stats['entries'] / stats['tokens']:.1f} per token"
    kept = f"mean {_number(stats['exact_mass_mean'])}, 5th percentile {_number(stats['exact_mass_p5'])}"
    weights, error = stats["weight_sum_mean"], stats["weight_sum_standard_error"]
    once = ""
    if targets["kind"] == "hidden":
        entries, kept = "none: states, of which the head makes whole distributions", "all"
        once = f", of it the head {size(stats['head_bytes'])}, once"
    summary = pairs(
        stats["path"],
        [
            ("teacher", stats["teacher"]),
            ("targets", describe_targets(targets)),
            ("rows", f"{stats['rows']:,} in {stats['shards']:,} shards"),
            ("tokens", f"{stats['tokens']:,}, of which {stats['counted_tokens']:,} count"),
            ("entries", entries),
            ("size", f"{size(stats['bytes'])}, {stats['bytes_per_token']:.1f} bytes per token{once}"),
            ("exact mass", kept),
            *([] if weights is None else [("sum of weights", f"mean {weights:.5f} ± {error:.5f} (standard error)")]),
            ("entropy", f"mean {_number(stats['entropy_mean_nats'], 2)} nats"),
        ],
    )
    histogram = Table(title="teacher entropy, nats", title_justify="left", box=None, show_header=False)
    edges, counts = stats["entropy_histogram"]["edges_nats"], stats["entropy_histogram"]["counts"]
    total = max(1, sum(counts))
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        histogram.add_row(f"{low:4.1f} – {high:4.1f}", f"{count / total:6.1%}", bar(count / max(max(counts), 1), 24))
    return Group(summary, Text(), _sizes_view(stats), Text(), histogram)


def _sizes_view(stats: dict[str, Any]) -> RenderableType:
    """Columns and what is beside them, largest first, adding up to the last line; under `packed` its streams."""
    table = Table(box=None, header_style="dim")
    for name in ("bytes per token", "on disk", "entropy", ""):
        table.add_column(name, justify="right" if name in ("on disk", "entropy") else "left", no_wrap=True)
    columns, entropy = stats["column_bytes_per_token"], dict(stats["column_entropy_bytes_per_token"])
    streams, floors = stats["stream_bytes_per_token"], stats["stream_entropy_bytes_per_token"]
    lines = {**columns, **stats["beside_bytes_per_token"]}
    largest = max(lines.values(), default=1.0) or 1.0

    def line(name: str, value: float, floor: float | None) -> None:
        table.add_row(name, f"{value:.2f}", "" if floor is None else f"{floor:.2f}", bar(value / largest, 24))

    as_columns = sum(value for name, value in entropy.items() if name not in columns)
    entropy["packed"] = sum(floors.get(name, value) for name, value in streams.items() if name != FREQUENCIES)
    for name, value in sorted(lines.items(), key=lambda item: -item[1]):
        line(name, value, entropy.get(name))
        if name == "packed":
            for stream, of_stream in sorted(streams.items(), key=lambda item: -item[1]):
                line(f"  {stream}", of_stream, floors.get(stream))
            line("  coder's states", value - sum(streams.values()), None)
    table.add_row("together", f"{sum(lines.values()):.2f}", "", "")
    if not streams:
        return table
    note = f"packed: entropy in the contexts of each stream; as columns, order zero, its targets have {as_columns:.2f}"
    return Group(table, Text(note, style="dim"))


def _number(value: float | None, digits: int = 4) -> str:
    return "—" if value is None else f"{value:.{digits}f}"
