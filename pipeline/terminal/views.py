"""Tables and pictures for a terminal, as rich renderables; whoever calls decides where they are printed.

Everything numeric is computed here or handed in as a dictionary that `--json` prints unchanged: what a person sees and
what a script reads are the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import cache_format as cf

if TYPE_CHECKING:
    from pipeline.teacher.plan import Plan

BARS = " ▏▎▍▌▋▊▉█"


def bar(share: float, width: int = 16) -> str:
    """A bar of `share` (0 to 1) of `width` characters, to an eighth of one."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (BARS[part] if part else "")).ljust(width)


def size(count: float) -> str:
    """Bytes for people: 1.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def duration(seconds: float) -> str:
    """2:05 or 1:02:05; — if unknown."""
    if not np.isfinite(seconds):
        return "—"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def titled(title: str, table: Table) -> RenderableType:
    """A title of its own line. A table's own would be folded to its width, and paths are long."""
    return Group(Text(title, style="italic"), table)


def pairs(title: str, rows: Sequence[tuple[str, str]]) -> RenderableType:
    """A two-column table of names and values."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    return titled(title, table)


def describe_targets(targets: Mapping[str, Any]) -> str:
    """`targets` of a manifest in a line: threshold, τ = 0.05, K = 1, seed 0."""
    names = {"tail_threshold": "τ", "k": "K", "top_p": "P", "draws": "N", "samples": "M", "temperature": "T"}
    usual = {"samples": 1, "temperature": 1.0, "k": 0}
    parts = [
        f"{symbol} = {targets[name]:g}"
        for name, symbol in names.items()
        if targets.get(name) is not None and targets[name] != usual.get(name)
    ]
    if "head" in targets and "hidden" in targets:
        parts.insert(0, f"D = {targets['hidden']['width']}, {targets['hidden']['dtype']}")
    return ", ".join([targets["kind"], *parts])


def _name_of_targets(targets: Mapping[str, Any]) -> str:
    """The kind and its one most telling number: threshold 0.05."""
    telling = {"top-k": "k", "top-p": "top_p", "threshold": "tail_threshold", "random": "draws"}
    if targets["kind"] not in telling:
        return str(targets["kind"])
    return f"{targets['kind']} {targets[telling[targets['kind']]]:g}"


def plan_view(plan: Plan) -> RenderableType:
    """`plan_cache` for people; the settings asked for are marked ▶."""
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
    slowest, fastest = plan.forward_tokens_per_s
    facts = [
        ("text", f"{plan.rows:,} rows, {plan.tokens:,} tokens, of which {plan.counted_tokens:,} count"),
        ("measured on", f"{plan.sample_rows:,} rows, {plan.sample_tokens:,} tokens"),
        ("teacher alone", f"{slowest:,.0f} to {fastest:,.0f} tokens/s, by batch"),
        ("free on disk", "unknown" if plan.free_bytes is None else size(plan.free_bytes)),
    ]
    if per_million is not None:
        facts.append(("cost", f"{per_million:,.4g} per million tokens, at {plan.cost_per_hour:g} an hour"))
    notes = [Text("* limited by encoding and writing")] if any(rule.writer_bound for rule in plan.rules) else []
    return Group(pairs("What this cache will take", facts), Text(), table, *notes)


def inspect_row(
    cache: cf.Cache, row_index: int, text: Callable[[int], str], *, candidates: int, start: int, positions: int
) -> dict[str, Any]:
    """One row, token by token: what the teacher expected after each, and what came (`next`, `next_id`, …).

    Of a masked model: what it expected in the place of each, and what stood there (`label`, `label_id`, …).

    Args:
        text: token id -> what it says.
        candidates: the teacher's most likely entries to show per position.
        start, positions: from which position, and how many.
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
        "counted_tokens": int(row.loss_mask.sum()),
        "segment_lengths": [int(n) for n in row.segment_lengths],
        "positions": shown,
    }


def inspect_view(row: dict[str, Any]) -> RenderableType:
    """`inspect_row` for people: the true token is marked ◀, weights of sampled entries ~."""
    causal = row["alignment"] == "next"
    label, expects, true_token = ("next", "next", "next token") if causal else ("label", "here", "token")
    table = Table(box=None, padding=(0, 1), header_style="bold", show_edge=False)
    table.add_column("t", justify="right", style="dim")
    table.add_column("token")
    table.add_column(f"teacher expects {expects}")
    table.add_column("p", justify="right")
    table.add_column("")
    segment = 0
    for position in row["positions"]:
        if position["segment"] != segment:
            table.add_row("", Text("── next document ──", style="dim"))
            segment = position["segment"]
        token = Text(repr(position["token"])[1:-1], style="bold" if position["counted"] else "dim")
        if not position["candidates"]:
            note = "not counted" if not position["counted"] else "no entries"
            table.add_row(str(position["position"]), token, Text(note, style="dim"))
            continue
        lines = [
            (c["token"], c["prob"], "~" if c["sampled"] else "", c["id"] == position[f"{label}_id"])
            for c in position["candidates"]
        ]
        if position[f"{label}_id"] is not None and not any(true for *_, true in lines):
            lines.append((position[label], position[f"{label}_prob"], "", True))
        for i, (text, prob, about, true) in enumerate(lines):
            style = "green" if true else ""
            table.add_row(
                str(position["position"]) if i == 0 else "",
                token if i == 0 else "",
                Text(repr(text)[1:-1] + (" ◀" if true else ""), style=style),
                Text("tail" if prob is None else f"{about}{prob:.3f}", style=style),
                Text("" if prob is None else bar(prob), style=style),
            )
    documents = len(row["segment_lengths"])
    head = (
        f"row {row['row']}: {row['tokens']:,} tokens, {row['counted_tokens']:,} of them counted, "
        f"{documents} document{'s' if documents != 1 else ''}.  ◀ the true {true_token}"
        + (
            "  ~ weight of a sampled token"
            if any(c["sampled"] for p in row["positions"] for c in p["candidates"])
            else ""
        )
    )
    return Group(Text(head), Text(), table)


