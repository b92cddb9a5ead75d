"""What `cache-teacher` and `plan` print when they are done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cache_format.wording import quantity
from pipeline.inspection import describe_targets
from pipeline.terminal.tables import Unbroken, duration, pairs, size, size_per_token

if TYPE_CHECKING:
    from pipeline.teacher.engines.interface import Usage
    from pipeline.teacher.plan import Plan
    from pipeline.teacher.position_loss import PositionLoss
    from pipeline.teacher.progress import CaptureSummary, GenerationSummary

LEFT_OUT = {
    "documents_cut": "documents cut into windows",
    "documents_cut_for_teacher": "documents cut because prompt and completion are too long for the teacher",
    "documents_with_special_tokens": "documents that already had their special tokens, which were not repeated",
    "documents_with_split_tokens": "documents with a token across prompt and answer that was split",
    "documents_with_only_eos": "documents whose only loss token is EOS",
    "empty_documents": "empty documents dropped",
    "single_token_pieces": "one-token pieces dropped",
    "windows_without_targets": "windows without loss tokens dropped",
    "ignored_files": "files of other types ignored",
    "empty_prompts": "empty prompts",
    "long_prompts": "prompts that leave no room for an answer",
    "skipped_answers": "answers that the server did not give, or only in part",
}
"""Counts of a corpus report that a user should know about, in words."""


def capture_view(summary: CaptureSummary, targets: Mapping[str, Any]) -> RenderableType:
    """A finished run of `cache-teacher`."""
    mass = "see distill stats" if summary.exact_mass is None else f"{summary.exact_mass:.4f} (mean)"
    if targets["kind"] == "hidden":
        mass = "all: states and head give the full distribution"
    title = f"Cached {summary.output}"
    if not summary.finished:
        title = f"{summary.output} is not complete yet: the last process to end, or distill merge, finishes it"
    return pairs(
        title,
        [
            ("targets", describe_targets(targets)),
            ("rows", f"{summary.rows:,}"),
            ("tokens", f"{summary.tokens:,}, {summary.loss_tokens:,} of them loss tokens"),
            ("left out or cut", _left_out(summary.corpus_report)),
            ("exact mass", mass),
            ("size", size_per_token(summary.bytes, summary.tokens, summary.head_bytes)),
            ("time", _time(summary.seconds, summary.tokens_per_s, "tokens/s")),
        ],
    )


def generation_view(summary: GenerationSummary, targets: Mapping[str, Any], *, judged: bool) -> RenderableType:
    """A finished run of `cache-teacher --generate`. `judged`: whether a function decided which answers to keep."""
    ended = ", ".join(f"{count:,} by {reason}" for reason, count in summary.stop_reasons.items() if count)
    accepted = f", {summary.passed:,} accepted ({summary.passed / summary.answers:.1%})" if judged else ""
    return pairs(
        f"Cached {summary.output}",
        [
            ("targets", describe_targets(targets)),
            ("answers", f"{summary.answers:,} to {quantity(summary.prompts, 'prompt')}, ended {ended}"),
            ("kept", f"{summary.rows:,} for {quantity(summary.prompts_kept, 'prompt')}{accepted}"),
            ("tokens", f"{summary.tokens:,}, {summary.loss_tokens:,} of them loss tokens"),
            ("left out", _left_out(summary.corpus_report)),
            ("log-prob.", f"{summary.mean_logprob:.3f} nats per token of the kept answers (mean)"),
            ("exact mass", "see distill stats" if summary.exact_mass is None else f"{summary.exact_mass:.4f} (mean)"),
            ("size", size_per_token(summary.bytes, summary.tokens)),
            *_usage(summary.usage),
            ("time", _time(summary.seconds, summary.tokens_per_s, "tokens/s generated")),
        ],
    )


def _usage(usage: Usage | None) -> list[tuple[str, str]]:
    if usage is None:
        return []
    return [("used", f"{usage.prompt_tokens:,} prompt and {usage.completion_tokens:,} completion tokens of the server")]


def _left_out(report: Mapping[str, float]) -> str:
    return ", ".join(f"{LEFT_OUT[n]}: {c:,}" for n, c in report.items() if c and n in LEFT_OUT) or "nothing"


def _time(seconds: float, tokens_per_s: float, unit: str) -> str:
    return f"{duration(seconds)}, {tokens_per_s:,.0f} {unit}" if tokens_per_s else "none: everything was there"


def _name_of_targets(targets: Mapping[str, Any]) -> str:
    """The kind and its main number: threshold 0.05."""
    telling = {"top-k": "k", "top-p": "top_p", "threshold": "tail_threshold", "random": "draws"}
    if targets["kind"] not in telling:
        return str(targets["kind"])
    return f"{targets['kind']} {targets[telling[targets['kind']]]:g}"


def _position_losses(loss: PositionLoss | None) -> list[tuple[str, str]]:
    """The teacher's cross-entropy in first windows and, if there are any, in later ones."""
    if loss is None:
        return []
    lines = []
    for name, windows in (("first windows", loss.first), ("later windows", loss.later)):
        parts = ((windows.beginning, f"at positions 0 to {loss.boundary - 1}"), (windows.rest, "after"))
        known = [f"{mean.nats:.3f} {where}" for mean, where in parts if mean is not None]
        if known:
            lines.append((name, f"{', '.join(known)} (nats per token)"))
    return lines


