"""What `inspect` prints: a row with the teacher's candidates at every position."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cache_format.wording import quantity
from pipeline.terminal.tables import bar


def row_view(row: dict[str, Any]) -> RenderableType:
    """The result of `inspect_row`: the true token is marked ◀, weights of sampled entries ~."""
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
            note = "no loss token" if not position["counted"] else "no entries"
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
        f"row {row['row']}: {quantity(row['tokens'], 'token')}, {row['loss_tokens']:,} of them loss tokens, "
        f"{quantity(documents, 'document')}.  ◀ the true {true_token}"
        + (
            "  ~ weight of a sampled token"
            if any(c["sampled"] for p in row["positions"] for c in p["candidates"])
            else ""
        )
    )
    return Group(Text(head), Text(), table)
