"""The first phase of `generation`: answers all prompts and judges the answers, group by group, so that no work is lost.

A group is a run of consecutive prompts. Its answers are generated in batches of similar length, saved to the store, and
only then passed to the predicate, which may fail.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from pipeline.errors import DataError, ModelError
from pipeline.teacher.engines.answers import Answer, AnswerSettings, Request
from pipeline.teacher.engines.interface import BatchSizeHalved, TeacherEngine
from pipeline.teacher.generation.answer_store import AnswerStore, Group
from pipeline.teacher.generation.generation_config import Keep
from pipeline.teacher.generation.kept_answers import KeptAnswers, Selection
from pipeline.teacher.generation.predicates import Predicate, choose
from pipeline.teacher.progress import GenerationProgress
from pipeline.teacher.text.prompts import Prompts
from pipeline.teacher.text.reading.data_paths import data_name

BATCHES_PER_GROUP = 4  # sorted by length; at most this much is lost when killed
LEAST_PER_GROUP = 32  # answers


def prompts_per_group(batch_size: int, answers_per_prompt: int) -> int:
    """Args: batch_size: of the run that began the store. Its later groups hold as many prompts, whatever the batch."""
    return max(1, max(LEAST_PER_GROUP, BATCHES_PER_GROUP * batch_size) // answers_per_prompt)


class Answering:
    """All answers of a run: generates the missing ones, and judges them.

    Args:
        engine: generates the answers; halves its batch size when out of memory.
    """

    def __init__(
        self,
        prompts: Prompts,
        store: AnswerStore,
        engine: TeacherEngine,
        settings: AnswerSettings,
        *,
        answers_per_prompt: int,
        prompts_per_group: int,
        predicate: Predicate | None,
        keep: Keep,
        on_progress: Callable[[GenerationProgress], None],
    ) -> None:
        self.prompts, self.store, self.engine, self.settings = prompts, store, engine, settings
        self.answers_per_prompt, self.prompts_per_group = answers_per_prompt, prompts_per_group
        self.predicate, self.keep, self.on_progress = predicate, keep, on_progress
        self.selection = Selection()
        self.resumed = 0  # answers found in the store
        self.tokens_written = 0
        self.started = time.perf_counter()

    def run(self) -> KeptAnswers:
        """Raises: ConfigError if the predicate fails; DataError if no answer passes it, or there is none."""
        for number, documents in enumerate(self._documents()):
            group = self.store.load(number, self._asked(documents))
            if group is None:
                group = self._write(documents)
                self.store.save(number, group)
            else:
                self.resumed += len(group.answers) + len(group.skipped)
            self._judge(group)
            self._report()
        if not self.selection.answers:
            raise DataError(
                f"{data_name(self.prompts.config.data)}: the server gave no usable answer to any of "
                f"{len(self.prompts):,} prompts: nothing to cache. Use other prompts, or another model."
            )
        if not self.selection.chosen and self.predicate is not None:
            raise DataError(
                f"{data_name(self.prompts.config.data)}: none of {self.selection.answers:,} answers passed "
                f"`gen_keep_if` {self.predicate.name}: nothing to cache, and nothing was changed. The answers are in "
                f"{self.store.location}: correct the function, and the same command checks them again."
            )
        return KeptAnswers(self.store, self.selection)

    def _documents(self) -> Iterator[range]:
        for start in range(0, len(self.prompts), self.prompts_per_group):
            yield range(start, min(start + self.prompts_per_group, len(self.prompts)))

    def _asked(self, documents: range) -> list[tuple[int, int]]:
        """The answers to these prompts: document and index."""
        answerable = [document for document in documents if self.prompts.answerable[document]]
        return [(document, index) for document in answerable for index in range(self.answers_per_prompt)]

    def _write(self, documents: range) -> Group:
        prompts = dict(zip(documents, self.prompts.read(documents), strict=True))
        requests = [
            Request(
                document,
                index,
                prompts[document].ids,
                prompts[document].teacher_prompt,
                by_teacher=self.settings.sampling.writer is None,
                messages=partial(self.prompts.messages, document),
            )
            for document, index in self._asked(documents)
        ]
        tokens_before = self.tokens_written
        in_group = 0

        def on_answers(answers: Sequence[Answer]) -> None:
            nonlocal in_group
            in_group += len(answers)
            self.tokens_written += sum(len(answer.logprobs) for answer in answers)
            if in_group < len(requests):  # else the group is complete and is reported after judging
                self._report(in_group)

        while True:
            try:
                answers = self.engine.generate(requests, self.settings, on_answers)
                break
            except BatchSizeHalved:
                self.tokens_written, in_group = tokens_before, 0
        answers.sort(key=lambda answer: (answer.document, answer.index))
        self._check_known(answers)
        given = {(answer.document, answer.index) for answer in answers}
        skipped = [(each.document, each.index) for each in requests if (each.document, each.index) not in given]
        return Group(answers=answers, batch_size=self.engine.batch_size, skipped=skipped)

    def _check_known(self, answers: Sequence[Answer]) -> None:
        """Raises: ModelError for a token that no cache with this vocabulary can hold; nothing is stored."""
        vocab_size = self.engine.vocab_size
        for answer in answers:
            if (beyond := answer.token_ids >= vocab_size).any():
                raise ModelError(
                    f"row {answer.document}, answer {answer.index}: found token id "
                    f"{answer.token_ids[beyond.argmax()]}, expected ids below {vocab_size:,}: the model has sampled a "
                    "row of its output matrix that stands for no token. Use `engine=transformers`."
                )

    def _judge(self, group: Group) -> None:
        selection = self.selection
        selection.answers += len(group.answers)
        selection.skipped += len(group.skipped)
        selection.rows_of_group.append(0)
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
        """Reports the progress of the run.

        Args:
            in_group: answers so far in the current, incomplete group.
        """
        seconds = time.perf_counter() - self.started
        answers = self.selection.answers + self.selection.skipped + in_group
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
                usage=self.engine.usage,
            )
        )
