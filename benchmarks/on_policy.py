"""A round of on-policy distillation against the same number of tokens of the teacher's text.

    word problems ─▶ teacher: 4 layers, trained here ─▶ student: 2 of its layers, trained on worked answers
    new problems  ─▶ answers by the student, or by the teacher ─▶ targets by the teacher ─▶ the student after a round

Every student is measured on the answers that it writes itself to held-out problems, scored by the teacher: where a
student goes when it is used, and where its errors add up. Beside it stands the KL on the teacher's own answers.

    python -m benchmarks.on_policy             fifteen minutes on a quiet core; resumes after every model and cache
    python -m benchmarks.on_policy --quick     a smoke test; the numbers mean nothing and are not recorded
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

import cache_format as cf
import distill
from benchmarks import measure
from benchmarks.files import write_json, write_text

BENCHMARKS = Path(__file__).parent
EOS = "<|endoftext|>"
SUFFIX = " Give the result as your final answer"
FINISHED = "trainer_state.json"  # the last file that training writes
SEQ_LEN = 512
TOP_K = 256  # of 1,024 tokens: the mass outside is below a thousandth
BEFORE, OWN, TEACHERS, MIXED = "before the round", "the student's text", "the teacher's text", "half of each"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of problems, and what else decides how long it takes."""

    teacher: int = 1500
    teacher_epochs: float = 4
    before: int = 300
    round: int = 200
    round_epochs: float = 2
    held_out: int = 48
    held_out_answers: int = 3  # to each
    new_tokens: int = 128
    vocabulary: int = 1024
    width: int = 128


QUICK = Sizes(teacher=24, teacher_epochs=1, before=8, round=8, round_epochs=1, held_out=4, new_tokens=12, width=32)


@click.command()
@click.option("--work", default=BENCHMARKS / "work" / "on-policy", type=click.Path(path_type=Path))
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="Number of students.")
@click.option("--quick", is_flag=True, help="Use tiny sizes. The numbers mean nothing and are not recorded.")
@click.option("--results", default=BENCHMARKS / "results", type=click.Path(path_type=Path))
def on_policy(work: Path, seeds: int, quick: bool, results: Path) -> None:
    """Train students on their own text and on the teacher's, and compare. Resumes after an interruption."""
    logging.disable_progress_bar()
    result = run(work / ("quick" if quick else "full"), 1 if quick else seeds, QUICK if quick else Sizes())
    measure.show(result)
    if not quick:
        measure.write(result, results, f"python -m benchmarks.on_policy --seeds {seeds}")


def run(work: Path, seeds: int, sizes: Sizes) -> measure.Result:
    """Makes and measures what is missing; returns the table."""
    data = write_problems(work / "data", sizes)
    teacher = trained_teacher(work, data, sizes)
    fixed = {
        "given": cache(teacher, data["before"], work / "caches/given"),
        "heldout": cache(teacher, data["heldout"], work / "caches/heldout", **held_out(sizes, seed=1)),
    }
    runs: dict[str, list[dict[str, float]]] = {}
    tokens: list[int] = []
    for seed in range(seeds):
        place = work / f"seed-{seed}"
        before = train(place, BEFORE, [fixed["given"]], teacher, seed, student_layers=2, epochs=2)
        answers = writing(sizes, seed=10 + seed)
        own = cache(teacher, data["round"], place / "caches/own", writer=before, **answers)
        teachers = cache(teacher, data["round"], place / "caches/teachers", **answers)
        budget = min(opened.num_loss_tokens for opened in map(cf.open_cache, (own, teachers)))
        tokens.append(budget)
        for name, caches in {BEFORE: [], OWN: [own], TEACHERS: [teachers], MIXED: [own, teachers]}.items():
            student = before
            if caches:
                length = {"max_tokens": input_tokens(caches, round(budget * sizes.round_epochs))}
                student = train(place, name, caches, before, seed, **length)
            found = measured(place, name, student, teacher, data["heldout"], fixed["heldout"], sizes)
            runs.setdefault(name, []).append(found)
    return report(runs, sizes, tokens)


def write_problems(folder: Path, sizes: Sizes) -> dict[str, Path]:
    """Different problems for every purpose, as prompts with worked answers."""
    import reasoning_gym

    files = {}
    for seed, name in enumerate(("teacher", "before", "round", "heldout"), start=1):
        size = sizes.held_out if name == "heldout" else getattr(sizes, name)
        files[name] = folder / f"{name}.jsonl"
        lines = []
        for problem in itertools.islice(reasoning_gym.create_dataset("gsm_symbolic", size=size, seed=seed), size):
            question = problem["question"].partition(SUFFIX)[0]
            lines.append(json.dumps({"prompt": f"{question}\n", "completion": problem["metadata"]["answer_cot"]}))
        write_text(files[name], "\n".join(lines) + "\n")
    return files


