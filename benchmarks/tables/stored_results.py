"""Rows of the files in benchmarks/results, and their numbers as the pages show them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"

Row = dict[str, Any]


def rows(benchmark: str, title: str) -> list[Row]:
    """The rows of a benchmark's table. Raises ValueError unless exactly one title begins with `title`."""
    tables = json.loads((RESULTS / f"{benchmark}.json").read_text(encoding="utf-8"))["tables"]
    found = [name for name in tables if name.startswith(title)]
    if len(found) != 1:
        raise ValueError(f"{benchmark}.json: found {found} for the title {title!r}, expected one of {list(tables)}")
    return tables[found[0]]  # type: ignore[no-any-return]


def by_name(benchmark: str, title: str) -> dict[str, Row]:
    """The same rows by their first cell."""
    return {str(next(iter(row.values()))): row for row in rows(benchmark, title)}


def matching(table: Iterable[Row], cells: Row) -> Row:
    """The only row that has these cells."""
    (row,) = (row for row in table if cells.items() <= row.items())
    return row


def runs(benchmark: str) -> list[Row]:
    """The single runs of a benchmark that stores them."""
    return [json.loads(line) for line in (RESULTS / f"{benchmark}.jsonl").read_text(encoding="utf-8").splitlines()]


def significant(value: float, digits: int = 2) -> str:
    """A number with this many significant digits, and all digits of its integer part."""
    if not value:
        return "0"
    return f"{value:#.{digits}g}" if abs(value) < 10 ** (digits - 1) else f"{value:,.0f}"


def about(value: float) -> str:
    """A large number rounded to three significant digits."""
    return f"{float(f'{value:.3g}'):,.0f}"


def millions(value: float, digits: int = 2) -> str:
    return f"{value / 1e6:.{digits}f} M"


def interval(values: Iterable[float]) -> str:
    """“0.74 to 0.80”, or one number if all are the same in two decimals."""
    ordered = sorted(values)
    low, high = f"{ordered[0]:.2f}", f"{ordered[-1]:.2f}"
    return low if low == high else f"{low} to {high}"


def rounded(value: str, digits: int) -> str:
    """“0.6396 ± 0.0613” with fewer digits."""
    unit = Decimal(1).scaleb(-digits)
    return " ± ".join(str(Decimal(part).quantize(unit, ROUND_HALF_UP)) for part in value.split(" ± "))


def minus(text: str) -> str:
    """A number with a minus sign instead of a hyphen; without one if it is zero."""
    return "0.0000" if text == "-0.0000" else text.replace("-", "−")
