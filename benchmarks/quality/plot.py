"""Plot of quality against bytes: the share of the gain from labels to the full distribution that each cache keeps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from benchmarks.quality.line import Line

LOWEST = -20  # percent; values below are listed in the legend instead of drawn
STYLES = {  # marker and colour, the same in both panels
    ("threshold", "sampled"): ("o", "tab:purple"),
    ("random", "sampled"): ("o", "tab:red"),
    ("top-k", "label"): ("D", "tab:green"),
    ("top-k", "bucket"): ("s", "tab:orange"),
    ("top-k", "renormalise"): ("^", "tab:blue"),
}


def draw(lines: Mapping[str, Sequence[Line]], file: Path) -> bool:
    """Draws one panel per track. Returns False without matplotlib (with a message) or without data."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        click.echo("quality.svg: not drawn: matplotlib is not installed.", err=True)
        return False
    panels = {}
    for track, here in lines.items():
        points = [line for line in here if line.cache and line.arm.is_usual and line.shares("in-domain", "kl")]
        if points:
            panels[track] = points
    if not panels:
        return False
    figure = Figure(figsize=(6.5 * len(panels), 5), layout="constrained")
    for axes, (track, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        groups: dict[tuple[str, str], list[tuple[float, float, float, str]]] = {}
        for line in points:
            assert line.arm.rule is not None and line.arm.tail is not None and line.cache is not None
            shares = [100 * share for share in line.shares("in-domain", "kl")]
            deviation = statistics.stdev(shares) if len(shares) > 1 else 0.0
            point = (line.cache["bytes_per_token"], statistics.mean(shares), deviation, line.arm.title)
            groups.setdefault((line.arm.rule.kind, line.arm.tail), []).append(point)
        for (kind, tail), group in groups.items():
            name = kind if tail == "sampled" else f"{kind}, {tail}"
            below = [f"{_short(title)} {value:.0f} %" for _, value, _, title in sorted(group) if value < LOWEST]
            name += f" (not drawn: {', '.join(below)})" if below else ""
            drawn = sorted(point for point in group if point[1] >= LOWEST)
            x, y, error, titles = zip(*drawn, strict=True) if drawn else ((), (), (), ())
            marker, color = STYLES[kind, tail]
            axes.errorbar(x, y, yerr=error, marker=marker, color=color, capsize=2, linewidth=1, label=name)
            above = -11 if kind == "random" else 5  # below the points, clear of the labels of threshold
            for at, height, title in zip(x, y, titles, strict=True):
                axes.annotate(_short(title), (at, height), textcoords="offset points", xytext=(4, above), fontsize=7)
        axes.axhline(100, color="gray", linewidth=0.8)
        axes.axhline(0, color="gray", linewidth=0.8)
        axes.set(xscale="log", xlabel="bytes per token on disk, every column", title=f"Track {track[-1]}")
        axes.set_ylabel("gain from labels to full distribution kept, held-out KL, %")
        axes.set(xlim=(5, 140), ylim=(LOWEST - 5, 125))
        axes.set_xticks([5, 10, 20, 50, 100], labels=["5", "10", "20", "50", "100"])
        axes.minorticks_off()
        axes.legend(fontsize=8, loc="lower left")
    figure.savefig(file, metadata={"Date": None})
    return True


def _short(title: str) -> str:
    """threshold 1/20 → 1/20, random 13 draws → 13, bucket top-50 → top-50"""
    return title.split()[1] if title.startswith("random") else title.rpartition(" ")[2]
