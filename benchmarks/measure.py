"""Shared by all benchmarks: interleaved timing, a description of the machine, results as tables, JSON and Markdown.

**Interleaved.** The variants run in turn, A B C A B C ..., so that a slow phase of the machine slows all of them. A
ratio is the median over the rounds of (A's time / B's time in the same round), not the ratio of two medians taken
minutes apart.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable

LIBRARIES = ("torch", "transformers", "pyarrow", "numpy")
OPTIONAL = ("numba",)

Value = str | int | float
Times = Mapping[str, Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Size of a measurement."""

    quick: bool = False  # tiny sizes as a smoke test: seconds each, the numbers mean nothing
    repetitions: int = 5
    teacher: Path = Path("demo-output/teacher")  # transformers directory

    @property
    def rounds(self) -> int:
        return 2 if self.quick else self.repetitions


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of a benchmark."""

    name: str
    question: str  # one sentence: what was compared with what
    bound: str  # the best possible number, and why
    settings: Mapping[str, Value]  # sizes, with units in the names
    tables: Sequence[Table]
    summary: Mapping[str, Value]  # the few numbers to quote; the JSON line
    conclusion: str = ""
    record: Mapping[str, Any] = field(default_factory=lambda: machine())


def interleave(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round. The variants take turns, in reverse order in every second round."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()  # warm-up
    for i in range(rounds):
        for name in list(variants)[:: -1 if i % 2 else 1]:
            gc.collect()
            start = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(times: Times, name: str, baseline: str) -> float:
    """Median over the rounds of time / baseline's time."""
    return statistics.median(a / b for a, b in zip(times[name], times[baseline], strict=True))


def spread(times: Times, name: str, baseline: str) -> str:
    """Smallest and largest of the ratios whose median is `ratio`."""
    ratios = [a / b for a, b in zip(times[name], times[baseline], strict=True)]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def mean_and_range(values: Sequence[float], digits: int = 3) -> str:
    """“0.352 ± 0.001”: the mean, and half of the difference between the largest and the smallest."""
    return f"{statistics.mean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


def machine() -> dict[str, Any]:
    """Date, processor, threads, load and library versions of a measurement."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average_at_start": [round(load, 1) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in LIBRARIES},
            **{name: importlib.metadata.version(name) for name in OPTIONAL if importlib.util.find_spec(name)},
        },
    }


def show(result: Result) -> None:
    """Prints the tables, then one line of JSON."""
    console = Console() if sys.stdout.isatty() else Console(width=170)
    console.print(f"\n[bold]{result.name}[/bold]: {result.question}\nBound: {result.bound}", highlight=False)
    for table in result.tables:
        shown = RichTable(title=table.title, title_justify="left")
        for i, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if i == 0 else "right")
        for row in table.rows:
            shown.add_row(*map(readable, row))
        console.print(shown)
    if result.conclusion:
        console.print(result.conclusion, highlight=False)
    line = {"benchmark": result.name, **result.summary, "machine": result.record}
    print(json.dumps(line, ensure_ascii=False), flush=True)


def write(result: Result, directory: Path, command: str) -> None:
    """Writes NAME.json with every number, and NAME.md for reading."""
    directory.mkdir(parents=True, exist_ok=True)
    data = {
        "benchmark": result.name,
        "command": command,
        "machine": result.record,
        "question": result.question,
        "bound": result.bound,
        "settings": result.settings,
        "summary": result.summary,
        "conclusion": result.conclusion,
        "tables": {t.title: [dict(zip(t.columns, row, strict=True)) for row in t.rows] for t in result.tables},
    }
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    (directory / f"{result.name}.json").write_text(text, encoding="utf-8")
    (directory / f"{result.name}.md").write_text(_markdown(result, command), encoding="utf-8")


def readable(value: Value) -> str:
    """Number with thousands separators and three significant digits; text unchanged."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}" if abs(value) >= 100 else f"{value:.2f}"


def _markdown(result: Result, command: str) -> str:
    record = result.record
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    settings = ", ".join(f"{name} {readable(value)}" for name, value in result.settings.items())
    lines = [
        f"# {result.name}, {record['date']}",
        "",
        result.question,
        "",
        f"Bound: {result.bound}",
        "",
        f"    {command}",
        "",
        f"{record['processor']}, {record['cores']} cores, {record['torch_threads']} threads, {record['system']}, "
        f"load average {record['load_average_at_start'][0]}; {versions}. {settings}.",
    ]
    for table in result.tables:
        lines += ["", f"## {table.title}", "", _line(table.columns)]
        lines.append("|---|" + "---:|" * (len(table.columns) - 1))
        lines += [_line(list(map(readable, row))) for row in table.rows]
    if result.conclusion:
        lines += ["", result.conclusion]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    """A line of a Markdown table; a bar in a cell would end it."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
