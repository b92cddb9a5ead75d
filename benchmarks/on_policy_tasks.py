"""The tasks of the benchmark on on-policy rounds: their teachers, their students and their texts.

    word problems   teacher: 4 layers, trained here     students: 2 of its layers, first trained on worked answers
    demo            teacher: SmolLM2-135M, 30 layers    students: 24 of its layers, first trained on its answers

Prompts are of three kinds, all different: for before the round, for the round, and held out.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import distill
from benchmarks import demo
from benchmarks.files import write_json_lines
from benchmarks.questions import FORMS, chat, questions
from benchmarks.text import byte_pair_tokenizer

SUFFIX = " Give the result as your final answer"


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Numbers of prompts and answers, and what else decides how long it takes.

    Attributes:
        mixed: whether another student learns from half of each text.
    """

    name: ClassVar[str]
    before: int
    before_epochs: float
    round: int
    round_epochs: float
    round_learning_rate: float
    mixed: bool = True
    held_out: int
    held_out_answers: int = 3  # to each
    new_tokens: int
    gen_temperature: float
    teacher_layers: int
    student_layers: int
    seq_len: int = 512
    top_k: int

    @abstractmethod
    def teacher(self, work: Path) -> Path:
        """The teacher's directory in `work`. The teacher is made the first time."""

    @abstractmethod
    def prompts(self) -> Mapping[str, Iterable[Mapping[str, Any]]]:
        """Rows of data for `before` and `round`, and held-out ones."""

    @abstractmethod
    def given(self) -> dict[str, Any]:
        """Options of the cache that the students learn from before the round."""

    def writing(self, *, seed: int) -> dict[str, Any]:
        """Options of a cache of written answers."""
        sampling = {"gen_temperature": self.gen_temperature, "gen_max_new_tokens": self.new_tokens, "gen_seed": seed}
        return {"generate": True, "batch_size": 128, **sampling}

    def writing_held_out(self, *, seed: int) -> dict[str, Any]:
        return {**self.writing(seed=seed), "gen_answers_per_prompt": self.held_out_answers}


@dataclass(frozen=True, kw_only=True)
class WordProblems(Task):
    """The teacher learns from problems with worked answers; before the round, its students learn from others."""

    name = "word_problems"
    before: int = 300
    before_epochs: float = 2
    round: int = 200
    round_epochs: float = 2
    round_learning_rate: float = 1e-3
    held_out: int = 48
    new_tokens: int = 128
    gen_temperature: float = 1.0
    teacher_layers: int = 4
    student_layers: int = 2
    top_k: int = 256  # of 1,024 tokens: the mass outside is below a thousandth
    teacher_problems: int = 1500
    teacher_epochs: float = 4
    vocabulary: int = 1024
    width: int = 128

    def teacher(self, work: Path) -> Path:
        """A small Llama that learns the problems from their labels, and its tokenizer."""
        teacher = work / "teacher"
        if not (teacher / demo.FINISHED).exists():
            rows = list(problems(self.teacher_problems, seed=1))
            data, new, labels = work / "data/teacher.jsonl", work / "untrained", work / "caches/labels"
            write_json_lines(data, rows)
            tokenizer = byte_pair_tokenizer((text for row in rows for text in row.values()), self.vocabulary)
            tokenizer.save_pretrained(new)
            self._untrained(tokenizer).save_pretrained(new)
            distill.cache_teacher(new, data, labels, seq_len=self.seq_len, loss_on="all", top_k=1, device="cpu")
            options = {"kd_weight": 0.0, "epochs": self.teacher_epochs, "learning_rate": 3e-3, "batch_size": 8}
            distill.train_student(labels, new, teacher, **options, device="cpu", overwrite=True)
        return teacher

    def prompts(self) -> dict[str, Iterable[dict[str, str]]]:
        sizes = {"before": self.before, "round": self.round, "heldout": self.held_out}
        return {name: problems(size, seed) for seed, (name, size) in enumerate(sizes.items(), start=2)}

    def given(self) -> dict[str, Any]:
        return {}

    def _untrained(self, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.width,
            intermediate_size=3 * self.width,
            num_hidden_layers=self.teacher_layers,
            num_attention_heads=4,
            max_position_embeddings=self.seq_len,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


@dataclass(frozen=True, kw_only=True)
class Demo(Task):
    """The teacher and the questions of `make demo`; before the round, the students learn from the teacher's answers."""

    name = "demo"
    before: int = 126
    before_epochs: float = 1
    round: int = 123
    round_epochs: float = 1
    round_learning_rate: float = 3e-4  # 1e-3 raised the KL on the teacher's text, whoever wrote
    mixed: bool = False  # each student takes five minutes
    held_out: int = 36
    held_out_answers: int = 2
    new_tokens: int = 64
    gen_temperature: float = 0.7
    teacher_layers: int = 30
    student_layers: int = demo.STUDENT_LAYERS
    top_k: int = 64

    def teacher(self, work: Path) -> Path:
        return demo.unpacked_teacher(work)

    def prompts(self) -> dict[str, Iterable[dict[str, Any]]]:
        """Questions about other topics each: every second topic for training belongs to the round."""
        training = list(enumerate(questions(held_out=False)))
        asked = {
            "before": [question for i, question in training if i // len(FORMS) % 2 == 0][: self.before],
            "round": [question for i, question in training if i // len(FORMS) % 2 == 1][: self.round],
            "heldout": questions(held_out=True)[: self.held_out],
        }
        return {name: map(chat, texts) for name, texts in asked.items()}

    def given(self) -> dict[str, Any]:
        return self.writing(seed=0)


TASKS = {"word-problems": WordProblems(), "demo": Demo()}
QUICK = {
    "word-problems": WordProblems(
        teacher_problems=24,
        teacher_epochs=1,
        before=8,
        round=8,
        round_epochs=1,
        held_out=4,
        new_tokens=12,
        width=32,
    ),
    "demo": Demo(before=8, round=8, round_epochs=1, held_out=4, new_tokens=12),
}


def problems(size: int, seed: int) -> Iterator[dict[str, str]]:
    """Prompts with worked answers."""
    import reasoning_gym

    for problem in itertools.islice(reasoning_gym.create_dataset("gsm_symbolic", size=size, seed=seed), size):
        question = problem["question"].partition(SUFFIX)[0]
        yield {"prompt": f"{question}\n", "completion": problem["metadata"]["answer_cot"]}
