"""A round of on-policy distillation against the same number of tokens of the teacher's text.

    prompts before the round ─▶ a student of some of the teacher's layers
    prompts of the round     ─▶ answers by the student, or by the teacher ─▶ targets by the teacher ─▶ the student after
    held-out prompts         ─▶ answers by each student, and by the teacher ─▶ KL

Every student is measured on the answers that it writes itself to held-out prompts, scored by the teacher: where a
student goes when it is used, and where its errors add up. Beside it stands the KL on the teacher's own answers.
`on_policy_tasks` has the tasks: word problems with a teacher trained on them, and the demo's teacher and questions.

    python -m benchmarks.on_policy             an hour on two quiet cores; resumes after every model and cache
    python -m benchmarks.on_policy --quick     a smoke test; the numbers mean nothing and are not recorded
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import click
from transformers.utils import logging

import cache_format as cf
import distill
from benchmarks import demo, measure
from benchmarks.files import write_json, write_json_lines
from benchmarks.on_policy_tasks import QUICK, TASKS, Task

BENCHMARKS = Path(__file__).parent
STUDENTS = BEFORE, OWN, TEACHERS, MIXED = "before the round", "the student's text", "the teacher's text", "half of each"


@click.command()
@click.option("--task", "tasks", multiple=True, type=click.Choice(list(TASKS)), help="Default: every task.")
@click.option("--work", default=BENCHMARKS / "work" / "on-policy", type=click.Path(path_type=Path))
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="Number of students.")
@click.option("--quick", is_flag=True, help="Use tiny sizes. The numbers mean nothing and are not recorded.")
@click.option("--results", default=BENCHMARKS / "results", type=click.Path(path_type=Path))
def on_policy(tasks: tuple[str, ...], work: Path, seeds: int, quick: bool, results: Path) -> None:
    """Train students on their own text and on the teacher's, and compare. Resumes after an interruption."""
    logging.disable_progress_bar()
    for name in tasks or TASKS:
        task = (QUICK if quick else TASKS)[name]
        result = run(task, work / ("quick" if quick else "full") / name, 1 if quick else seeds)
        measure.show(result)
        if not quick:
            measure.write(result, results, f"python -m benchmarks.on_policy --task {name} --seeds {seeds}")


def run(task: Task, work: Path, seeds: int) -> measure.Result:
    """Makes and measures what is missing; returns the table."""
    prompts = {name: write_json_lines(work / "data" / f"{name}.jsonl", rows) for name, rows in task.prompts().items()}
    shared = Shared(task, task.teacher(work), prompts, work / "caches")
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        place = work / f"seed-{seed}"
        files = {name: place / "runs" / f"{name}.json" for name in STUDENTS if name != MIXED or task.mixed}
        if not all(file.exists() for file in files.values()):
            compare(shared, place, files, seed)
            shutil.rmtree(place / "students")  # those of the demo have a gigabyte each, with checkpoints
        for name, file in files.items():
            runs.setdefault(name, []).append(json.loads(file.read_text()))
    return report(task, runs)


@dataclass(frozen=True)
class Shared:
    """What the students of all seeds have in common."""

    task: Task
    teacher: Path
    prompts: Mapping[str, Path]
    caches: Path

    def given(self) -> Path:
        """The cache that every student learns from before the round."""
        return self.cache("before", self.caches / "given", **self.task.given())

    def heldout(self) -> Path:
        """The teacher's answers to held-out prompts."""
        return self.cache("heldout", self.caches / "heldout", **self.task.writing_held_out(seed=1))

    def cache(self, prompts: str, output: Path, **options: Any) -> Path:
        """A finished cache is checked and left as it is."""
        say(f"caching {output}")
        options = {"seq_len": self.task.seq_len, "top_k": self.task.top_k, "device": "cpu", **options}
        distill.cache_teacher(self.teacher, self.prompts[prompts], output, **options)
        return output


