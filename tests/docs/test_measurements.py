"""The tables of docs/measurements.md are those of benchmarks/results, as far as their digits go."""

from __future__ import annotations

import json
import re
from typing import Any

from pages import ROOT, tables

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
    for entries, random, threshold, ratio in page_table("entries"):
        drawn, value = re.fullmatch(r"(\d+) draws: (\.\d+)", random).groups()
        tau, other = re.fullmatch(r"τ = (\.\d+): (\.\d+)", threshold).groups()
        row, sampled = measured[f"random {drawn}"], next(r for n, r in measured.items() if close(n, tau))
        assert agrees(entries, row["entries"]) and agrees(entries, sampled["entries"])
        assert agrees(value, row["E‖t̂ − p‖²"]) and agrees(other, sampled["E‖t̂ − p‖²"])
        assert agrees(ratio, sampled["÷ random's"])


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


def close(name: str, tau: str) -> bool:
    kind, _, value = name.partition(" ")
    return kind == "threshold" and agrees(tau, float(value))


# -- what students learn ----------------------------------------------------------------------------

ARMS = {
    "labels alone": "labels",
    "the whole distribution": "full",
    "the same, first weights changed by a millionth": "full, nudged",
}
RENAMED = {
    r"top-(\d+), renormalised": r"renormalised top-\1",
    r"top-(\d+), rest as one class": r"bucket top-\1",
    r"top-(\d+), rest to the label": r"residual to label top-\1",
    r"random, (\d+) draws": r"random \1 draws",
}
REGIMES = {
    "track 1": (1, ""),
    "track 1, a quarter of the rows a step": (1, ", 1 row a step"),
    "track 2": (2, ""),
    "track 2, a quarter of the rows a step": (2, ", 4 rows a step"),
    "the same, an eighth of the text": (2, ", 1/8 of the text, 4 rows a step"),
}


def learned(track: int) -> dict[str, dict[str, Any]]:
    return results("quality", f"Track {track}: held-out text of the domains trained on")


def first_run(track: int, arm: str) -> dict[str, Any]:
    runs = map(json.loads, (ROOT / "benchmarks/results/quality.jsonl").read_text(encoding="utf-8").splitlines())
    (found,) = [run for run in runs if (run["track"], run["title"], run["seed"]) == (track, arm, 0)]
    return found


def same_share(said: str, row: dict[str, Any]) -> bool:
    """“86 ± 7 %” is what a table of results has as “86.4 ± 7.1”."""
    numbers = re.findall(r"[\d.]+", said)
    known = [float(part) for part in str(row["gain kept, KL %"]).replace("-", "").split(" ± ")]
    known = known if row["seeds"] > 1 and known[-1] else known[:1]  # references have 0 or 100 by definition
    same_sign = said.startswith("−") == str(row["gain kept, KL %"]).startswith("-")
    return same_sign and all(agrees(number, value) for number, value in zip(numbers, known, strict=True))


def test_what_students_learn_from_each_kind() -> None:
    rows = page_table("learned from")
    for track, first in ((1, 1), (2, 5)):
        measured, said = learned(track), set()
        for name, *cells in rows:
            size, kl, share, seeds = cells[first - 1 : first + 3]
            if not seeds:
                continue
            for pattern, renamed in RENAMED.items():
                name = re.sub(pattern, renamed, name)
            arm = ARMS.get(name, name)
            row = measured[arm]
            said.add(arm)
            assert agrees(kl, first_run(track, arm)["held_out"]["in-domain"]["kl"]), (track, arm)
            assert int(seeds) == row["seeds"] and (not size or agrees(size, float(row["bytes/token"]))), (track, arm)
            assert same_share(share, row), (track, arm, row["gain kept, KL %"])
        assert said == {arm for arm in measured if not re.search(r" a step|×|the teacher", arm)}


def test_what_students_learn_in_other_steps() -> None:
    (rows,) = [table[1:] for table in tables(PAGE) if table[0][1] == "positions a step"]
    assert [name for name, *_ in rows] == list(REGIMES)
    for name, positions, steps, *kls, share, seeds in rows:
        track, regime = REGIMES[name]
        for arm, kl in zip(("labels", "full", "threshold 1/20"), kls, strict=True):
            run = first_run(track, arm + regime)
            assert agrees(kl, run["held_out"]["in-domain"]["kl"]) and agrees(steps, run["steps"]), (name, arm)
            assert agrees(positions, run["tokens"] / run["steps"])
        row = learned(track)["threshold 1/20" + regime]
        assert same_share(share, row) and int(seeds) == row["seeds"], (name, row)
