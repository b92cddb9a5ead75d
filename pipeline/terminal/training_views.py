"""What `train-student` and `evaluate` print: progress, results, and curves over the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from cache_format.wording import quantity
from pipeline.evaluation.evaluate_config import shown_perplexity
from pipeline.terminal.tables import bar, duration, pairs, titled


def step_facts(logs: Mapping[str, Any]) -> dict[str, Any]:
    """What `Status.step` shows next to the progress bar, from the logs of a training step."""
    facts = [f"{name} {logs[key]:.4f}" for key, name in (("loss", "loss"), ("kl", "KL"), ("ce", "CE"))]
    facts.append(f"agreement {logs['agreement']:.1%}{_states('features', logs)}")
    return {"facts": facts, "rate": f"{logs['tokens_per_s']:,.0f} tokens/s"}


def held_out_line(logs: Mapping[str, Any]) -> str:
    """One evaluation during training."""
    return (
        f"step {logs['step']:,} held out: loss {logs['eval_loss']:.4f} · KL {logs['eval_kl']:.4f} · "
        f"CE {logs['eval_ce']:.4f} · perplexity {shown_perplexity(logs['eval_ce'])} · "
        f"agreement {logs['eval_agreement']:.1%}{_states('eval_features', logs)}"
    )


def _states(name: str, logs: Mapping[str, Any]) -> str:
    return f" · hidden states {logs[name]:.4f}" if name in logs else ""


KL_NOTES = {
    "lower bound": "a lower bound: all tokens outside the cache count as one class",
    "entries only": "over the cached entries alone: the teacher's tail mass is unknown",
}
"""What to say of a KL, by `kl_estimate_kind`."""


def mixture_lines(mixture: Sequence[Mapping[str, Any]]) -> list[str]:
    """How much of each of several caches a run sees, one line each."""
    return [
        f"{each['cache']}: {each['share']:.1%} of the loss tokens · "
        f"{quantity(each['rows_per_epoch'], 'row')} an epoch · {each['passes']:.2f} passes, "
        f"{quantity(each['tokens'], 'token')} in all"
        for each in mixture
    ]


def training_view(summary: Mapping[str, Any]) -> RenderableType:
    """A finished run, from its `TrainSummary` as a dictionary."""
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
                f"KL {found['kl']:.4f} · CE {found['ce']:.4f} · perplexity {shown_perplexity(found['ce'])} · "
                f"agreement {found['agreement']:.1%}"
                + (f" · hidden states {found['features']:.4f}" if "features" in found else ""),
            ),
            *([("KL", note)] if (note := KL_NOTES.get(summary["kl_estimate_kind"])) else []),
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
    """Held-out KL and CE over the steps of a run; the saved checkpoint and an early stop are marked.

    Bars span the range of a column. Of many evaluations every n-th is shown, and always the first, the best and the
    last.
    """
    every = math.ceil(len(evaluations) / CURVE_ROWS)
    last = len(evaluations) - 1
    columns = {"kl": "KL to teacher", "ce": "CE (nats)"}
    finite = {name: [e[name] for e in evaluations if math.isfinite(e[name])] for name in columns}
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
            share = (value - low[name]) / span[name] if span[name] and math.isfinite(value) else 0.0
            cells += [f"{value:.4f}", bar(0.02 + 0.98 * share, 12)]
        marks = [("◀ saved", step == best_step), ("■ stop", stopped is not None and step == stopped["step"])]
        table.add_row(f"{step:,}", *cells, "  ".join(mark for mark, here in marks if here))
    return titled("Held out", table)
