"""`make demo-generate`: a real teacher answers problems with known solutions, and only right answers are cached.

    reasoning-gym ─▶ sums and solutions ─▶ SmolLM2 answers each four times ─▶ answers that end with the right number

`is_right` is the predicate: a worked example of `cache-teacher --generate --gen-keep-if benchmarks.reasoning:is_right`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

PROBLEMS, SEED, ANSWERS = 48, 1, 4
GENERATE = ["--gen-temperature", "0.7", "--gen-max-new-tokens", "48", "--batch-size", "32"]
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def is_right(example: dict[str, Any], answer: Any) -> bool:
    """Whether the last number of an answer is the solution."""
    return last_number(answer.text) == float(example["solution"])


def last_number(text: str) -> float | None:
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def write_problems(file: Path, size: int = PROBLEMS, seed: int = SEED) -> None:
    """Sums of two numbers of up to two digits, as chat messages, with their solutions."""
    import reasoning_gym

    problems = reasoning_gym.create_dataset(
        "chain_sum", size=size, seed=seed, min_terms=2, max_terms=2, min_digits=1, max_digits=2
    )
    with file.open("w", encoding="utf-8") as stream:
        for problem in problems:
            messages = [{"role": "user", "content": problem["question"]}]
            stream.write(json.dumps({"messages": messages, "solution": problem["answer"]}) + "\n")


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Directory for all results.")
@click.option("--teacher", type=click.Path(path_type=Path), help="transformers directory. Default: SmolLM2, unpacked.")
@click.option("--problems", default=PROBLEMS, show_default=True, help="Number of sums.")
def reasoning(output: Path, teacher: Path | None, problems: int) -> None:
    """Let a teacher answer sums, and cache its right answers."""
    from benchmarks.demo import distill, unpacked_teacher

    output.mkdir(parents=True, exist_ok=True)
    if teacher is None:
        teacher = unpacked_teacher(output)
    write_problems(output / "sums.jsonl", problems)
    cache = output / "caches" / "sums"
    distill(
        "cache-teacher",
        *("--teacher", teacher, "--data", output / "sums.jsonl", "--output", cache, "--overwrite", "--generate"),
        *("--gen-answers-per-prompt", ANSWERS, *GENERATE, "--gen-keep-if", f"{__file__}:{is_right.__name__}"),
    )
    distill("inspect", cache, "--row", "0", "--start", "40", "--positions", "24")


if __name__ == "__main__":
    reasoning()
