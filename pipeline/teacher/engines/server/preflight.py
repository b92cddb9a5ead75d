"""Asks a server a few questions before anything is written, and says what to change if it cannot be a teacher.

length         documents fit its context
tokenizer      it splits a text into the tokens of the local tokenizer
ids            it scores the ids that it is sent, one log-probability for each, nothing added (BOS) or left out
entries        it gives K log-probabilities of each position, finite ones of one distribution
temperature    the same for requests at temperature 1 and 2: the model's own distribution, not the sampler's
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.errors import ConfigError, ModelError
from pipeline.teacher.engines.server.dialect import Dialect, Prompt
from pipeline.teacher.engines.server.http_client import HttpClient, Refused, Unusable
from pipeline.teacher.engines.server.server_kinds import ServerFacts
from pipeline.teacher.engines.server.top_lists import TopLists

PROBE = "The café, built in 1923, cost 1,450 €;\n  people said: “it's far too small”. Then 東京 came."
MOST_UNUSABLE = 3
TEMPERED_NATS = 0.1
"""Mean difference of log-probabilities between two requests that is more than rounding in any precision."""


def check_length(facts: ServerFacts, dialect: Dialect, seq_len: int, longest: int) -> None:
    """Args: longest: tokens of the longest request, including one that is generated. Raises: ConfigError."""
    if facts.max_length is not None and longest > facts.max_length:
        raise ConfigError(
            f"`seq_len` {seq_len}: the server takes at most {facts.max_length:,} tokens, expected {longest:,}, "
            f"since it generates one more. {dialect.advice.length.format(length=longest)}, or use `seq_len` "
            f"{facts.max_length - (longest - seq_len)} or less."
        )


def check_tokenizer(client: HttpClient, dialect: Dialect, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compares the tokens of a text, where the server splits texts at all. Raises: ConfigError."""
    ours = local_tokens(tokenizer)
    try:
        body = dialect.tokenize_body(PROBE)
        theirs = client.post("/tokenize", body, lambda answer: answer, most_unusable=MOST_UNUSABLE).result()
    except Refused:
        return
    theirs = theirs.get("tokens") if isinstance(theirs, dict) else theirs
    if theirs != ours:
        raise ConfigError(
            f"`tokenizer`: the server splits {PROBE[:20]!r}… into other tokens: found {_shown(theirs)}, expected "
            f"{_shown(ours)}. Give the tokenizer of the model that the server runs, or start the server with this one."
        )


def check_answers(client: HttpClient, dialect: Dialect, token_ids: Sequence[int], k: int, size: int) -> None:
    """Sends a prompt twice. Args: size: V. Raises: ConfigError, ModelError."""
    prompt = Prompt(token_ids=token_ids, positions=range(len(token_ids) - 1), k=k)
    at_one = _ask(client, dialect, prompt, size)
    at_two = _ask(client, dialect, replace(prompt, temperature=2.0), size)
    difference = float(np.abs(at_one.logprobs - at_two.logprobs).mean())
    if difference > TEMPERED_NATS:
        raise ModelError(
            f"{client.root}: its log-probabilities depend on the temperature of sampling (by {difference:.2f} nats at "
            f"2 instead of 1), so they are not the teacher's own. {dialect.advice.raw}"
        )


def local_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Of the probe, without special tokens."""
    return [int(token) for token in tokenizer(PROBE, add_special_tokens=False)["input_ids"]]


def _ask(client: HttpClient, dialect: Dialect, prompt: Prompt, size: int) -> TopLists:
    try:
        return _lists(client, dialect, prompt, size)
    except Unusable as error:
        advice = "Use another server." if error.advice is None else getattr(dialect.advice, error.advice)
        raise ModelError(f"{error} {advice.format(k=prompt.k)}") from error
    except Refused as error:
        if error.status not in (400, 422) or prompt.k == 1 or not _answers(client, dialect, prompt, size):
            raise
        raise ConfigError(
            f"`top_k` {prompt.k}: more than this server gives: {error} {dialect.advice.cap.format(k=prompt.k)}"
        ) from error


def _answers(client: HttpClient, dialect: Dialect, prompt: Prompt, size: int) -> bool:
    """Whether the server answers if it is asked for one entry of each position."""
    try:
        _lists(client, dialect, replace(prompt, k=1), size)
    except Refused:
        return False
    return True


def _lists(client: HttpClient, dialect: Dialect, prompt: Prompt, size: int) -> TopLists:
    body = dialect.prompt_body(prompt)
    read = lambda answer: dialect.read_prompt(answer, prompt, size)  # noqa: E731
    return client.post(dialect.prompt_path, body, read, most_unusable=MOST_UNUSABLE).result()


def _shown(tokens: object) -> str:
    return f"{len(tokens)} ({', '.join(map(str, tokens[:6]))}, …)" if isinstance(tokens, list) else "none"
