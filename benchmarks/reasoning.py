"""`make demo-generate`: a student learns to calculate from the right answers of its teacher.

    reasoning-gym ─▶ sums ─▶ SmolLM2, shown examples, answers each twice ─▶ answers that end with the right number
                  ─▶ students: from the solutions alone, from the right answers, from these and their distributions

The teacher reads examples of worked sums before each question; the students never see them. All students start from the
same layers of the teacher and train for the same number of steps. Each is asked held-out sums, with greedy decoding.

`is_right` is the predicate: a worked example of `cache-teacher --generate --gen-keep-if benchmarks.reasoning:is_right`.

    python -m benchmarks.reasoning --output demo-output      resumes after every finished student
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import click

from benchmarks.files import write_json_lines

if TYPE_CHECKING:
    from benchmarks import measure

NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
QUESTION = "Calculate {}."
EXAMPLES = (  # what the teacher reads first
    ("3 + 8 + 6", "3 + 8 = 11 and 11 + 6 = 17. The answer is 17."),
    ("9 + 2 + 4", "9 + 2 = 11 and 11 + 4 = 15. The answer is 15."),
    ("5 + 0 + 7", "5 + 0 = 5 and 5 + 7 = 12. The answer is 12."),
    ("6 + 9 + 8", "6 + 9 = 15 and 15 + 8 = 23. The answer is 23."),
    ("10 + 10 + 4", "10 + 10 = 20 and 20 + 4 = 24. The answer is 24."),
    ("7 + 4 + 9", "7 + 4 = 11 and 11 + 9 = 20. The answer is 20."),
)
KEEP_IF = f"{__file__}:is_right"
GENERATE = ["--gen-temperature", "0.5", "--batch-size", "64"]
TRAIN = ["--batch-size", "8", "--learning-rate", "5e-4", "--logging-steps", "10"]
METHODS = {  # cache, --kd-weight
    "the solutions": ("solutions", "0"),
    "right answers": ("answers", "0"),
    "right answers and their distributions": ("answers", "0.9"),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    train: int = 240  # sums
    held_out: int = 150
    answers: int = 2  # to each, by the teacher
    new_tokens: int = 32  # per answer
    layers: int = 24
    steps: int = 60


def is_right(example: dict[str, Any], answer: Any) -> bool:
    """Whether the last number of an answer is the solution."""
    return last_number(answer.text) == float(example["solution"])


def last_number(text: str) -> float | None:
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def sums(size: int, seed: int = 1) -> list[tuple[str, str]]:
    """Different sums of three numbers up to ten, with their solutions. Those of the examples are not among them."""
    import reasoning_gym

    problems = reasoning_gym.create_dataset(
        "basic_arithmetic",
        **{"size": 10 * size, "seed": seed, "min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
        **{"operators": ["+"], "allow_parentheses": False},
    )
    found = {problem["metadata"]["expression"]: problem["answer"] for problem in problems}
    shown = [expression for expression, _ in EXAMPLES]
    return [(expression, answer) for expression, answer in found.items() if expression not in shown][:size]


def asked(expression: str, *, with_examples: bool = False) -> list[dict[str, str]]:
    """A chat that ends with the question."""
    messages = []
    for example, answer in EXAMPLES if with_examples else ():
        messages += [message("user", QUESTION.format(example)), message("assistant", answer)]
    return [*messages, message("user", QUESTION.format(expression))]


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write_data(folder: Path, problems: Sequence[tuple[str, str]]) -> None:
    """Writes the sums with their solutions as answers, and for the teacher to answer."""
    rows: dict[str, list[dict[str, Any]]] = {"solutions": [], "answers": []}
    for expression, solution in problems:
        question = asked(expression)
        rows["solutions"].append({"messages": [*question, message("assistant", solution)]})
        rows["answers"].append(
            {
                "messages": question,
                "teacher_messages": asked(expression, with_examples=True),
                "solution": solution,
            }
        )
    for name, lines in rows.items():
        write_json_lines(folder / f"{name}.jsonl", lines)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Directory for all results.")
@click.option("--teacher", type=click.Path(path_type=Path), help="transformers directory. Default: SmolLM2, unpacked.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="Number of students of each kind.")
@click.option("--results", type=click.Path(path_type=Path), help="Directory for reasoning.json and reasoning.md.")
def reasoning(output: Path, teacher: Path | None, seeds: int, results: Path | None) -> None:
    """Train students on the right answers of a teacher, and count the sums that they solve."""
    from benchmarks import measure
    from benchmarks.demo import unpacked_teacher

    output.mkdir(parents=True, exist_ok=True)
    result = run(unpacked_teacher(output) if teacher is None else teacher, output / "reasoning", seeds, Sizes())
    measure.show(result)
    if results is not None:
        measure.write(result, results, f"python -m benchmarks.reasoning --seeds {seeds}")


def run(teacher: Path, work: Path, seeds: int, sizes: Sizes) -> measure.Result:
    """Trains and measures what is missing; returns the table."""
    from benchmarks import demo

    problems = sums(sizes.train + sizes.held_out)
    held_out = problems[sizes.train :]
    write_data(work, problems[: sizes.train])
    generate = ["--generate", *GENERATE, "--gen-answers-per-prompt", sizes.answers]
    generate += ["--gen-max-new-tokens", sizes.new_tokens, "--gen-keep-if", KEEP_IF]
    for name, options in (("solutions", ["--no-packing"]), ("answers", generate)):
        demo.distill(  # a finished cache is checked and left as it is
            *("cache-teacher", "--teacher", teacher, "--data", work / f"{name}.jsonl"),
            *("--output", work / "caches" / name, *options),
        )
    demo.distill("inspect", work / "caches" / "answers", "--start", "36", "--positions", "20")
    untrained = work / "students" / "untrained"
    if not untrained.exists():
        demo.write_untrained(teacher, untrained, sizes.layers)
    found = {
        "the teacher, shown examples": [solved(work, "teacher-examples", teacher, held_out, sizes, with_examples=True)],
        "the teacher": [solved(work, "teacher", teacher, held_out, sizes)],
        "the student before": [solved(work, "untrained", untrained, held_out, sizes)],
    }
    for seed in range(seeds):
        for method, (cache, kd_weight) in METHODS.items():
            name = f"{method.replace(' ', '-')}-{seed}"
            student, share = work / "students" / name, work / "runs" / f"{name}.json"
            if not share.exists():
                demo.distill(
                    *("train-student", "--cache", work / "caches" / cache, "--output", student, "--overwrite"),
                    *("--student", teacher, "--student-layers", sizes.layers, "--kd-weight", kd_weight),
                    *(*TRAIN, "--max-steps", sizes.steps, "--seed", seed),
                )
            found.setdefault(method, []).append(solved(work, name, student, held_out, sizes))
            if seed:
                shutil.rmtree(student, ignore_errors=True)  # 400 MB each
    return report(found, sizes)


def solved(
    work: Path,
    name: str,
    model: Path,
    problems: Sequence[tuple[str, str]],
    sizes: Sizes,
    *,
    with_examples: bool = False,
) -> float:
    """Share of the problems that a model solves with greedy decoding; from its file if there is one."""
    from benchmarks.files import write_json
    from benchmarks.greedy import Answering

    file = work / "runs" / f"{name}.json"
    if not file.exists():
        chats = [asked(expression, with_examples=with_examples) for expression, _ in problems]
        answers = Answering(model).answers(chats, sizes.new_tokens)
        right = [
            last_number(answer) == float(solution) for answer, (_, solution) in zip(answers, problems, strict=True)
        ]
        write_json(file, {"solved": mean(right), "answers": answers[:3]})
    share: float = json.loads(file.read_text(encoding="utf-8"))["solved"]
    return share


def report(found: Mapping[str, Sequence[float]], sizes: Sizes) -> measure.Result:
    from benchmarks import measure

    rows = [
        [name, 100 * median(shares), ", ".join(f"{share:.1%}" for share in shares)] for name, shares in found.items()
    ]
    return measure.Result(
        name="reasoning",
        question="Held-out sums of three numbers that are solved with greedy decoding, by what a student learned from.",
        bound="100 %; the teacher itself, which reads worked examples before the question, is not a bound.",
        settings={
            "training_sums": sizes.train,
            "answers_per_sum": sizes.answers,
            "held_out_sums": sizes.held_out,
            "student_layers": sizes.layers,
            "steps": sizes.steps,
            "seeds": max(map(len, found.values())),
        },
        tables=[measure.Table("Median over seeds, %", ["", "solved", "each seed"], rows)],
        summary={row[0]: row[1] for row in rows},
    )


if __name__ == "__main__":
    reasoning(prog_name="python -m benchmarks.reasoning")
