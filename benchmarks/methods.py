"""Distillation methods side by side: SmolLM2, the teacher of the demo, and word problems with worked answers.

    worked answers, one cache          hard labels, forward KL, reverse KL, Jensen–Shannon, logit MSE,
                                       forward KL + hidden states
    the teacher's answers, one cache   sequence level, sequence level + forward KL

All students start from the same layers of the teacher and train with the same options on the same number of loss
tokens. They are compared with the teacher on held-out text of both kinds, because a student does better on the kind
that it has seen, and on problems whose final number is known: solved from the question alone, and with the worked steps
given, which needs reading instead of calculating and so separates weak students.

    python -m benchmarks.methods        an hour on two cores; resumes after every finished student
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import click
from transformers.utils import logging

import cache_format as cf
from benchmarks import demo, measure
from benchmarks.files import write_json
from benchmarks.greedy import Answering
from benchmarks.reasoning import last_number

BENCHMARKS = Path(__file__).parent
TARGETS = ["--seq-len", "512", "--top-k", "64"]
WRITING = ["--generate", "--gen-temperature", "0.7", "--batch-size", "64"]
TRAIN = ["--batch-size", "2", "--learning-rate", "1e-3", "--logging-steps", "5"]
TRAIN_SEED, HELD_OUT_SEED, PROBLEMS_SEED = 1, 2, 3
SUFFIX = " Give the result as your final answer"
MARK = "#### "  # before the number, at the end of a worked answer


@dataclass(frozen=True)
class Method:
    name: str
    cache: str
    options: tuple[str, ...]


METHODS = (
    Method("hard labels", "train", ("--kd-weight", "0")),
    Method("forward KL", "train", ()),
    Method("reverse KL", "train", ("--divergence", "reverse-kl")),
    Method("Jensen–Shannon", "train", ("--divergence", "js(0.5)")),
    Method("logit MSE", "train", ("--divergence", "logit-mse")),
    Method("forward KL + hidden states", "train", ("--hidden-loss", "normalized-mse")),
    Method("sequence level", "own", ("--kd-weight", "0")),
    Method("sequence level + forward KL", "own", ()),
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    train: int = 256
    held_out: int = 32
    solve: int = 64  # problems to solve
    written_tokens: int = 256  # maximum per answer of the teacher
    new_tokens: int = 200  # per answer of a student
    layers: int = 6
    teacher_layers: str = "5,10,15,20,25,30"  # for hidden-state distillation, one per layer of the student


@click.command()
@click.option("--work", default=BENCHMARKS / "work" / "methods", type=click.Path(path_type=Path))
@click.option("--teacher", type=click.Path(path_type=Path), help="transformers directory. Default: SmolLM2, unpacked.")
@click.option("--seeds", default=2, show_default=True, type=click.IntRange(1), help="Number of students per method.")
@click.option("--results", default=BENCHMARKS / "results", type=click.Path(path_type=Path))
def methods(work: Path, teacher: Path | None, seeds: int, results: Path) -> None:
    """Train a student with every method and compare them. Resumes after an interruption."""
    logging.disable_progress_bar()
    if teacher is None:
        teacher = demo.unpacked_teacher(work)
    result = run(teacher, work, seeds, Sizes())
    measure.show(result)
    measure.write(result, results, f"python -m benchmarks.methods --seeds {seeds}")


def run(teacher: Path, work: Path, seeds: int, sizes: Sizes) -> measure.Result:
    """Trains and measures what is missing; returns the tables."""
    caches = make_caches(teacher, work, sizes)
    opened = {name: cf.open_cache(path, hidden_layers=[]) for name, path in caches.items()}
    budget = min(opened[name].num_loss_tokens for name in ("train", "own"))
    runs: dict[str, list[dict[str, float]]] = {
        "the teacher": [once(work / "teacher.json", teacher, caches, work, sizes)]
    }
    for seed in range(seeds):
        for method in METHODS:
            name = f"{method.name.replace(' ', '-')}-{seed}"
            student, file = work / "students" / name, work / "runs" / f"{name}.json"
            if not file.exists():
                cache = opened[method.cache]
                tokens = round(budget * cache.num_tokens / cache.num_loss_tokens)  # prompts included
                demo.distill(
                    *("train-student", "--cache", cache.path, "--output", student, "--overwrite"),
                    *("--student", teacher, "--student-layers", sizes.layers),
                    *(*TRAIN, "--max-tokens", tokens, "--seed", seed, *method.options),
                )
            found = once(file, student, caches, work, sizes)
            shutil.rmtree(student, ignore_errors=True)  # 200 MB each
            runs.setdefault(method.name, []).append(found)
    return report(runs, sizes, budget)


def make_caches(teacher: Path, work: Path, sizes: Sizes) -> dict[str, Path]:
    """Caches of worked answers and of the teacher's answers, for training and held out."""
    write_problems(work / "train.jsonl", sizes.train, TRAIN_SEED)
    write_problems(work / "heldout.jsonl", sizes.held_out, HELD_OUT_SEED)
    states = ["--hidden-states", sizes.teacher_layers, "--hidden-dtype", "int8"]
    writing = [*WRITING, "--gen-max-new-tokens", sizes.written_tokens]
    wanted: dict[str, tuple[str, Sequence[object]]] = {
        "train": ("train", states),
        "heldout": ("heldout", []),
        "own": ("train", writing),
        "own-heldout": ("heldout", writing),
    }
    for name, (text, options) in wanted.items():
        demo.distill(  # a finished cache is checked and left as it is
            *("cache-teacher", "--teacher", teacher, "--data", work / f"{text}.jsonl"),
            *("--output", work / "caches" / name, *TARGETS, *options),
        )
    return {name: work / "caches" / name for name in wanted}


