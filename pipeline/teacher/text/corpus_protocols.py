"""What the text of a run has in common, be it a corpus, prompts, or the answers to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from pipeline.models.objective import Objective


class Text(Protocol):
    """What a teacher is opened for and a cache is described by: a corpus, prompts, or the answers to them."""

    @property
    def objective(self) -> Objective: ...

    @property
    def description(self) -> dict[str, Any]: ...


class TokenisedText(Text, Protocol):
    """What a teacher is to read: a corpus, or prompts."""

    @property
    def has_teacher_prompts(self) -> bool:
        """Whether the teacher reads other prompts than the student."""
        ...

    @property
    def longest_read(self) -> int:
        """Tokens that the teacher reads for a row, at most."""
        ...

    def first_token_beyond(self, limit: int) -> tuple[int, int] | None:
        """(row of the source, id) of the first token with an id of `limit` or more."""
        ...


class CachedText(Text, Protocol):
    """The text of a cache: a corpus, or the answers that were kept."""

    def __len__(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_loss_tokens(self) -> int: ...

    @property
    def token_stream_sha256(self) -> str: ...

    @property
    def report(self) -> Mapping[str, float]: ...

    @property
    def documents_file(self) -> bytes | None: ...