def _rows(rows: int, tokens: int) -> str:
    return f"{quantity(rows, 'row')}, {quantity(tokens, 'token')}"


def _speeds(slowest: float, fastest: float) -> str:
    if slowest == fastest:
        return f"{fastest:,.0f} tokens/s"
    return f"{slowest:,.0f} to {fastest:,.0f} tokens/s, by batch"


def plan_view(plan: Plan) -> RenderableType:
    """The result of `plan_cache`; the requested settings are marked ▶."""
    per_million = plan.cost_per_million_tokens(plan.chosen)
    paid = per_million is not None
    table = Table(header_style="bold", box=None, padding=(0, 1, 0, 0))
    table.add_column("targets", no_wrap=True)
    for name in ("entries", "mass", "B/token", "packed", "cache", "tokens/s", "time", "cost")[: 8 if paid else 7]:
        table.add_column(name, justify="right", no_wrap=True)
    for rule in plan.rules:
        cells = [
            ("▶ " if rule.chosen else "  ") + _name_of_targets(rule.targets),
            f"{rule.entries_per_token:.1f}",
            f"{rule.exact_mass:.2f}",
            f"{rule.bytes_per_token['columns']:.1f}",
            f"{rule.bytes_per_token['packed']:.1f}" if "packed" in rule.bytes_per_token else "—",
            size(rule.bytes[plan.encoding if plan.encoding in rule.bytes else "columns"]),
            f"{rule.tokens_per_s:,.0f}" + ("*" if rule.writer_bound else ""),
            duration(rule.seconds),
        ]
        if paid:
            cells.append(f"{(plan.cost_per_hour or 0.0) * rule.seconds / 3600:,.2f}")
        table.add_row(*cells, style="bold" if rule.chosen else "")
    facts = [
        ("text", f"{_rows(plan.rows, plan.tokens)}, {plan.loss_tokens:,} of them loss tokens"),
        ("measured on", _rows(plan.sample_rows, plan.sample_tokens)),
        ("teacher alone", _speeds(*plan.forward_tokens_per_s)),
        *_position_losses(plan.position_loss),
        ("free on disk", "unknown" if plan.free_bytes is None else size(plan.free_bytes)),
    ]
    if per_million is not None:
        facts.append(("cost", f"{per_million:,.4g} per million tokens, at {plan.cost_per_hour:g} an hour"))
    notes = [Text("* limited by encoding and writing")] if any(rule.writer_bound for rule in plan.rules) else []
    return Group(pairs("Predicted cost of this cache", facts), Text(), Unbroken(table), *notes)
