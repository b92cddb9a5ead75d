"""The interface of a teacher engine: token ids in, rows of a cache out. Nothing in it belongs to torch.

    engine.run(requests, rules)     starts the forward passes; their targets may still be on the way to the host
    running.rows()                  waits, and gives the row of each request
    engine.generate(requests, …)    answers of the teacher, with the targets at every position that it wrote

Shapes: T tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

import cache_format as cf
from pipeline.models.padding import PackedRow
from pipeline.teacher.engines.engine_config import Tokens
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.formats.teacher_prompts import TeacherText
from pipeline.teacher.text.packing import TokenRow

if TYPE_CHECKING:
    from pipeline.teacher.engines.answers import Answer, AnswerSettings, Request


OnBatch = Callable[[Sequence["RowRequest"]], None]
OnAnswers = Callable[[Sequence["Answer"]], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class RowRequest:
    """One row to compute targets for.

    Attributes:
        index: number of the row in the cache.
        row: token ids, segments, loss mask and, for masked models, labels.
        place: key of the row's random numbers: its number, or the place of an answer.
        stored: bool [T], positions that get targets.
        with_states: bool [T], positions whose hidden states are stored; None: none.
        teacher: what the teacher reads, if that is not the row.
    """

    index: int
    row: TokenRow | cf.CacheRow
    place: int
    stored: np.ndarray
    with_states: np.ndarray | None = None
    teacher: TeacherText | None = None

    @property
    def tokens(self) -> int:
        return len(self.row.input_ids)

    @property
    def read(self) -> PackedRow:
        """What the teacher reads."""
        return self.row if self.teacher is None else self.teacher

    def places(self, mask: np.ndarray) -> np.ndarray:
        """Where the teacher, in what it reads, makes the predictions of some of the row's positions, int64, in order.

        Args:
            mask: bool [T].
        """
        return np.flatnonzero(mask) if self.teacher is None else self.teacher.positions[mask]


class BatchSizeHalved(Exception):
    """A batch did not fit the memory. The engine has freed it and halved `batch_size` or `batch_tokens`; the caller
    starts again what has to have one batch size: a shard, a group of answers."""


@dataclass(kw_only=True)
class Timing:
    """Seconds that a pass took.

    Attributes:
        tokens: number of tokens in its rows.
        forward: body and head.
        selection: choosing the targets, by rule.
    """

    tokens: int = 0
    forward: float = 0.0
    selection: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What a timed engine found out about some rows that it ran together.

    Attributes:
        label_logprobs: [n] float32 of the token that follows each stored position, row by row; None for a masked model,
            and for a server, which lists only the most likely tokens.
    """

    requests: Sequence[RowRequest]
    timing: Timing
    label_logprobs: np.ndarray | None


class RunningRows(Protocol):
    """Forward passes that have been started."""

    def rows(self, rule: int = 0) -> list[cf.CacheRow]:
        """The row of each request, in their order, by one of the rules; waits for the copy to the host.

        Raises: ModelError if the teacher's logits or states are not finite.
        """
        ...

    def measured(self) -> list[Measured]:
        """What a timed engine measured; call it after `rows`."""
        ...


class StoredHead(Protocol):
    """A vocabulary head as a cache of hidden targets stores it."""

    @property
    def layer(self) -> int:
        """The number under which the head's inputs are stored."""
        ...

    @property
    def width(self) -> int:
        """Width of these inputs."""
        ...

    @property
    def spec(self) -> cf.HeadSpec:
        """The head's entry in the manifest."""
        ...

    @property
    def contents(self) -> bytes:
        """The file that holds its weights."""
        ...


@dataclass
class Usage:
    """Tokens of the requests that a server has answered, as it counts them: what a hosted one charges for."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class TeacherEngine(Protocol):
    """A loaded teacher.

    Attributes:
        vocab_size: V, without rows of padding in the output matrix.
        batch_size: rows or answers per forward pass; smaller after it did not fit the memory.
        batch_tokens: tokens per forward pass over rows, in place of `batch_size`, likewise; "auto": the next `run`
            finds the number; None: `batch_size` counts.
        stored_head: for hidden targets.
        hidden: the hidden states that rows are to hold.
        libraries: distributions whose versions decide the numbers.
        rows_in_flight: rows that may be worked on at once, whichever record batch they belong to; 0: one batch after
            the other.
    """

    vocab_size: int
    batch_size: int
    batch_tokens: Tokens | None
    libraries: Sequence[str]
    rows_in_flight: int

    @property
    def hidden(self) -> cf.HiddenSpec | None: ...

    @hidden.setter
    def hidden(self, spec: cf.HiddenSpec | None) -> None: ...

    @property
    def stored_head(self) -> StoredHead | None: ...

    @property
    def usage(self) -> Usage | None:
        """What has been used of a server; None: there is none, or it does not count."""
        ...

    @property
    def eos_token_ids(self) -> set[int]:
        """Tokens that end a text, by the model's own generation settings."""
        ...

    def layers(self) -> tuple[int, int]:
        """The number of layers, and the width of their states. Raises: ModelError if it gives no states."""
        ...

    @property
    def revision(self) -> str | None:
        """Commit of a teacher from the hub."""
        ...

    def describe_teacher(self) -> dict[str, str]:
        """Architecture, dtype and fingerprints: what the manifest records about the teacher."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the manifest records about how the numbers were computed."""
        ...

    def run(
        self, requests: Sequence[RowRequest], rules: Sequence[TargetRule], on_batch: OnBatch = lambda _: None
    ) -> RunningRows:
        """Starts the forward passes over the requests, and the selection of targets by each of the rules.

        Args:
            on_batch: called with the requests of each forward pass once it has been started.

        Raises: BatchSizeHalved.
        """
        ...

    def generate(
        self, requests: Sequence[Request], settings: AnswerSettings, on_answers: OnAnswers = lambda _: None
    ) -> list[Answer]:
        """An answer to each request, in any order. Requests that a server cannot answer have none.

        Args:
            on_answers: called with answers as they are completed.

        Raises: BatchSizeHalved. ModelError if the teacher's logits are not all finite.
        """
        ...

    def close(self) -> None:
        """Frees what outlives the object, such as other processes."""
        ...
