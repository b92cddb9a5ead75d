"""Teachers behind an HTTP API, as an engine: documents are requests, and lists of the K most likely tokens come back.

    row ─▶ its documents that have targets ─▶ requests, as many at once as the server may work on ─▶ lists ─▶ targets

A request holds the tokens of a document up to the one behind the last position that has targets: what follows cannot
change an earlier prediction, and padding is never sent. If that position is the last one of the document, a token is
added behind it, because servers give a distribution only beside the token that it was to predict. Equal to the
transformers engine within rounding: what shares a batch with a document is up to the server.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import cache_format as cf
from pipeline.errors import ModelError
from pipeline.teacher.engines.answers import (
    Answer,
    AnswerSettings,
    Request,
    answer_row,
    answer_seed,
    complete_answer,
)
from pipeline.teacher.engines.engine_config import Tokens
from pipeline.teacher.engines.interface import Measured, OnAnswers, OnBatch, RowRequest, Timing, Usage
from pipeline.teacher.engines.server.dialect import Dialect, Prompt, Sampling, Written
from pipeline.teacher.engines.server.http_client import MOST_UNUSABLE, HttpClient, Unwanted
from pipeline.teacher.engines.server.server_kinds import ServerFacts
from pipeline.teacher.engines.server.top_lists import TopLists
from pipeline.teacher.targets.cache_rows import cache_row
from pipeline.teacher.targets.rules import TargetRule

logger = logging.getLogger("distill")


@dataclass
class _Row:
    """A row in progress: the lists of its documents, in their order."""

    request: RowRequest
    parts: Sequence[Future[TopLists]]
    reported: bool = field(default=False)


class _RunningRows:
    """See `RunningRows`. Args: k: number of most likely tokens that were asked for."""

    def __init__(
        self, pending: Sequence[_Row], rules: Sequence[TargetRule], k: int, vocab_size: int, on_batch: OnBatch
    ) -> None:
        self.pending, self.rules, self.k, self.vocab_size, self.on_batch = pending, rules, k, vocab_size, on_batch
        self.timing = Timing(tokens=sum(row.request.tokens for row in pending), selection=[0.0] * len(rules))
        self.started = time.perf_counter()

    def rows(self, rule: int = 0) -> list[cf.CacheRow]:
        found = []
        for row in self.pending:
            lists = self._lists(row)
            began = time.perf_counter()
            found.append(self._row(row.request, lists, self.rules[rule]))
            if not row.reported:
                row.reported = True
                self.timing.forward = began - self.started - self.timing.selection[rule]
                self.on_batch([row.request])
            self.timing.selection[rule] += time.perf_counter() - began
        return found

    def _lists(self, row: _Row) -> TopLists:
        try:
            lists = [part.result() for part in row.parts]
        except ModelError as error:
            raise ModelError(f"row {row.request.index}: {error}") from error
        return TopLists.cat([TopLists.empty(self.k), *lists])

    def _row(self, request: RowRequest, lists: TopLists, rule: TargetRule) -> cf.CacheRow:
        targets = lists.first(entries(rule, self.vocab_size)).targets(rule, self.vocab_size)
        return cache_row(request.index, request.row, request.stored, targets)

    def measured(self) -> list[Measured]:
        """All rows as one batch: the server works on them together."""
        requests = [row.request for row in self.pending]
        return [Measured(requests=requests, timing=self.timing, label_logprobs=None)]


def entries(rule: TargetRule, vocab_size: int) -> int:
    """K: how many of the most likely tokens a rule needs."""
    return min(rule.candidates, vocab_size)


def sampling_of(request: Request, settings: AnswerSettings, k: int, attempt: int = 0) -> Sampling:
    """What a server is asked for an answer. Args: attempt: each has a seed of its own."""
    given = settings.sampling
    return Sampling(
        token_ids=np.asarray(request.read).tolist(),
        messages=request.messages,
        k=k,
        max_tokens=settings.most_tokens(request),
        temperature=given.temperature,
        top_p=given.top_p,
        top_k=given.top_k,
        seed=(answer_seed(request, given.seed) + attempt) % 2**31,
        stop=given.stop,
        stop_tokens=sorted(settings.stop_tokens),
    )


class ServerEngine:
    """See `TeacherEngine`. Owns the client.

    Args:
        concurrency: requests that the server works on at once.
        vocab_size: V of the tokenizer; a server does not say how many rows its output matrix has.
    """

    libraries: Sequence[str] = ("transformers",)
    stored_head = None
    revision = None
    hidden: cf.HiddenSpec | None = None

    def __init__(
        self, client: HttpClient, dialect: Dialect, facts: ServerFacts, *, concurrency: int, vocab_size: int
    ) -> None:
        self.client, self.dialect, self.facts, self.vocab_size = client, dialect, facts, vocab_size
        self.batch_size, self.rows_in_flight = concurrency, 2 * concurrency
        self.batch_tokens: Tokens | None = None

    @property
    def usage(self) -> Usage | None:
        counted = self.client.usage
        return replace(counted) if counted.prompt_tokens or counted.completion_tokens else None

    @property
    def eos_token_ids(self) -> set[int]:
        return set()  # those of the tokenizer are used

    def layers(self) -> tuple[int, int]:
        raise ModelError(f"{self.client.root}: a server gives no hidden states. Leave `hidden_states` out.")

    def describe_teacher(self) -> dict[str, str]:
        return {"name": self.facts.model}

    def describe(self) -> dict[str, Any]:
        """The address is not recorded: a server may be started again elsewhere."""
        return {
            "engine": "server",
            "server": self.facts.kind,
            "server_version": self.facts.version,
            "batch_size": self.batch_size,
        }

    def run(
        self, requests: Sequence[RowRequest], rules: Sequence[TargetRule], on_batch: OnBatch = lambda _: None
    ) -> _RunningRows:
        k = max(entries(rule, self.vocab_size) for rule in rules)
        rows = [_Row(request, list(self._started(request, k))) for request in requests]
        return _RunningRows(rows, rules, k, self.vocab_size, on_batch)

    def _started(self, request: RowRequest, k: int) -> Iterator[Future[TopLists]]:
        """A request for every document that the teacher reads for a row and that has targets."""
        start, read = 0, request.read
        stored = np.zeros(len(read.input_ids), bool)
        stored[request.places(request.stored)] = True
        for length in np.asarray(read.segment_lengths).tolist():
            here = slice(start, start + length)
            start += length
            positions = np.flatnonzero(stored[here]).tolist()
            if not positions:
                continue
            tokens = np.asarray(read.input_ids[here]).tolist()
            prompt = Prompt(token_ids=[*tokens, tokens[-1]][: positions[-1] + 2], positions=positions, k=k)
            yield self._lists(prompt)

    def _lists(self, prompt: Prompt) -> Future[TopLists]:
        return self.client.post(self.dialect.prompt(prompt, self.vocab_size))

    def generate(
        self, requests: Sequence[Request], settings: AnswerSettings, on_answers: OnAnswers = lambda _: None
    ) -> list[Answer]:
        answers: list[Answer] = []
        for attempt in range(MOST_UNUSABLE):
            pending = {self._written(request, settings, attempt): request for request in requests}
            unwanted: dict[Request, Unwanted] = {}
            for done in as_completed(pending):
                try:
                    answers.append(self._answer(pending[done], done, settings))
                except Unwanted as error:
                    unwanted[pending[done]] = error
                else:
                    on_answers(answers[-1:])
            requests = list(unwanted)
        for request, problem in list(unwanted.items())[:1]:
            others = f" (and {len(unwanted) - 1} others)" if len(unwanted) > 1 else ""
            logger.warning(
                "row %d, answer %d%s: %s, with each of %d seeds. Left out.",
                *(request.document, request.index, others, problem, MOST_UNUSABLE),
            )
        return answers

    def _written(self, request: Request, settings: AnswerSettings, attempt: int) -> Future[Written]:
        sampling = sampling_of(request, settings, entries(settings.rule, self.vocab_size), attempt)
        return self.client.post(self.dialect.answer(sampling, self.vocab_size))

    def _answer(self, request: Request, done: Future[Written], settings: AnswerSettings) -> Answer:
        try:
            written = done.result()
        except Unwanted:
            raise
        except ModelError as error:
            raise ModelError(f"row {request.document}, answer {request.index}: {error}") from error
        row = answer_row(request, written.token_ids)
        targets = written.lists.targets(settings.rule, self.vocab_size)
        with_targets = cache_row(request.document, row, row.loss_mask, targets)
        return complete_answer(request, with_targets, written.logprobs, written.stop_reason, settings)

    def close(self) -> None:
        self.client.close()
