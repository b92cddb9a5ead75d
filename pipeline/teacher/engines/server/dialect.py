"""What one kind of server is asked, and how its answers are read. Dialects do no input or output.

A distribution that is predicted *from* position t stands in an answer beside token t + 1, the one it was to predict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.teacher.engines.server.http_client import UnusableAnswer
from pipeline.teacher.engines.server.server_config import ServerKind
from pipeline.teacher.engines.server.top_lists import TopLists


@dataclass(frozen=True)
class Advice:
    """How a server has to be started, to put at the end of an error: flags of the server, not of this program."""

    cap: str  # for more log-probabilities of a position; {k}
    length: str  # for longer documents; {length}
    raw: str  # for log-probabilities of the model's own distribution
    whole: str  # for those of every token of a prompt
    ids: str  # for token ids that are taken as they are


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A document whose next-token distributions are asked for.

    Attributes:
        token_ids: sent as they are.
        positions: ascending positions t < len(token_ids) - 1 whose predictions are wanted.
        k: number of most likely tokens.
        temperature: sent along; must not change the answer.
    """

    token_ids: Sequence[int]
    positions: Sequence[int]
    k: int
    temperature: float = 1.0


class Dialect(Protocol):
    """Attributes: prompt_path: where prompts are sent, below the root of the server."""

    kind: ServerKind
    prompt_path: str
    advice: Advice

    def tokenize_body(self, text: str) -> dict[str, Any]:
        """For the path /tokenize, without special tokens."""
        ...

    def prompt_body(self, prompt: Prompt) -> dict[str, Any]: ...

    def read_prompt(self, answer: Any, prompt: Prompt, vocab_size: int) -> TopLists:
        """The lists of the wanted positions. Raises: UnusableAnswer."""
        ...


def check_echo(found: Any, sent: Sequence[int]) -> None:
    """Raises: UnusableAnswer if the server scored other tokens than it was sent."""
    if not isinstance(found, list):
        raise UnusableAnswer("found no token ids of the prompt in the answer, expected those that were sent", "ids")
    if found != list(sent):
        raise UnusableAnswer(
            f"the server scored other tokens than it was sent: found {len(found)} ({_beginning(found)}), expected "
            f"{len(sent)} ({_beginning(sent)})",
            "ids",
        )


def _beginning(token_ids: Sequence[Any]) -> str:
    return ", ".join(map(str, token_ids[:4])) + (", …" if len(token_ids) > 4 else "")


def check_length(found: Any, expected: int, what: str) -> None:
    """Raises: UnusableAnswer."""
    if not isinstance(found, list) or len(found) != expected:
        number = len(found) if isinstance(found, list) else "no"
        raise UnusableAnswer(f"found {number} {what}, expected {expected}", "whole")
