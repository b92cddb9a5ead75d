"""What one kind of server is asked, and how its answers are read. Dialects do no input or output.

A distribution that is predicted *from* position t stands in an answer beside token t + 1, the one it was to predict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.teacher.engines.answers import Messages
from pipeline.teacher.engines.server.http_client import Query, UnusableAnswer, Unwanted
from pipeline.teacher.engines.server.server_config import ServerKind
from pipeline.teacher.engines.server.top_lists import TopLists


@dataclass(frozen=True)
class Advice:
    """How a server has to be started, to put at the end of an error: flags of the server, not of this program."""

    cap: str  # for more log-probabilities of a position; {k}
    length: str  # for longer documents; {length}
    raw: str  # for log-probabilities of the model's own distribution
    raw_answers: str  # the same, of tokens that it generates
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


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """An answer that is asked for.

    Attributes:
        token_ids: of the prompt.
        messages: the same, before a chat template rendered them.
        k: number of most likely tokens at each position of the answer.
        max_tokens: length of the answer at most.
        top_k: 0: all tokens.
        stop: strings that end it.
        stop_tokens: tokens that end it; no others do.
    """

    token_ids: Sequence[int]
    messages: Messages | None
    k: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: Sequence[str]
    stop_tokens: Sequence[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Written:
    """An answer.

    Attributes:
        token_ids: including the one that ended it, if the server gives that.
        logprobs: of these tokens.
        lists: at the positions that they were drawn from.
        stop_reason: one of `STOP_REASONS`.
    """

    token_ids: list[int]
    logprobs: list[float]
    lists: TopLists
    stop_reason: str


class Dialect(Protocol):
    """How one kind of server is talked to."""

    kind: ServerKind
    advice: Advice

    def tokenize(self, text: str) -> Query[Any] | None:
        """The tokens of a text, without special tokens; None if the server does not give them."""
        ...

    def prompt(self, prompt: Prompt, vocab_size: int) -> Query[TopLists]:
        """The lists of the wanted positions."""
        ...

    def answer(self, sampling: Sampling, vocab_size: int) -> Query[Written]: ...


def check_echo(found: Any, sent: Sequence[int]) -> None:
    """Raises: UnusableAnswer if the server scored other tokens than it was sent."""
    if not isinstance(found, list):
        raise UnusableAnswer("found no token ids of the prompt in the answer, expected those that were sent", "ids")
    if found != list(sent):
        raise UnusableAnswer(
            f"the server scored tokens that it was not sent: found {len(found)} ({_beginning(found)}), expected "
            f"{len(sent)} ({_beginning(sent)})",
            "ids",
        )


def check_known(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises: Unwanted if an answer has a token that the tokenizer does not know: output matrices have more rows."""
    if beyond := [token for token in token_ids if not 0 <= token < vocab_size]:
        raise Unwanted(f"found token id {beyond[0]} in the answer, expected ids below {vocab_size:,}")


def _beginning(token_ids: Sequence[Any]) -> str:
    return ", ".join(map(str, token_ids[:4])) + (", …" if len(token_ids) > 4 else "")


def list_of(found: Any, expected: int, what: str) -> list[Any]:
    """What was found. Raises: UnusableAnswer if it is not a list of the expected length."""
    if not isinstance(found, list) or len(found) != expected:
        number = len(found) if isinstance(found, list) else "no"
        raise UnusableAnswer(f"found {number} {what}, expected {expected}", "whole")
    return found