LOWER_BOUND = "a lower bound, with all tokens that are not in the cache as one"


def evaluation_view(title: str, evaluations: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """Students side by side: KL, CE, perplexity, agreement.

    Across tokenizers how many positions were compared takes the place of the perplexity, which is of other tokens each.
    """
    crossed = any(values.get("compared") is not None for values in evaluations.values())
    table = Table(header_style="bold", box=SIMPLE_HEAD, show_edge=False)
    table.add_column("student", overflow="fold", min_width=16)  # the one that gives way in a narrow terminal
    for name in ("KL to teacher", "CE (nats)", "compared" if crossed else "perplexity", "agreement", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for student, values in evaluations.items():
        table.add_row(
            student,
            f"{values['kl']:.4f}",
            f"{values['ce']:.4f}",
            f"{values['compared']:.1%}" if crossed else f"{values['perplexity']:,.2f}",
            f"{values['agreement']:.1%}",
            f"{values['tokens']:,}",
        )
    lower_bound = any(v.get("kl_estimate_kind") == "lower bound" for v in evaluations.values())
    notes = [f"KL: {LOWER_BOUND}"] if lower_bound else []
    if crossed:
        notes.append("KL and agreement are 0 where there is no teacher. Only students of one tokenizer compare.")
    return Group(titled(title, table), *map(Text, notes))


def mixture_lines(mixture: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of each of several caches a run sees, as `Mix.seen`, a line each."""
    return [
        f"{each['cache']}: {each['share']:.1%} of what counts · {each['rows_per_epoch']:,} rows an epoch · "
        f"{each['passes']:.2f} passes, {each['tokens']:,} tokens in all"
        for each in mixture
    ]


def training_view(summary: Mapping[str, Any]) -> RenderableType:
    """A finished run, as the dictionary of its `TrainSummary`, for people."""
    of = "" if summary["stopped"] is None else f" of {summary['planned_steps']:,}, stopped early,"
    loss, found = summary["train_loss"], summary["eval"]
    rows = [
        ("parameters", f"{summary['parameters'] / 1e6:.1f} M"),
        ("steps", f"{summary['steps']:,}{of} in {duration(summary['seconds'])}"),
        ("training loss", "—" if loss is None else f"{loss:.4f} (mean)"),
        *(
            ("and" if i else "trained on", f"{each['share']:.1%} {each['cache']}, {each['passes']:.2f} passes")
            for i, each in enumerate(summary["mixture"])
        ),
    ]
    if found:
        best = summary["best_step"]
        rows += [
            ("checkpoint", "the last" if best is None else f"step {best:,}, the best"),
            (
                "held out",
                f"KL {found['kl']:.4f} · CE {found['ce']:.4f} · perplexity {found['perplexity']:,.2f} · "
                f"agreement {found['agreement']:.1%}"
                + (f" · features {found['features']:.4f}" if "features" in found else ""),
            ),
            *([("KL", LOWER_BOUND)] if summary["kl_estimate_kind"] == "lower bound" else []),
        ]
    view = pairs(f"Trained {summary['output']}", rows)
    if len(summary["evaluations"]) < 2:
        return view
    return Group(view, curves_view(summary["evaluations"], best_step=summary["best_step"], stopped=summary["stopped"]))


CURVE_ROWS = 24


def curves_view(
    evaluations: Sequence[Mapping[str, float]],
    *,
    best_step: int | None = None,
    stopped: Mapping[str, Any] | None = None,
) -> RenderableType:
    """Both held-out losses of a run over its steps, the saved checkpoint and an early stop marked.

    Bars reach from the lowest value of a column, with a sliver, to its highest. Of many evaluations every n-th is
    shown, and always the first, the best and the last.
    """
    every = math.ceil(len(evaluations) / CURVE_ROWS)
    last = len(evaluations) - 1
    columns = {"kl": "KL to teacher", "ce": "CE (nats)"}
    finite = {name: [e[name] for e in evaluations if np.isfinite(e[name])] for name in columns}
    low = {name: min(values, default=0.0) for name, values in finite.items()}
    span = {name: max(values, default=0.0) - low[name] for name, values in finite.items()}
    table = Table(box=None, header_style="dim")
    table.add_column("step", justify="right")
    for title in columns.values():
        table.add_column(title, justify="right")
        table.add_column()
    table.add_column()
    for i, evaluation in enumerate(evaluations):
        step = evaluation["step"]
        if not (i % every == 0 or i == last or step == best_step):
            continue
        cells = []
        for name in columns:
            value = evaluation[name]
            share = (value - low[name]) / span[name] if span[name] and np.isfinite(value) else 0.0
            cells += [f"{value:.4f}", bar(0.02 + 0.98 * share, 12)]
        marks = [("◀ saved", step == best_step), ("■ stop", stopped is not None and step == stopped["step"])]
        table.add_row(f"{step:,}", *cells, "  ".join(mark for mark, here in marks if here))
    return titled("Held out", table)