def trained_teacher(work: Path, data: Mapping[str, Path], sizes: Sizes) -> Path:
    """A small Llama that learns the problems from their labels, and its tokenizer."""
    teacher = work / "teacher"
    if not (teacher / FINISHED).exists():
        new = work / "untrained"
        tokenizer = byte_pairs(data["teacher"], sizes.vocabulary)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.width,
            intermediate_size=3 * sizes.width,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=SEQ_LEN,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(new)
        tokenizer.save_pretrained(new)
        text = cache(new, data["teacher"], work / "caches/labels", loss_on="all", top_k=1)  # only its labels are used
        say(f"training the teacher on {sizes.teacher} problems")
        options = {"kd_weight": 0.0, "epochs": sizes.teacher_epochs, "learning_rate": 3e-3, "batch_size": 8}
        distill.train_student(text, new, teacher, **options, device="cpu", overwrite=True)
    return teacher


def byte_pairs(data: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    rows = map(json.loads, data.read_text(encoding="utf-8").splitlines())
    core.train_from_iterator((text for row in rows for text in row.values()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS)


def writing(sizes: Sizes, *, seed: int) -> dict[str, Any]:
    return {"generate": True, "gen_max_new_tokens": sizes.new_tokens, "gen_seed": seed, "batch_size": 64}


def held_out(sizes: Sizes, *, seed: int) -> dict[str, Any]:
    return {**writing(sizes, seed=seed), "gen_answers_per_prompt": sizes.held_out_answers}


def cache(teacher: Path, data: Path, output: Path, **options: Any) -> Path:
    """A finished cache is checked and left as it is."""
    say(f"{output.parent.parent.name}: caching {data.stem} in {output.name}")
    options = {"seq_len": SEQ_LEN, "top_k": TOP_K, "device": "cpu", **options}
    distill.cache_teacher(teacher, data, output, **options)
    return output


def train(place: Path, name: str, caches: list[Path], start: Path, seed: int, **options: Any) -> Path:
    """Trained once. On text that a student has written, labels are its own tokens: only the targets are learned."""
    student = place / "students" / name.replace(" ", "-").replace("'", "")
    if not (student / FINISHED).exists():
        say(f"{place.name}: training {name}")
        options = {"kd_weight": 1.0, "learning_rate": 1e-3, "batch_size": 8, "seed": seed, **options}
        distill.train_student(tuple(map(str, caches)), start, student, **options, device="cpu", overwrite=True)
    return student


def input_tokens(caches: list[Path], loss_tokens: int) -> int:
    """Input tokens of a run that sees so many loss tokens, the same number of each cache."""
    opened = list(map(cf.open_cache, caches))
    return round(sum(loss_tokens / len(opened) * each.num_tokens / each.num_loss_tokens for each in opened))


def measured(
    place: Path, name: str, student: Path, teacher: Path, problems: Path, heldout: Path, sizes: Sizes
) -> dict[str, float]:
    """KL to the teacher on the student's own answers to held-out problems, and on the teacher's."""
    file = place / "runs" / f"{name}.json"
    if not file.exists():
        output = place / "caches" / f"heldout-{student.name}"
        own = cache(teacher, problems, output, writer=student, **held_out(sizes, seed=2))
        on_own, on_teachers = (distill.evaluate(each, student, device="cpu") for each in (own, heldout))
        generation = cf.open_cache(own).metadata.corpus["generation"]
        values = {"own": on_own.kl, "teacher's": on_teachers.kl, "agreement": on_own.agreement}
        write_json(file, {**values, "ended": generation["stop_reasons"]["eos"] / generation["answers"]})
    return dict(json.loads(file.read_text()))


def report(runs: Mapping[str, list[dict[str, float]]], sizes: Sizes, tokens: list[int]) -> measure.Result:
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
        name="on_policy",
        question="A round of training on answers by the student, by the teacher, or half of each; the same number of "
        "loss tokens, all with the teacher's targets.",
        bound="0: a student that predicts what the teacher predicts.",
        settings={
            "teacher_layers": 4,
            "student_layers": 2,
            "width": sizes.width,
            "problems_in_the_round": sizes.round,
            "held_out_answers": sizes.held_out * sizes.held_out_answers,
            "loss_tokens_per_epoch": round(mean(tokens)),
            "epochs": sizes.round_epochs,
            "seeds": max(map(len, runs.values())),
        },
        tables=[
            measure.Table(
                "KL(teacher ‖ student) in nats per token on held-out problems, mean over seeds ± half the range; in %: "
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
