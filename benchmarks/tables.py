"""`make docs`: writes the tables of docs/measurements.md and docs/architectures.md from benchmarks/results.

A table is between `<!-- table NAME -->` and `<!-- end of table -->`; TABLES says which function makes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from benchmarks import architectures

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
PAGES = ("docs/architectures.md", "docs/measurements.md")
BLOCK = re.compile(r"(<!-- table (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Row = dict[str, Any]

CODEBOOKS = {  # name in the results: name on the page
    "√p, 63": "uniform in √p, 63 steps",
    "√p, 127": "uniform in √p, 127 steps",
    "√p, 255": "uniform in √p, 255 steps",
    "√p, 63 + 26 below": "uniform in √p, 63 steps, 26 geometric ones below",
    "√p, 88 + 25 below": "**uniform in √p, 88 steps, 25 geometric ones below (exact targets)**",
    "√p, 160 + 24 below": "uniform in √p, 160 steps, 24 geometric ones below",
    "√p, 234 + 23 below": "uniform in √p, 234 steps, 23 geometric ones below",
    "log p, 128": "uniform in log p",
    "log p, 256": "uniform in log p",
    "float16": "float16 instead of codes",
}
ARMS = {
    "labels": "labels alone",
    "renormalised top-16": "top-16, renormalised",
    "renormalised top-50": "top-50, renormalised",
    "renormalised top-64": "top-64, renormalised",
    "bucket top-16": "top-16, tail as one class",
    "bucket top-50": "top-50, tail as one class",
    "bucket top-64": "top-64, tail as one class",
    "residual to label top-16": "top-16, tail to the label",
    "random 13 draws": "random, 13 samples",
    "random 50 draws": "random, 50 samples",
    "threshold 1/4": "threshold 1/4",
    "threshold 1/8": "threshold 1/8",
    "threshold 1/13": "threshold 1/13",
    "threshold 1/20": "**threshold 1/20** (default)",
    "threshold 1/50": "threshold 1/50",
    "threshold 1/200": "threshold 1/200",
    "full": "**the full distribution**",
    "full, nudged": "the same, first weights changed by a millionth",
}
REGIMES = {  # row on the page: track, suffix of its arms in the results
    "track 1": (1, ""),
    "track 1, a quarter of the rows per step": (1, ", 1 row a step"),
    "track 2": (2, ""),
    "track 2, a quarter of the rows per step": (2, ", 4 rows a step"),
    "the same, an eighth of the text": (2, ", 1/8 of the text, 4 rows a step"),
}


def codebooks() -> list[list[str]]:
    rows = _results("codebook", "Codebooks")
    table = [["codebook", "values", "bytes/token", "KL", "largest change"]]
    for name, shown in CODEBOOKS.items():
        row = rows[name]
        values = f"{row['values']:,}" if row["values"] <= 256 else ""
        table.append([shown, values, f"{row['B/token top-64']:.1f}", _digits(row["KL top-64"]), _digits(row["p>1e-6"])])
    return table


def sizes() -> list[list[str]]:
    """Bytes, error and cost of the kinds of targets."""
    head = ["targets", "entries", "columns, zstd 9", "zstd 19", "floor", "packed", "error"]
    table = [[*head, "reading packed, tokens/s and core", "cost"]]
    for name, row in _results("sizes", "Bytes per token").items():
        sizes = [f"{row[key]:.1f}" for key in ("entries", "columns z9", "columns z19", "entropy", "packed")]
        speed = f"{row['packed tokens/s'] / 1e6:.2f} M"
        table.append([name, *sizes, f"{row['error']:.4f}", speed, f"{row['cost/top-64']:.2f}"])
    return table


def variance() -> list[list[str]]:
    """`random` beside the threshold with as many entries: the results list them in pairs."""
    rows = list(_results("variance", "Variance").values())
    table = [["entries", "random", "threshold", "threshold ÷ random"]]
    randoms = [row for row in rows if row["sample"].startswith("random")]
    for random in randoms:
        threshold = min(
            (row for row in rows if row["sample"].startswith("threshold")),
            key=lambda row: abs(row["entries"] - random["entries"]),
        )
        (samples, tau) = (row["sample"].partition(" ")[2] for row in (random, threshold))
        errors = [f"{row['E‖t̂ − p‖²']:.4f}" for row in (random, threshold)]
        shown = [f"{samples} samples: {errors[0]}", f"τ = {float(tau):.3f}: {errors[1]}"]
        ratio = threshold["÷ random's"]
        table.append([f"{random['entries']:.1f}", *shown, f"{ratio:.2f}"])
    return table


def rounding() -> list[list[str]]:
    tables = json.loads((RESULTS / "variance.json").read_text(encoding="utf-8"))["tables"]
    (rows,) = [rows for title, rows in tables.items() if title.startswith("Rounding")]
    table = [["stored", "levels", "Σ (p̂ − p)", "where max p > 0.95", "SmolLM2's KL with itself, estimated"]]
    for row in rows:
        name, levels, off, sure, mean, deviation = row.values()
        estimate = f"{mean:.4f} ± {deviation:.4f}"
        table.append([name, levels, *(_minus(text) for text in (f"{off:.4f}", f"{sure:.4f}", estimate))])
    return table


def learned() -> list[list[str]]:
    """What students learn from each kind of targets."""
    columns = ["bytes", "track {}: KL", "gain kept", "seeds"]
    table = [["learned from", *(column.format(track) for track in (1, 2) for column in columns)]]
    tracks = [_learned(track) for track in (1, 2)]
    for name, shown in ARMS.items():
        cells = [shown]
        for arms in tracks:
            row = arms.get(name)
            cells += [""] * 4 if row is None else _arm(row)
        table.append(cells)
    return table


def regimes() -> list[list[str]]:
    """The default beside labels and full distribution, in other steps."""
    table = [["", "positions per step", "steps", "labels, KL", "full, KL", "1/20, KL", "gain kept", "seeds"]]
    runs = [json.loads(line) for line in (RESULTS / "quality.jsonl").read_text(encoding="utf-8").splitlines()]
    for shown, (track, suffix) in REGIMES.items():
        arms = _learned(track)
        run = next(run for run in runs if (run["track"], run["title"]) == (track, "threshold 1/20" + suffix))
        kls = [arms[arm + suffix]["KL"] for arm in ("labels", "full", "threshold 1/20")]
        row = arms["threshold 1/20" + suffix]
        steps = [f"{run['tokens'] / run['steps']:,.0f}", f"{run['steps']:,}"]
        table.append([shown, *steps, *kls, _share(row), str(row["seeds"])])
    return table


TABLES: dict[str, tuple[Callable[[], list[list[str]]], int]] = {  # with the number of columns of text
    "codebooks": (codebooks, 1),
    "sizes": (sizes, 1),
    "variance": (variance, 3),
    "rounding": (rounding, 2),
    "learned": (learned, 1),
    "regimes": (regimes, 1),
    "architectures": (architectures.table, 6),
    "architectures not built": (architectures.not_built, 2),
}


def render(page: str) -> str:
    """The page with its tables made anew. Raises ValueError for a table that is not in TABLES."""

    def block(match: re.Match[str]) -> str:
        before, name, after = match.groups()
        if name not in TABLES:
            raise ValueError(f"table {name}: expected one of {', '.join(TABLES)}. Correct the marker.")
        make, of_text = TABLES[name]
        head, *rows = make()
        line = ["---" if i < of_text else "---:" for i in range(len(head))]
        return before + "".join(f"| {' | '.join(cells)} |\n" for cells in (head, line, *rows)) + after

    return BLOCK.sub(block, page)


def _results(name: str, table: str) -> dict[str, Row]:
    """Of a benchmark: the rows of a table by their first cell."""
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["tables"][table]
    return {str(next(iter(row.values()))): row for row in found}


def _learned(track: int) -> dict[str, Row]:
    rows = _results("quality", f"Track {track}: held-out text of the domains trained on")
    return {name: {**row, "KL": _rounded(row["KL"], 2)} for name, row in rows.items()}


def _arm(row: Row) -> list[str]:
    size = row["bytes/token"].replace("–", "")  # labels and the full distribution have no cache
    return [size, row["KL"], _share(row), str(row["seeds"])]


def _share(row: Row) -> str:
    share = row["gain kept, KL %"].removesuffix(" ± 0.0")  # references have 0 or 100 by definition
    return f"{_minus(share)} %"


def _rounded(value: str, digits: int) -> str:
    """“0.6396 ± 0.0613” with fewer digits."""
    unit = Decimal(1).scaleb(-digits)
    return " ± ".join(str(Decimal(part).quantize(unit, ROUND_HALF_UP)) for part in value.split(" ± "))


def _digits(value: float) -> str:
    """Two digits that matter."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _minus(text: str) -> str:
    return "0.0000" if text == "-0.0000" else text.replace("-", "−")


def main(pages: Sequence[str] = PAGES) -> None:
    for page in pages:
        file = ROOT / page
        before = file.read_text(encoding="utf-8")
        after = render(before)
        if after != before:
            file.write_text(after, encoding="utf-8")
        print(f"{page}: {len(BLOCK.findall(before))} tables, {'written' if after != before else 'up to date'}")


if __name__ == "__main__":
    main()