def once(file: Path, student: Path, caches: dict[str, Path], work: Path, sizes: Sizes) -> dict[str, float]:
    """The result of `measured`, from its file if there is one."""
    if not file.exists():
        write_json(file, measured(student, caches, work, sizes))
    return json.loads(file.read_text())


def measured(student: Path, caches: dict[str, Path], work: Path, sizes: Sizes) -> dict[str, float]:
    """Divergence from the teacher on both held-out caches, and shares of problems solved."""
    found = {}
    for name in ("heldout", "own-heldout"):
        file = work / "evaluation.json"
        demo.distill("evaluate", "--cache", caches[name], "--student", student, "--json", file)
        (values,) = json.loads(file.read_text())["students"].values()
        found |= {f"{name} {key}": values[key] for key in ("kl", "perplexity", "agreement")}
    model = Answering(student)
    write_problems(work / "solve.jsonl", sizes.solve, PROBLEMS_SEED)
    problems = [json.loads(line) for line in (work / "solve.jsonl").read_text(encoding="utf-8").splitlines()]
    solutions = [float(problem["solution"]) for problem in problems]
    asked = [model.prompt(problem["messages"][:1]) for problem in problems]
    steps = [problem["messages"][1]["content"].rpartition(MARK)[0] + MARK.rstrip() for problem in problems]
    given = [question + step for question, step in zip(asked, steps, strict=True)]
    for name, prompts, length in (("solved", asked, sizes.new_tokens), ("number given the steps", given, 8)):
        answers = model.continued(prompts, length)
        pick = last_number if name == "solved" else first_number
        found[name] = mean(pick(answer) == right for answer, right in zip(answers, solutions, strict=True))
    return found


def first_number(text: str) -> float | None:
    return last_number(text.strip().partition("\n")[0].partition(" ")[0])


def write_problems(file: Path, size: int, seed: int) -> None:
    """Writes word problems with worked answers as chat messages, and their solutions."""
    import reasoning_gym

    with file.open("w", encoding="utf-8") as stream:
        for problem in reasoning_gym.create_dataset("gsm_symbolic", size=size, seed=seed):
            question = problem["question"].partition(SUFFIX)[0]
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": problem["metadata"]["answer_cot"]},
            ]
            line = {"messages": messages, "solution": problem["answer"]}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def report(runs: dict[str, list[dict[str, float]]], sizes: Sizes, budget: int) -> measure.Result:
    columns = {
        "KL": "heldout kl",
        "perplexity": "heldout perplexity",
        "agreement": "heldout agreement",
        "KL, teacher's answers": "own-heldout kl",
        "agreement, teacher's answers": "own-heldout agreement",
        "final number right, steps given": "number given the steps",
        "problems solved": "solved",
    }
    shares = set(columns) - {name for name in columns if name.startswith(("KL", "perplexity"))}

    def cell(found: list[dict[str, float]], column: str) -> str:
        values = [one[columns[column]] * (100 if column in shares else 1) for one in found]
        if not column.startswith("KL"):
            return f"{mean(values):.1f}"
        return measure.mean_and_range(values) if len(values) > 1 else f"{mean(values):.3f}"

    rows = [[name, *(cell(found, column) for column in columns)] for name, found in runs.items()]
    seeds = max(map(len, runs.values()))
    return measure.Result(
        name="methods",
        question="Students with the same layers, options and number of loss tokens, by method; held-out text.",
        bound="the teacher's own row: KL 0 up to rounding and the tail outside its cache's entries.",
        settings={
            "training_problems": sizes.train,
            "loss_tokens": budget,
            "held_out_problems": sizes.held_out,
            "problems_to_solve": sizes.solve,
            "student_layers": sizes.layers,
            "seeds": seeds,
        },
        tables=[
            measure.Table(
                "Mean over seeds ± half the range; agreement, final number and problems solved in %",
                ["", *columns],
                rows,
            )
        ],
        summary={name: round(mean(one["heldout kl"] for one in found), 4) for name, found in runs.items()},
    )


if __name__ == "__main__":
    methods(prog_name="python -m benchmarks.methods")
