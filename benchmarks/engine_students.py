"""Students trained on the targets of either engine, transformers and vLLM: the same tokens, options and seeds.

    make demo ─▶ questions and the teacher's answers, as token ids ─▶ a cache by each engine ─▶ a student for every seed
              ─▶ held-out answers ─▶ KL, CE and agreement of every student

Two students with the same seed see the same rows in the same order, so they differ only by the engine that computed
their targets. The difference within such pairs stands beside the spread over seeds. Needs the results of `make demo`
and an environment with vLLM (`make test-vllm` makes one):

    .venv-vllm/bin/python -m benchmarks.engine_students    twenty minutes on two cores; resumes after every student
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import click
import numpy as np
from transformers.utils import logging

import cache_format as cf
import distill
from benchmarks import measure
from benchmarks.files import write_json, write_json_lines

BENCHMARKS = Path(__file__).parent
ENGINES = ("transformers", "vllm")
FINISHED = "trainer_state.json"  # the last file that training writes
STUDENT_LAYERS = 12
TRAINING = {"batch_size": 8, "learning_rate": 1e-3}
METRICS = {"KL": ("kl", 1, 4), "CE": ("ce", 1, 4), "agreement, %": ("agreement", 100, 2)}  # field, factor, digits
DIFFERENCE = "vllm − transformers"

Runs = dict[str, list[dict[str, float]]]


@click.command()
@click.option("--demo", default=Path("demo-output"), type=click.Path(path_type=Path), help="Output of make demo.")
@click.option("--work", default=BENCHMARKS / "work/engine-students", type=click.Path(path_type=Path))
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="Number of students per engine.")
@click.option("--results", default=BENCHMARKS / "results", type=click.Path(path_type=Path))
def engine_students(demo: Path, work: Path, seeds: int, results: Path) -> None:
    """Train students on the targets of both engines and compare. Resumes after an interruption."""
    logging.disable_progress_bar()
    result = run(demo, work, seeds)
    measure.show(result)
    measure.write(result, results, f"python -m benchmarks.engine_students --seeds {seeds}")


def run(demo: Path, work: Path, seeds: int, layers: int = STUDENT_LAYERS) -> measure.Result:
    """Makes and measures what is missing; returns the tables."""
    teacher, held_out = demo / "teacher", demo / "caches/heldout"
    text = write_tokens(demo / "caches/train", work / "train.jsonl")
    caches = {}
    for engine in ENGINES:
        say(f"caching the text by {engine}")
        caches[engine] = work / "caches" / engine
        distill.cache_teacher(teacher, text, caches[engine], engine=engine, packing=False, dtype="float32")
    runs: Runs = {engine: [] for engine in ENGINES}
    for seed in range(seeds):
        for engine, cache in caches.items():
            student = trained(cache, teacher, work / "students" / f"{engine}-{seed}", seed, layers)
            runs[engine].append(measured(student, held_out))
    return report(runs, caches, cf.open_cache(held_out).num_loss_tokens, layers)


def write_tokens(cache: Path, file: Path) -> Path:
    """The rows of a cache as token ids, with the tokens that are in the loss."""
    rows = []
    for row in cf.open_cache(cache).iter_rows():
        in_loss = [0, *row.loss_mask[:-1].astype(int).tolist()]  # the mask of a row is that of the next token
        rows.append({"input_ids": row.input_ids.tolist(), "loss_mask": in_loss})
    return write_json_lines(file, rows)


def trained(cache: Path, teacher: Path, student: Path, seed: int, layers: int) -> Path:
    """A student of some of the teacher's layers, trained once."""
    if not (student / FINISHED).exists():
        say(f"training {student.name}")
        options = {**TRAINING, "student_layers": layers, "seed": seed, "device": "cpu", "overwrite": True}
        distill.train_student(cache, teacher, student, **options)
    return student


def measured(student: Path, held_out: Path) -> dict[str, float]:
    file = student.with_suffix(".json")
    if not file.exists():
        say(f"evaluating {student.name}")
        found = distill.evaluate(held_out, student, device="cpu")
        write_json(file, {field: getattr(found, field) for field, _, _ in METRICS.values()})
    return dict(json.loads(file.read_text(encoding="utf-8")))


def report(runs: Runs, caches: dict[str, Path], held_out_tokens: int, layers: int) -> measure.Result:
    first, second = (runs[engine] for engine in ENGINES)
    differences = [{name: two[name] - one[name] for name in one} for one, two in zip(first, second, strict=True)]
    rows = [
        [name, *(cell(found, *metric) for metric in METRICS.values()), ", ".join(f"{one['kl']:.4f}" for one in found)]
        for name, found in {**runs, DIFFERENCE: differences}.items()
    ]
    kls = [one["kl"] for one in first]
    same = same_targets(*(caches[engine] for engine in ENGINES))
    return measure.Result(
        name="engine_students",
        question="Students trained on the targets that transformers and vLLM compute for the same tokens; the demo's "
        "held-out answers.",
        bound="a difference of 0 within every seed: the targets are the same but for rounding.",
        settings={
            "student_layers": layers,
            "rows": cf.open_cache(caches[ENGINES[0]]).num_rows,
            "held_out_loss_tokens": held_out_tokens,
            **TRAINING,
            "seeds": len(first),
        },
        tables=[
            measure.Table(
                "Held-out answers, mean over seeds ± half the range; differences are within seeds",
                ["targets by", *METRICS, "KL of each seed"],
                rows,
            ),
            measure.Table("Targets of both caches", ["positions", "the same tokens", "and values"], [same]),
        ],
        summary={
            **{f"KL, {engine}": round(mean(one["kl"] for one in found), 4) for engine, found in runs.items()},
            "largest difference of KL within a seed": round(max(abs(one["kl"]) for one in differences), 4),
            "range of KL over seeds": round(max(kls) - min(kls), 4),
        },
    )


def cell(found: list[dict[str, float]], field: str, factor: int, digits: int) -> str:
    return measure.mean_and_range([factor * one[field] for one in found], digits)


def same_targets(one: Path, other: Path) -> list[measure.Value]:
    """Positions with targets, and the shares of them with the same tokens and with the same stored values too."""
    positions = tokens = values = 0
    for row, twin in zip(cf.open_cache(one).iter_rows(), cf.open_cache(other).iter_rows(), strict=True):
        for t in np.flatnonzero(row.loss_mask):
            (ids, logprobs), (twin_ids, twin_logprobs) = row.targets.at(t), twin.targets.at(t)
            equal = np.array_equal(ids, twin_ids)
            positions += 1
            tokens += equal
            values += equal and np.array_equal(logprobs, twin_logprobs)
    return [positions, f"{tokens / positions:.2%}", f"{values / positions:.2%}"]


def say(text: str) -> None:
    click.secho(text, err=True)


if __name__ == "__main__":
    engine_students(prog_name="python -m benchmarks.engine_students")
