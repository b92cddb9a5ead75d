"""Asks a server a few questions before anything is written, and says what to change if it cannot be a teacher.

length         documents fit its context
tokenizer      it splits a text into the tokens of the local tokenizer
ids            it scores the ids that it is sent, one log-probability for each, nothing added (BOS) or left out
entries        it gives K log-probabilities of each position, finite ones of one distribution
temperature    the same at temperature 1 and at another: the model's own distribution, not the sampler's
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.errors import ConfigError, ModelError
from pipeline.teacher.engines.server.dialect import Dialect, Prompt, Sampling
from pipeline.teacher.engines.server.http_client import HttpClient, Query, Refused, Unusable, Unwanted
from pipeline.teacher.engines.server.server_kinds import ServerFacts
from pipeline.teacher.engines.server.top_lists import TopLists

T = TypeVar("T")

PROBE = "The café, built in 1923, cost 1,450 €;\n  people said: “it's far too small”. Then 東京 came."
MOST_UNUSABLE = 3
OTHER_TEMPERATURES = (2.0, 1.5, 0.5)
"""The first that the server takes is compared with 1; not all take 2, or more than 1."""
TEMPERED_NATS = 0.1
"""Mean difference of log-probabilities between two requests that is more than rounding in any precision."""


def check_length(facts: ServerFacts, dialect: Dialect, seq_len: int, longest: int, cache: str | None) -> None:
    """
    Args:
        longest: tokens of the longest request, including one that is generated.
        cache: as in `open_server`.

    Raises: ConfigError.
    """
    if facts.max_length is None or longest <= facts.max_length:
        return
    more = longest - seq_len
    subject = f"`seq_len` {seq_len}" if cache is None else f"{cache}, documents of {seq_len} tokens"
    instead = f", or use `seq_len` {facts.max_length - more} or less" if cache is None else ""
    raise ConfigError(
        f"{subject}: the server takes at most {facts.max_length:,} tokens, expected {longest:,}"
        f"{', since it generates one more' if more else ''}. {dialect.advice.length.format(length=longest)}{instead}."
    )


def check_tokenizer(client: HttpClient, dialect: Dialect, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compares the tokens of a text, where the server splits texts at all. Raises: ConfigError."""
    ours, query = local_tokens(tokenizer), dialect.tokenize(PROBE)
    if query is None:
        return
    try:
        theirs = _result(client, query)
    except Refused:
        return
    theirs = theirs.get("tokens") if isinstance(theirs, dict) else theirs
    if theirs != ours:
        raise ConfigError(
            f"`tokenizer`: the server splits {PROBE[:20]!r}… into other tokens: found {_shown(theirs)}, expected "
            f"{_shown(ours)}. Give the tokenizer of the model that the server runs, or start the server with this one."
        )


def check_distributions(
    client: HttpClient,
    dialect: Dialect,
    token_ids: Sequence[int],
    k: int,
    size: int,
    subject: str,
    *,
    generates: bool,
) -> None:
    """Asks at two temperatures of sampling, which must not matter, for the distributions of a text.

    Args:
        size: V.
        subject: where K comes from, for errors.
        generates: ask for those of a generated token, otherwise for those of the text's own positions.

    Raises: ConfigError, ModelError.
    """
    ask, advice = _of_prompt, dialect.advice.raw
    if generates:
        ask, advice = _of_answer, dialect.advice.raw_answers
    lists = partial(ask, client, dialect, token_ids, size)
    try:
        at_one = _at_one(lists, k, subject, dialect.advice.cap)
        temperature, at_another = _at_another_temperature(partial(lists, k))
    except Unusable as error:
        hint = "Use another server." if error.advice is None else getattr(dialect.advice, error.advice)
        hint = advice if error.advice == "raw" else hint
        raise ModelError(f"{error} {hint.format(k=k)}") from error
    difference = float(np.abs(at_one.logprobs - at_another.logprobs).mean())
    if difference > TEMPERED_NATS:
        raise ModelError(
            f"{client.root}: its log-probabilities depend on the temperature of sampling (by {difference:.2f} nats at "
            f"{temperature:g} instead of 1), so they are not the teacher's own. {advice}"
        )


def local_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of the probe, without special ones."""
    return [int(token) for token in tokenizer(PROBE, add_special_tokens=False)["input_ids"]]


def _of_prompt(
    client: HttpClient, dialect: Dialect, token_ids: Sequence[int], size: int, k: int, temperature: float
) -> TopLists:
    prompt = Prompt(token_ids=token_ids, positions=range(len(token_ids) - 1), k=k, temperature=temperature)
    return _result(client, dialect.prompt(prompt, size))


def _of_answer(
    client: HttpClient, dialect: Dialect, token_ids: Sequence[int], size: int, k: int, temperature: float
) -> TopLists:
    sampling = Sampling(
        token_ids=token_ids,
        messages=lambda: [{"role": "user", "content": PROBE}],
        k=k,
        max_tokens=1,
        temperature=temperature,
        top_p=1.0,
        top_k=0,
        seed=0,
        stop=(),
        stop_tokens=(),
    )
    for seed in range(MOST_UNUSABLE):
        try:
            return _result(client, dialect.answer(replace(sampling, seed=seed), size)).lists
        except Unwanted as error:
            unwanted = error
    raise ModelError(f"{client.root}: {unwanted}, in {MOST_UNUSABLE} answers. Use another model or server.")


def _at_one(lists: Callable[[int, float], TopLists], k: int, subject: str, advice: str) -> TopLists:
    """Raises: ConfigError if the server gives fewer entries."""
    try:
        return lists(k, 1.0)
    except Refused as error:
        if not _is_about_request(error) or k == 1 or not _gives(lists, 1):
            raise
        raise ConfigError(f"{subject}: more than this server gives: {error} {advice.format(k=k)}") from error


def _at_another_temperature(lists: Callable[[float], TopLists]) -> tuple[float, TopLists]:
    """Raises: Refused if the server takes none."""
    for temperature in OTHER_TEMPERATURES:
        try:
            return temperature, lists(temperature)
        except Refused as error:
            if not _is_about_request(error):
                raise
            refused = error
    raise refused


def _is_about_request(error: Refused) -> bool:
    return error.status in (400, 422)


def _gives(lists: Callable[[int, float], TopLists], k: int) -> bool:
    try:
        lists(k, 1.0)
    except Refused:
        return False
    return True


def _result(client: HttpClient, query: Query[T]) -> T:
    return client.post(query, most_unusable=MOST_UNUSABLE).result()


def _shown(tokens: object) -> str:
    return f"{len(tokens)} ({', '.join(map(str, tokens[:6]))}, …)" if isinstance(tokens, list) else "none"
