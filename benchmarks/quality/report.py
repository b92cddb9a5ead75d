"""Finished runs ─▶ tables: means and spread over seeds, and the share of the full distribution's gain that is kept.

    share of the gain = (x_labels − x_arm) / (x_labels − x_full)        x: held-out CE, or KL to the teacher

The share is computed per seed, since the runs of a seed share initial weights and order; then mean and standard
deviation. Arms are compared with labels and full of the same regime: epochs, rows per step, and text.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.quality import plot
from benchmarks.quality.line import Line
from benchmarks.quality.runs import Run, chosen_rate, finished
from benchmarks.quality.tracks import Arm, Track, planned
from benchmarks.quality.train import FINAL_RATE, WARM_UP

Plan = tuple[Track, Sequence[Arm], Sequence[int], Path]  # track, arms, seeds, directory
KEPT = (0.95, 0.97)
COMMAND = "python -m benchmarks.quality"


@dataclass(frozen=True)
class Report:
    result: measure.Result
    lines: Mapping[str, Sequence[Line]]  # by track


def build(plans: Sequence[Plan]) -> Report:
    """Tables of the finished runs."""
    tables, lines, summary, settings, records = [], {}, {}, {}, []
    for track, arms, seeds, directory in plans:
        facts_file = directory / "prepared.json"
        if not facts_file.exists():
            continue
        facts = json.loads(facts_file.read_text())
        here = lines[track.name] = arm_lines(arms, list(finished(directory, track, arms, seeds)))
        done, wanted = sum(len(line.runs) for line in here), len(planned(arms, seeds))
        title = f"Track {track.number}"
        unseen = [row["domain"] for row in facts["domains"] if not row["training tokens"]]
        tables += [
            held_out_table(f"{title}: held-out text of the training domains", here, "in-domain", facts),
            *(held_out_table(f"{title}: {name}, not a training domain", here, name, facts) for name in unseen),
            gradient_table(f"{title}: gradient compared with that of the full distribution", here),
            domain_table(f"{title}: text", facts["domains"]),
        ]
        if rows := search_rows(directory):
            tables.append(measure.Table(f"{title}: search for the learning rate", *rows))
        name = track.name
        settings |= {f"{name} runs": f"{done} of {wanted}", f"{name} student": facts["student"]}
        settings |= {f"{name} teacher": facts["teacher"], f"{name} training tokens": facts["training_tokens"]}
        settings |= {f"{name} learning rate": chosen_rate(directory, track, facts["digest"]) or "not chosen yet"}
        settings |= {f"{name} rows": f"{track.window} tokens per row, {track.batch_rows} rows per step"}
        summary |= {f"{name}_runs": done, f"{name}_runs_wanted": wanted, **choices(name, here)}
        records += [run["machine"] for line in here for run in line.runs.values()]
    settings["schedule"] = (
        f"AdamW, {WARM_UP:.0%} warm-up, cosine to {FINAL_RATE:.0%}, gradients clipped at norm 1; "
        "kd_weight 1 in every arm but labels (0)"
    )
    result = measure.Result(
        name="quality",
        question="How much students learn from sparse targets, compared with the full distribution.",
        bound="100 % of the gain, the result of the full distribution (the teacher online).",
        settings=settings,
        tables=tables,
        summary=summary,
        conclusion=_conclusion(summary),
        record=records[0] if records else measure.machine(),
    )
    return Report(result, lines)


def arm_lines(arms: Sequence[Arm], runs: Sequence[Run]) -> list[Line]:
    by_arm = {arm.name: {run["seed"]: run for run in runs if run["arm"] == arm.name} for arm in arms}

    def reference(source: str, regime: object) -> Mapping[int, Run]:
        names = [arm.name for arm in arms if arm.source == source and arm.regime == regime]
        return by_arm[names[0]] if names else {}

    lines = [
        Line(arm, by_arm[arm.name], (reference("labels", arm.regime), reference("full", arm.regime))) for arm in arms
    ]
    return [line for line in lines if line.runs]


def held_out_table(title: str, lines: Sequence[Line], domain: str, facts: Mapping[str, Any]) -> measure.Table:
    columns = ["arm", "bytes/token", "entries", "seeds", "CE", "KL", "gain kept, CE %", "gain kept, KL %"]
    columns += ["KL − full", "agreement %", "calibration error %", "acceptance %"]
    rows: list[list[measure.Value]] = []
    for line in lines:
        cache = line.cache
        rows.append(
            [
                line.arm.title,
                f"{cache['bytes_per_token']:.1f}" if cache else "–",
                f"{cache['entries_per_token']:.1f}" if cache else "–",
                len(line.runs),
                spread(line.values(domain, "ce"), 4),
                spread(line.values(domain, "kl"), 4),
                spread(line.shares(domain, "ce"), 1, 100),
                spread(line.shares(domain, "kl"), 1, 100),
                spread(line.differences(domain, "kl"), 4),
                *(spread(line.values(domain, metric), 2, 100) for metric in ("agreement", "ece", "acceptance")),
            ]
        )
    teacher = facts["teacher_held_out"][domain]
    last = ["the teacher", "–", "–", "–", f"{teacher['ce']:.4f}", "0", "–", "–", "–", "100"]
    rows.append([*last, f"{100 * teacher['ece']:.2f}", "100"])
    return measure.Table(title, columns, rows)


def gradient_table(title: str, lines: Sequence[Line]) -> measure.Table:
    """Gradients of two students, untrained and trained on the full distribution, with the factor 1 or Σw on lse."""
    columns = ["arm", "start: angle °", "start: norm ratio", "end: angle °", "end: norm ratio"]
    columns += ["start, Σw: angle °", "end, Σw: angle °"]
    rows: list[list[measure.Value]] = []
    for line in lines:
        if not line.arm.is_usual or line.arm.source == "full":
            continue
        cells = [line.gradient(point, "loss", value) for point in ("start", "end") for value in ("angle", "norm_ratio")]
        cells += [line.gradient(point, "shift_invariant", "angle") for point in ("start", "end")]
        rows.append([line.arm.title, *(spread(cell, 2) for cell in cells)])
    return measure.Table(title, columns, rows)


def domain_table(title: str, rows: Sequence[Mapping[str, measure.Value]]) -> measure.Table:
    return measure.Table(title, list(rows[0]), [list(row.values()) for row in rows])


def search_rows(directory: Path) -> tuple[list[str], list[list[measure.Value]]] | None:
    found = [json.loads(file.read_text()) for file in sorted((directory / "search").glob("*.json"))]
    rows: list[list[measure.Value]] = [
        [run["arm"], run["learning_rate"], f"{run['held_out']['in-domain']['ce']:.4f}"]
        + [f"{run['held_out']['in-domain']['kl']:.4f}"]
        for run in sorted(found, key=lambda run: (run["arm"], run["learning_rate"]))
    ]
    return (["arm", "learning rate", "held-out CE", "held-out KL"], rows) if rows else None


def choices(track: str, lines: Sequence[Line]) -> dict[str, measure.Value]:
    """The smallest cache that keeps each share of the gain, on average over seeds."""
    caches = [(line, line.cache["bytes_per_token"]) for line in lines if line.cache and line.arm.is_usual]
    found: dict[str, measure.Value] = {}
    for metric in ("ce", "kl"):
        for kept in KEPT:

            def keeps(line: Line, metric: str = metric, kept: float = kept) -> bool:
                shares = line.shares("in-domain", metric)
                return bool(shares) and statistics.mean(shares) >= kept

            smallest = min((c for c in caches if keeps(c[0])), key=lambda c: c[1], default=None)
            name = f"{track}_smallest_keeping_{kept:.0%}_of_{metric}_gain"
            found[name] = "none" if smallest is None else f"{smallest[0].arm.title} ({smallest[1]:.1f} bytes/token)"
    return found


def spread(values: Sequence[float], digits: int, factor: float = 1.0) -> str:
    """Mean ± standard deviation over seeds."""
    if not values:
        return "–"
    mean = f"{factor * statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {factor * statistics.stdev(values):.{digits}f}"


def write(report: Report, directory: Path, draw: Callable[..., bool] = plot.draw) -> None:
    """Writes quality.json and quality.md with the tables, quality.jsonl with one run per line, and quality.svg."""
    measure.write(report.result, directory, COMMAND)
    runs = [run for lines in report.lines.values() for line in lines for run in line.runs.values()]
    with (directory / "quality.jsonl").open("w", encoding="utf-8") as stream:
        for run in runs:
            facts = {name: value for name, value in run.items() if name != "machine"}
            stream.write(json.dumps(facts, ensure_ascii=False) + "\n")
    if draw(report.lines, directory / "quality.svg"):
        with (directory / "quality.md").open("a", encoding="utf-8") as stream:
            stream.write("\n![share of the gain against bytes per token](quality.svg)\n")


def _conclusion(summary: Mapping[str, measure.Value]) -> str:
    parts = [f"{name.replace('_', ' ')}: {value}" for name, value in summary.items() if "smallest" in name]
    return "; ".join(parts) + "." if parts else "No runs yet."
