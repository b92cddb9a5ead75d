"""The tables of docs/measurements.md are those of benchmarks/results, as far as their digits go."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from cache_format import EXACT_LEVELS
from pages import ROOT, tables, text
from pipeline.teacher.rules import THRESHOLD_LEVELS

PAGE = "docs/measurements.md"


def results(name: str, table: str) -> dict[str, dict[str, Any]]:
    """Of a benchmark: the rows of a table, by their first cell."""
    found = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
    return {str(next(iter(row.values()))): row for row in found["tables"][table]}


def page_table(first: str) -> list[list[str]]:
    """Without its head."""
    (found,) = [table for table in tables(PAGE) if table[0][0] == first]
    return [[cell.replace("*", "") for cell in row] for row in found[1:]]


def agrees(said: str, measured: float) -> bool:
    """Whether a number is what was measured, rounded to the digits that it has."""
    digits = len(said.partition(".")[2])
    return abs(float(said.replace(",", "")) - measured) <= 0.501 * 10**-digits


def test_codebooks() -> None:
    measured = results("codebook", "Codebooks")
    rows = page_table("codebook")
    assert len(rows) == 10
    for name, values, size, kl, change in rows:
        steps = re.match(r"uniform in √p, (\d+) steps(?:, (\d+) geometric ones below)?", name)
        if steps:
            key = f"√p, {steps[1]}" + (f" + {steps[2]} below" if steps[2] else "")
        else:
            key = f"log p, {values}" if name == "uniform in log p" else name.partition(" ")[0]
        row = measured[key]
        assert agrees(values, row["values"]) if values else key == "float16"
        columns = ("B/token top-64", "KL top-64", "p>1e-6")
        for said, column in zip((size, kl, change), columns, strict=True):
            assert agrees(said, row[column]), (name, column, row[column])


def test_kinds_of_targets() -> None:
    measured = results("sizes", "Bytes per token")
    rows = page_table("targets")
    assert [name.partition(", at most")[0] for name, *_ in rows] == list(measured)
    columns = ("entries", "columns z9", "columns z19", "entropy", "packed", "error", "packed tokens/s", "cost/top-64")
    for (name, *said), row in zip(rows, measured.values(), strict=True):
        for cell, column in zip(said, columns, strict=True):
            unit = 1e6 if column.endswith("tokens/s") else 1.0
            assert agrees(cell.removesuffix(" M"), row[column] / unit), (name, column, row[column])


def test_variance_of_samples() -> None:
    measured = results("variance", "Variance")
    ratios = []
    for entries, random, threshold, ratio in page_table("entries"):
        drawn, value = re.fullmatch(r"(\d+) draws: (\.\d+)", random).groups()
        tau, other = re.fullmatch(r"τ = (\.\d+): (\.\d+)", threshold).groups()
        row, sampled = measured[f"random {drawn}"], next(r for n, r in measured.items() if close(n, tau))
        assert agrees(entries, row["entries"]) and agrees(entries, sampled["entries"])
        assert agrees(value, row["E‖t̂ − p‖²"]) and agrees(other, sampled["E‖t̂ − p‖²"])
        assert agrees(ratio, sampled["÷ random's"])
        ratios.append(ratio)
    said = re.search(r"`threshold` has (\.\d+) to (\.\d+) of its variance", text("README.md"))
    assert said and said.groups() == (min(ratios), max(ratios))


def test_rounding_of_samples() -> None:
    measured = json.loads((ROOT / "benchmarks/results/variance.json").read_text(encoding="utf-8"))["tables"]
    (rows,) = (rows for title, rows in measured.items() if title.startswith("Rounding"))
    said = [row for table in tables(PAGE) if table[0][1] == "levels" for row in table[1:]]
    assert len(said) == len(rows) == 4
    for (name, levels, *sums, own), row in zip(said, rows, strict=True):
        mean, deviation = own.split(" ± ")
        known = list(row.values())
        assert [name, levels] == known[:2]
        for number, value in zip((*sums, mean, deviation), known[2:], strict=True):
            assert agrees(number.replace("−", "-"), value), (name, levels, number)


@pytest.mark.parametrize(
    "page, said",
    [
        ("README.md", r"one of (\d+) values \((\d+) with `threshold`"),
        ("docs/choosing.md", r"one of (\d+) values \(with `threshold` one of (\d+)"),
    ],
)
def test_values_of_a_codebook(page: str, said: str) -> None:
    assert re.findall(said, text(page)) == [(str(EXACT_LEVELS), str(THRESHOLD_LEVELS))]


def close(name: str, tau: str) -> bool:
    kind, _, value = name.partition(" ")
    return kind == "threshold" and agrees(tau, float(value))


@pytest.mark.parametrize(
    "said, targets, columns",
    [
        (r"`threshold` τ = 1/20: .* \| ([\d.]+), ([\d.]+) \|", "threshold 1/20", ("columns z9", "packed")),
        (r"the same, τ = 1/8 .* \| ([\d.]+), ([\d.]+) \|", "threshold 1/8", ("columns z9", "packed")),
        (
            r"the same, top-50 .* \| ([\d.]+) \(([\d.]+) at zstd 19\), ([\d.]+) \|",
            "top-50",
            ("columns z9", "columns z19", "packed"),
        ),
        (r"computing `threshold` targets, .* \| ([\d.]+) \|", "threshold 1/20", ("cost/top-64",)),
    ],
)
def test_the_first_page_says_the_same(said: str, targets: str, columns: tuple[str, ...]) -> None:
    row = results("sizes", "Bytes per token")[targets]
    found = re.search(said, text("README.md"))
    assert found
    for number, column in zip(found.groups(), columns, strict=True):
        assert agrees(number, row[column]), column
