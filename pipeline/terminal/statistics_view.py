"""What `stats` and `convert` print."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cache_format.codecs.packed.streams import FREQUENCIES
from cache_format.wording import quantity
from pipeline.inspection import describe_targets
from pipeline.terminal.tables import bar, pairs, size_per_token


def statistics_view(stats: dict[str, Any]) -> RenderableType:
    """The result of `cache_statistics`."""
    targets = stats["targets"]
    entries = f"{stats['entries']:,}, {stats['entries'] / stats['tokens']:.1f} per token"
    kept = f"mean {_number(stats['exact_mass_mean'])}, 5th percentile {_number(stats['exact_mass_p5'])}"
    weights, error = stats["weight_sum_mean"], stats["weight_sum_standard_error"]
    at_least = "" if targets.get("entropy") is None else "at least "  # only lower bounds are stored
    if targets["kind"] == "hidden":
        entries, kept = "none: states, from which the head computes the full distribution", "all"
    summary = pairs(
        stats["path"],
        [
            ("teacher", stats["teacher"]),
            ("targets", describe_targets(targets)),
            ("rows", f"{stats['rows']:,} in {quantity(stats['shards'], 'shard')}"),
            ("tokens", f"{stats['tokens']:,}, {stats['loss_tokens']:,} of them loss tokens"),
            ("entries", entries),
            ("size", size_per_token(stats["bytes"], stats["tokens"], stats["head_bytes"])),
            ("exact mass", kept),
            *([] if weights is None else [("sum of weights", f"mean {weights:.5f} ± {error:.5f} (standard error)")]),
            ("entropy", f"mean {at_least}{_number(stats['entropy_mean_nats'], 2)} nats"),
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
    table.add_row("total", f"{sum(lines.values()):.2f}", "", "")
    if not streams:
        return table
    note = (
        f"entropy of packed: in the contexts of its streams. The order-zero entropy of these targets as columns is "
        f"{as_columns:.2f}"
    )
    return Group(table, Text(note, style="dim"))


def _number(value: float | None, digits: int = 4) -> str:
    return "—" if value is None else f"{value:.{digits}f}"


def conversion_view(output: str, rows: int, tokens: int, before: int, after: int, head: int) -> RenderableType:
    """A finished `convert`: sizes in bytes, and that of the teacher's head, which stays as it is."""
    return pairs(
        f"Converted {output}",
        [
            ("rows", f"{rows:,}"),
            ("tokens", f"{tokens:,}"),
            ("size", size_per_token(after, tokens, head)),
            ("before", size_per_token(before, tokens, head)),
        ],
    )
