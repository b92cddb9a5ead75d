"""The answers that become rows of the cache: which they are, their order, and the text that they make.

The answers stay in the store; one group at a time is in memory.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

import cache_format as cf
from pipeline.models.objective import Objective
from pipeline.teacher.engines.answers import STOP_REASONS, Answer
from pipeline.teacher.generation.answer_store import AnswerStore, Group
from pipeline.teacher.text.packing import add_row_to
from pipeline.teacher.text.prompts import Prompts

DECIMALS = 6  # of log-probabilities in answers.jsonl


@dataclass
class Selection:
    """The answers that become rows, with sums over them, and counts over all answers."""

    chosen: set[tuple[int, int]] = field(default_factory=set)  # document and index
    rows_of_group: list[int] = field(default_factory=list)  # number of chosen answers
    answers: int = 0
    skipped: int = 0  # that a server gave no usable answer to
    passed: int = 0  # answers that passed the predicate
    prompts_kept: int = 0  # prompts with a chosen answer
    stop_reasons: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(STOP_REASONS, 0)))  # of all
    tokens: int = 0
    loss_tokens: int = 0
    outside_sum: float = 0.0  # tail mass, summed over loss tokens
    stream: hashlib._Hash = field(default_factory=hashlib.sha256)

    def add(self, answer: Answer) -> None:
        """Makes it a row of the current group."""
        row = answer.row
        self.chosen.add((answer.document, answer.index))
        self.rows_of_group[-1] += 1
        self.tokens += len(row.input_ids)
        self.loss_tokens += int(row.loss_mask.sum())
        self.outside_sum += float(np.exp(row.targets.residual_logprob[row.loss_mask].astype(np.float64)).sum())
        add_row_to(self.stream, row)


class KeptAnswers:
    """Row r of the future cache is made of answer `kept[r]`.

    Args:
        selection: complete.
    """

    def __init__(self, store: AnswerStore, selection: Selection) -> None:
        self.store, self.selection = store, selection
        self._loaded: tuple[int, Group] | None = None  # the group that was asked for last

    def __len__(self) -> int:
        return len(self.selection.chosen)

    def __getitem__(self, row: int) -> Answer:
        number = int(np.searchsorted(self._stops, row, side="right"))
        if self._loaded is None or self._loaded[0] != number:
            self._loaded = number, self._group(number)
        answers = self._loaded[1].answers
        return answers[row - int(self._stops[number]) + len(answers)]

    def groups(self) -> Iterator[Group]:
        """The groups of answers, with only the chosen answers."""
        return map(self._group, range(len(self.selection.rows_of_group)))

    def lines(self) -> Iterator[dict[str, Any]]:
        """answers.jsonl: one line per row."""
        number = 0
        for group in self.groups():
            for answer in group.answers:
                yield {
                    "row": number,
                    "document": answer.document,
                    "answer": answer.index,
                    "prompt_tokens": answer.prompt_tokens,
                    "stop_reason": answer.stop_reason,
                    "mean_logprob": round(answer.mean_logprob, DECIMALS),
                    "text": answer.text,
                    "token_logprobs": [round(each, DECIMALS) for each in answer.logprobs.tolist()],
                }
                number += 1

    @cached_property
    def _stops(self) -> np.ndarray:
        """The row behind the last one of each group."""
        return np.cumsum(self.selection.rows_of_group)

    def _group(self, number: int) -> Group:
        group = self.store.load(number)
        if group is None:
            raise cf.CacheError(
                f"{self.store.location}: group {number} of the answers was changed or removed during the run. Run "
                "the same command again."
            )
        chosen = [answer for answer in group.answers if (answer.document, answer.index) in self.selection.chosen]
        return replace(group, answers=chosen)


@dataclass(frozen=True)
class AnswerCorpus:
    """The text of the future cache, as `cache_metadata` and a teacher that scores it expect it."""

    kept: KeptAnswers
    prompts: Prompts
    description: dict[str, Any]
    report: Mapping[str, float]
    documents_file: bytes | None = None  # contents of documents.arrow, with kept columns
    objective: Objective = "causal"

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def has_teacher_prompts(self) -> bool:
        return self.prompts.has_teacher_prompts

    @property
    def longest_read(self) -> int:
        return self.prompts.longest_read

    @property
    def num_tokens(self) -> int:
        return self.kept.selection.tokens

    @property
    def num_loss_tokens(self) -> int:
        return self.kept.selection.loss_tokens

    @property
    def token_stream_sha256(self) -> str:
        return self.kept.selection.stream.hexdigest()

    def first_token_beyond(self, limit: int) -> tuple[int, int] | None:
        """(row of the prompts, id) of the first token with an id of `limit` or more."""
        for group in self.kept.groups():
            for answer in group.answers:
                ids = answer.row.input_ids
                if (beyond := ids >= limit).any():
                    return answer.document, int(ids[beyond.argmax()])
        return None