def compare(shared: Shared, place: Path, files: Mapping[str, Path], seed: int) -> None:
    """Trains and measures the student before the round and those after it."""
    task, given, heldout = shared.task, shared.given(), shared.heldout()
    options = {"student_layers": task.student_layers, "epochs": task.before_epochs}
    before = train(place, BEFORE, [given], shared.teacher, seed, **options)
    answers = task.writing(seed=10 + seed)
    own = shared.cache("round", place / "caches/own", writer=before, **answers)
    teachers = shared.cache("round", place / "caches/teachers", **answers)
    budget = min(cf.open_cache(cache).num_loss_tokens for cache in (own, teachers))
    for name, caches in {BEFORE: [], OWN: [own], TEACHERS: [teachers], MIXED: [own, teachers]}.items():
        if name not in files or files[name].exists():
            continue
        student = before
        if caches:
            length = input_tokens(caches, round(budget * task.round_epochs))
            options = {"learning_rate": task.round_learning_rate, "max_tokens": length}
            student = train(place, name, caches, before, seed, **options)
        own_heldout = place / "caches" / f"heldout-{student.name}"
        shared.cache("heldout", own_heldout, writer=student, **task.writing_held_out(seed=2))
        write_json(files[name], {**measured(student, own_heldout, heldout), "loss tokens": budget})


def train(place: Path, name: str, caches: list[Path], start: Path, seed: int, **options: Any) -> Path:
    """Trained once, on as many loss tokens of each cache. Only the targets are learned: labels of a student's text are
    its own tokens."""
    student = place / "students" / name.replace(" ", "-").replace("'", "")
    if not (student / demo.FINISHED).exists():
        say(f"training {student}")
        options = {"kd_weight": 1.0, "learning_rate": 1e-3, "batch_size": 8, "seed": seed, **options}
        weighted = tuple(f"{cache}:1" for cache in caches)
        distill.train_student(weighted, start, student, **options, device="cpu", overwrite=True)
    return student


def input_tokens(caches: list[Path], loss_tokens: int) -> int:
    """Input tokens of a run that sees so many loss tokens, the same number of each cache."""
    opened = list(map(cf.open_cache, caches))
    return round(sum(loss_tokens / len(opened) * each.num_tokens / each.num_loss_tokens for each in opened))


def measured(student: Path, own: Path, teachers: Path) -> dict[str, float]:
    """KL to the teacher on the student's own answers to held-out prompts, and on the teacher's."""
    on_own, on_teachers = (distill.evaluate(cache, student, device="cpu") for cache in (own, teachers))
    generation = cf.open_cache(own).metadata.corpus["generation"]
    return {
        "own": on_own.kl,
        "teacher's": on_teachers.kl,
        "agreement": on_own.agreement,
        "ended": generation["stop_reasons"]["eos"] / generation["answers"],
    }


def report(task: Task, runs: Mapping[str, list[dict[str, float]]]) -> measure.Result:
    def cell(found: list[dict[str, float]], column: str) -> str:
        return measure.mean_and_range([one[column] for one in found])

    def share(found: list[dict[str, float]], column: str) -> str:
        return f"{100 * mean(one[column] for one in found):.1f}"

    rows = [
        [name, cell(found, "own"), cell(found, "teacher's"), share(found, "agreement"), share(found, "ended")]
        for name, found in runs.items()
    ]
    better = [on_teachers["own"] - on_own["own"] for on_own, on_teachers in zip(runs[OWN], runs[TEACHERS], strict=True)]
    return measure.Result(
        name=f"on_policy_{task.name}",
        question="A round of training on answers by the student or by the teacher; the same number of loss tokens, all "
        "with the teacher's targets.",
        bound="0: a student that predicts what the teacher predicts.",
        settings={
            "teacher_layers": task.teacher_layers,
            "student_layers": task.student_layers,
            "prompts_before_the_round": task.before,
            "prompts_in_the_round": task.round,
            "held_out_answers": task.held_out * task.held_out_answers,
            "loss_tokens_per_epoch": round(mean(one["loss tokens"] for one in runs[OWN])),
            "epochs": task.round_epochs,
            "learning_rate": task.round_learning_rate,
            "seeds": max(map(len, runs.values())),
        },
        tables=[
            measure.Table(
                "KL(teacher ‖ student) in nats per token on held-out prompts, mean over seeds ± half the range; in %: "
                "agreement on the student's own text, answers that it ends",
                ["", "KL, the student's own text", "KL, the teacher's text", "agreement", "ended"],
                rows,
            )
        ],
        summary={
            **{name: round(mean(one["own"] for one in found), 4) for name, found in runs.items()},
            "own text better by, smallest of the seeds": round(min(better), 4),
        },
    )


def say(text: str) -> None:
    click.secho(text, err=True)


if __name__ == "__main__":
    on_policy(prog_name="python -m benchmarks.on_policy")
