"""The first phase of `generation`: all prompts answered and judged, group by group, so that nothing is done twice.

A group is some prompts in a row. Its answers are written in batches of similar length, put into the store, and only
then shown to the predicate, which may fail.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

import cache_format as cf
from pipeline.errors import DataError
from pipeline.teacher.cache_config import Keep
from pipeline.teacher.engines.interface import TeacherEngine
from pipeline.teacher.generation.answer_store import AnswerStore, Group
from pipeline.teacher.generation.answers import STOP_REASONS, Answer, AnswerSettings, Request
from pipeline.teacher.generation.predicates import Predicate, choose
from pipeline.teacher.text.data_paths import data_name
from pipeline.teacher.text.prompts import Prompts

BATCHES_PER_GROUP = 4  # sorted by length; what a kill may cost
LEAST_PER_GROUP = 32  # answers


@dataclass(frozen=True, kw_only=True)
class GenerationProgress:
    """Where the run stands, after every batch."""

    answers: int
    total_answers: int
    passed: int | None  # the predicate, of the groups that are complete; None without one
    tokens_per_s: float  # written by this run
    seconds_left: float
    batch_size: int


@dataclass
class Selection:
    """Which answers will be rows, and sums over them; counts of all."""

    chosen: set[tuple[int, int]] = field(default_factory=set)  # document and index
    answers: int = 0
    passed: int = 0  # the predicate
    prompts_kept: int = 0  # with an answer that was chosen
    stop_reasons: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(STOP_REASONS, 0)))  # of all
    tokens: int = 0
    counted_tokens: int = 0
    logprob_sum: float = 0.0  # nats, of all tokens of the chosen answers
    outside_sum: float = 0.0  # probability mass outside the exact entries
    stream: hashlib._Hash = field(default_factory=hashlib.sha256)

    def add(self, answer: Answer) -> None:
        row = answer.row
        self.chosen.add((answer.document, answer.index))
        self.tokens += len(row.input_ids)
        self.counted_tokens += int(row.loss_mask.sum())
        self.logprob_sum += float(answer.logprobs.sum(dtype=np.float64))
        self.outside_sum += float(np.exp(row.targets.residual_logprob[row.loss_mask].astype(np.float64)).sum())
        # As `TokenCorpus.token_stream_sha256`.
        self.stream.update(struct.pack("<qq", len(row.input_ids), len(row.segment_lengths)))
        for array, dtype in ((row.input_ids, "<i4"), (row.loss_mask, "u1"), (row.segment_lengths, "<i4")):
            self.stream.update(array.astype(dtype, copy=False))


class Answering:
    """All the answers of a run: writes those that are missing, and gives them out again.

    Args:
        engine: writes the answers; halves its batch size when out of memory.
    """

    def __init__(
        self,
        prompts: Prompts,
        store: AnswerStore,
        engine: TeacherEngine,
        settings: AnswerSettings,
        *,
        answers_per_prompt: int,
        predicate: Predicate | None,
        keep: Keep,
        on_progress: Callable[[GenerationProgress], None],
    ) -> None:
        self.prompts, self.store, self.engine, self.settings = prompts, store, engine, settings
        self.answers_per_prompt = answers_per_prompt
        self.predicate, self.keep, self.on_progress = predicate, keep, on_progress
        self.prompts_per_group = max(
            1, max(LEAST_PER_GROUP, BATCHES_PER_GROUP * engine.batch_size) // answers_per_prompt
        )
        self.selection = Selection()
        self.resumed = 0  # answers found
        self.tokens_written = 0
        self.started = time.perf_counter()

    def run(self) -> Selection:
        """Raises: ConfigError if the predicate fails; DataError if no answer passes it."""
        for number, documents in enumerate(self._documents()):
            group = self.store.load(number)
            if group is None:
                group = self._write(documents)
                self.store.save(number, group)
            else:
                self.resumed += len(group.answers)
            self._judge(group)
            self._report()
        if not self.selection.chosen and self.predicate is not None:
            raise DataError(
                f"{data_name(self.prompts.config.data)}: none of {self.selection.answers:,} answers passed "
                f"`gen_keep_if` {self.predicate.name}: nothing to cache, and nothing was changed. The answers are in "
                f"{self.store.location}: correct the function, and the same command judges them again."
            )
        return self.selection

    def groups(self) -> Iterator[Group]:
        """The groups of answers, with those only that were chosen."""
        for number, _ in enumerate(self._documents()):
            group = self.store.load(number)
            if group is None:
                raise cf.CacheError(
                    f"{self.store.location}: group {number} of the answers was changed or removed during the run. Run "
                    "the same command again."
                )
            chosen = [answer for answer in group.answers if (answer.document, answer.index) in self.selection.chosen]
            yield replace(group, answers=chosen)

    def _documents(self) -> Iterator[range]:
        for start in range(0, len(self.prompts), self.prompts_per_group):
            yield range(start, min(start + self.prompts_per_group, len(self.prompts)))

    def _write(self, documents: range) -> Group:
        requests = [
            Request(document, index, prompt)
            for document, prompt in zip(documents, self.prompts.tokens(documents), strict=True)
            if self.prompts.answerable[document]
            for index in range(self.answers_per_prompt)
        ]
        # Longest first: out of memory shows at once, and little is padded.
        requests.sort(key=lambda request: (-len(request.prompt), request.document, request.index))
        while True:
            tokens_before = self.tokens_written
            try:
                answers = self._write_batches(requests)
                break
            except Exception as error:
                if not self.engine.halve_batch(error):
                    raise
                self.tokens_written = tokens_before
        answers.sort(key=lambda answer: (answer.document, answer.index))
        return Group(answers=answers, batch_size=self.engine.batch_size)

    def _write_batches(self, requests: list[Request]) -> list[Answer]:
        answers: list[Answer] = []
        size = self.engine.batch_size
        for start in range(0, len(requests), size):
            batch = self.engine.generate(requests[start : start + size], self.settings)
            self.tokens_written += sum(len(answer.logprobs) for answer in batch)
            answers += batch
            if len(answers) < len(requests):  # else the group is complete, and reported with what passed
                self._report(len(answers))
        return answers

    def _judge(self, group: Group) -> None:
        selection = self.selection
        selection.answers += len(group.answers)
        passed: dict[int, list[Answer]] = {}  # by document
        for answer in group.answers:
            selection.stop_reasons[answer.stop_reason] += 1
            if self._passes(answer):
                passed.setdefault(answer.document, []).append(answer)
        for of_prompt in passed.values():
            selection.passed += len(of_prompt)
            selection.prompts_kept += 1
            for answer in choose(of_prompt, self.keep):
                selection.add(answer)

    def _passes(self, answer: Answer) -> bool:
        if self.predicate is None:
            return True
        where = f"{data_name(self.prompts.config.data)}, row {answer.document}, answer {answer.index}"
        return self.predicate(self.prompts.example(answer.document), answer, where)

    def _report(self, in_group: int = 0) -> None:
        """Args: in_group: answers of a group that is not complete."""
        seconds = time.perf_counter() - self.started
        answers = self.selection.answers + in_group
        total = int(self.prompts.answerable.sum()) * self.answers_per_prompt
        written = answers - self.resumed
        self.on_progress(
            GenerationProgress(
                answers=answers,
                total_answers=total,
                passed=None if self.predicate is None else self.selection.passed,
                tokens_per_s=self.tokens_written / seconds,
                seconds_left=(total - answers) * seconds / written if written else float("nan"),
                batch_size=self.engine.batch_size,
            )
        )
