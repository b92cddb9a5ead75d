"""The interface of a teacher engine: rows of token ids in, targets of their positions out.

    engine.batches(requests)        requests cut into forward passes
    engine.run(batch, rules)        one pass; its targets may still be on their way to the host
    running.rows()                  waits, and gives a row of the cache for each request
    engine.generate(requests, …)    answers of the teacher, with the targets of every position that it wrote

Shapes: T tokens of a row, n positions of a batch that get targets, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

import cache_format as cf
from pipeline.models.padding import PackedRow
from pipeline.teacher.targets.rules import TargetRule

if TYPE_CHECKING:
    from pipeline.teacher.generation.answers import Answer, AnswerSettings, Request


@dataclass(frozen=True, kw_only=True, eq=False)
class RowRequest:
    """One row to compute targets for.

    Attributes:
        index: number of the row in the cache.
        row: token ids, segments, loss mask and, of masked models, labels.
        place: key of the row's random numbers: its number, or the place of an answer.
        stored: bool [T], positions that get targets.
        with_states: bool [T], positions whose hidden states are stored; None: none.
    """

    index: int
    row: PackedRow
    place: int
    stored: np.ndarray
    with_states: np.ndarray | None = None

    @property
    def tokens(self) -> int:
        return len(self.row.input_ids)


class RunningBatch(Protocol):
    """A forward pass that has been started."""

    def rows(self, rule: int = 0) -> list[cf.CacheRow]:
        """The rows of the requests in their order, by one of the rules; waits for the copy to the host.

        Raises: ModelError if the teacher's logits or states are not finite.
        """
        ...


class TeacherEngine(Protocol):
    """A loaded teacher.

    Attributes:
        vocab_size: V, without rows of padding in the output matrix.
        batch_size: rows or answers per forward pass; smaller after it did not fit the memory.
    """

    vocab_size: int
    batch_size: int

    @property
    def fingerprints(self) -> dict[str, str]:
        """What tells this teacher from another one, in the manifest."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the manifest records about how the numbers were computed."""
        ...

    def batches(self, requests: Sequence[RowRequest]) -> Iterator[list[RowRequest]]:
        """Cuts requests into forward passes of similar length."""
        ...

    def run(self, batch: Sequence[RowRequest], rules: Sequence[TargetRule]) -> RunningBatch:
        """Starts one forward pass and the selection of targets by each of the rules."""
        ...

    def generate(self, requests: Sequence[Request], settings: AnswerSettings) -> list[Answer]:
        """Answers to prompts, one batch, in the order given."""
        ...

    def halve_batch(self, error: BaseException) -> bool:
        """Whether `error` is about memory and a smaller batch can be tried; halves `batch_size` if so."""
        ...
