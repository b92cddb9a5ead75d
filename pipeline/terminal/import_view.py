"""What `import` and `export` print."""

from __future__ import annotations

from rich.console import RenderableType

from cache_format.wording import quantity
from pipeline.importing.export_cache import ExportSummary
from pipeline.importing.import_cache import ImportSummary
from pipeline.terminal.tables import pairs, size, size_per_token


def import_view(summary: ImportSummary) -> RenderableType:
    rows = [
        ("rows", f"{summary.rows:,}"),
        ("tokens", f"{summary.tokens:,}, {summary.loss_tokens:,} of them loss tokens"),
        ("entries", f"{summary.entries:,}, {summary.entries / summary.loss_tokens:.1f} per loss token"),
        ("size", size_per_token(summary.bytes, summary.tokens)),
    ]
    if summary.renormalised:
        rows.append(("values", "renormalised: the tail mass is unknown"))
    if summary.label_logprob is not None:
        rows.append(
            (
                "next token",
                f"listed at {summary.label_listed:.1%} of positions, mean log-probability at most "
                f"{summary.label_logprob:.2f} nats",
            )
        )
    for reason, count in summary.unusable.items():
        more = f" and {count - len(summary.examples[reason]):,} more" if count > len(summary.examples[reason]) else ""
        rows.append(("left out", f"{quantity(count, 'record')}, {reason}: {'; '.join(summary.examples[reason])}{more}"))
    rows += [("noted", f"{count:,} {what}") for what, count in summary.changed.items()]
    return pairs(f"Imported {summary.output}", rows)


def export_view(summary: ExportSummary) -> RenderableType:
    return pairs(
        f"Exported {summary.output}",
        [
            ("format", summary.format),
            ("rows", f"{summary.rows:,} in {quantity(summary.files, 'file')}"),
            ("size", f"{size(summary.bytes)}"),
        ],
    )
