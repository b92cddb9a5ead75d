"""llama.cpp's server: its own `/completion` with `n_probs`; its OpenAI-compatible part takes no prompts of token ids.

It lists the most likely tokens only where it generates one, so given text is generated too: a grammar of token ids
(`<[123]>`) leaves no choice. Cost: a decoding step for each position that has targets; what is before the first of them
is read at once. A grammar cannot demand special tokens or parts of characters, so behind each of those a request begins
anew.

A generated token has no list if it leaves a character incomplete, or belongs to a string that stops an answer.
Each of them costs a request that generates any other token in its place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from pipeline.teacher.engines.answers import EOS, LENGTH, STOP_STRING
from pipeline.teacher.engines.server.dialect import Advice, Prompt, Sampling, Written, check_known
from pipeline.teacher.engines.server.http_client import Query, UnusableAnswer
from pipeline.teacher.engines.server.server_config import ServerKind
from pipeline.teacher.engines.server.top_lists import TopLists

T = TypeVar("T")

PATH = "/completion"
GAP = 16  # positions without targets that are generated rather than read by another request
ALL = 2**30  # more tokens than any vocabulary has
SAMPLERS = ("temperature", "top_k", "top_p")
NEUTRAL = {"samplers": SAMPLERS, "dynatemp_range": 0.0, "mirostat": 0, "logit_bias": [], "ignore_eos": False}
"""Given always: where a request is silent, the server takes what it was started with."""
NO_MESSAGE = json.dumps({"parsers": [{"type": "start"}], "rules": {}, "root": 0})
"""A parser of answers that stops before the first character. The server's own parser, which looks for messages and
tool calls, ends a request with status 500 if the text is not valid UTF-8 (llama.cpp #27543)."""
FIELDS = ("tokens", "completion_probabilities", "tokens_evaluated", "stop_type")


@dataclass
class _Text:
    """A text, and what the server has listed at its positions.

    Attributes:
        wanted: ascending positions.
        with_own: the log-probabilities of the text's own tokens are wanted too.
        items: by position, the server's entry for the token that it generated there.
        alone: positions that have to be asked for without those behind.
    """

    token_ids: Sequence[int]
    wanted: Sequence[int]
    with_own: bool = False
    items: dict[int, dict[str, Any]] = field(default_factory=dict)
    alone: set[int] = field(default_factory=set)

    def add(self, start: int, generated: Sequence[int], items: Sequence[dict[str, Any]]) -> None:
        """Args: start: position at which the first token was generated."""
        places = _places(generated, [int(item["id"]) for item in items])
        found = {start + place: item for place, item in zip(places, items, strict=True) if place is not None}
        self.alone |= set(range(start, start + len(generated))) - found.keys()
        self.items |= found

    def own(self, position: int) -> float | None:
        """The log-probability of the text's own token; None if it is not known."""
        item, token = self.items[position], self.token_ids[position + 1]
        entries = (item, *item["top_logprobs"])
        return next((float(each["logprob"]) for each in entries if each["id"] == token), None)

    def lists(self, k: int, vocab_size: int) -> TopLists:
        listed = [self.items[t]["top_logprobs"][:k] for t in self.wanted]
        return TopLists.read([[(each["id"], each["logprob"]) for each in items] for items in listed], k, vocab_size)


class LlamaCppDialect:
    """See `Dialect`. Args: tokenizer: of the model."""

    kind: ServerKind = "llama.cpp"
    advice = Advice(
        cap="Use {k} or fewer entries, or a version of llama-server that gives as many as n_probs asks for.",
        length="Start llama-server with a ctx-size of {length} or more for each of its parallel slots",
        raw="Use a version of llama-server that knows post_sampling_probs.",
        raw_answers="Use a version of llama-server that knows post_sampling_probs.",
        whole="Use a version of llama-server whose grammars take token ids, as <[123]>.",
        ids="Use a version of llama-server that takes prompts of token ids unchanged.",
    )

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        self._demanded: dict[int, bool] = {}
        self._any = int(tokenizer("a", add_special_tokens=False)["input_ids"][-1])

    def tokenize(self, text: str) -> Query[Any]:
        body = {"content": text, "add_special": False, "parse_special": False}
        return Query("/tokenize", body, lambda answer: answer)

    def prompt(self, prompt: Prompt, vocab_size: int) -> Query[TopLists]:
        text = _Text(prompt.token_ids, prompt.positions)
        found = self._rest(text, prompt.k, prompt.temperature, lambda: text.lists(prompt.k, vocab_size))
        assert isinstance(found, Query)  # since nothing is known yet
        return found

    def answer(self, sampling: Sampling, vocab_size: int) -> Query[Written]:
        body = _body(sampling.token_ids, sampling.k, sampling.temperature) | {
            "n_predict": sampling.max_tokens,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": sampling.seed,
            "stop": list(sampling.stop),
        }

        def read(answer: Any) -> Written | Query[Written]:
            generated, items = _generated(answer, len(sampling.token_ids))
            reason = _stop_reason(answer.get("stop_type"), len(generated), sampling.max_tokens)
            token_ids = generated[: sampling.max_tokens]
            ends = [i for i, token in enumerate(token_ids) if token in sampling.stop_tokens]
            if ends:  # the server stops only at the tokens named in the model's file
                token_ids, reason = token_ids[: ends[0] + 1], EOS
            check_known(token_ids, vocab_size)
            start = len(sampling.token_ids) - 1
            text = _Text([*sampling.token_ids, *token_ids], range(start, start + len(token_ids)), with_own=True)
            text.add(start, generated, items)

            def written() -> Written:
                return Written(
                    token_ids=token_ids,
                    logprobs=[each for t in text.wanted if (each := text.own(t)) is not None],
                    lists=text.lists(sampling.k, vocab_size),
                    stop_reason=reason,
                )

            return self._rest(text, sampling.k, sampling.temperature, written)

        return Query(PATH, body, read)

    def _rest(self, text: _Text, k: int, temperature: float, result: Callable[[], T]) -> T | Query[T]:
        """The request for the next positions that have no list, or the result once all have."""
        start = next((t for t in text.wanted if not _is_known(text, t)), None)
        if start is None:
            return result()
        seen, run = start in text.items, self._run(text, start)
        body = _body(text.token_ids[: start + 1], ALL if seen else k, temperature) | {
            "grammar": "root ::= " + " ".join(f"<[{token}]>" for token in run),
            "n_predict": len(run),
        }

        def read(answer: Any) -> T | Query[T]:
            token_ids, items = _generated(answer, start + 1)
            if token_ids != run:
                raise UnusableAnswer(f"found {len(token_ids)} tokens, expected the {len(run)} of the grammar", "whole")
            text.add(start, token_ids, items)
            if len(run) == 1 and (start not in text.items or (seen and not _is_known(text, start))):
                raise UnusableAnswer(f"found no log-probabilities of token {run[0]}, expected those of every token")
            return self._rest(text, k, temperature, result)

        return Query(PATH, body, read)

    def _run(self, text: _Text, start: int) -> list[int]:
        """The tokens to generate from a position on: those of the text, and any at the last."""
        stop = start
        if start not in text.alone:
            for t in text.wanted:
                if t > stop + GAP:
                    break
                stop = max(t, stop)
        run = []
        for token in text.token_ids[start + 1 : stop + 1]:
            if not self._can_be_demanded(token):
                break
            run.append(token)
        return [*run, self._any]

    def _can_be_demanded(self, token: int) -> bool:
        """Whether a grammar can leave no other choice: the server would abort if it could not."""
        if token not in self._demanded:
            text = str(self._tokenizer.decode([token]))
            whole = text != "" and text[0] != "\0" and "\ufffd" not in text
            self._demanded[token] = whole and token not in self._special
        return self._demanded[token]


def _is_known(text: _Text, position: int) -> bool:
    return position in text.items and not (text.with_own and text.own(position) is None)


def _body(token_ids: Sequence[int], k: int, temperature: float) -> dict[str, Any]:
    return {
        "prompt": list(token_ids),
        "n_probs": k,
        "post_sampling_probs": False,
        "temperature": temperature,
        "return_tokens": True,
        "response_fields": FIELDS,
        "chat_parser": NO_MESSAGE,
        **NEUTRAL,
    }


def _generated(answer: Any, prompt_tokens: int) -> tuple[list[int], list[dict[str, Any]]]:
    """The tokens that were generated, and an entry for each that has a list."""
    try:
        token_ids = [int(token) for token in answer["tokens"]]
        items = [dict(item) for item in answer.get("completion_probabilities") or []]
        read = answer["tokens_evaluated"]
        for item in items:
            for each in (item, *item["top_logprobs"]):
                _ = int(each["id"]), float(each["logprob"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnusableAnswer(f"found no tokens with completion_probabilities in the answer ({error!r})") from None
    if read != prompt_tokens:
        raise UnusableAnswer(f"the server read {read} tokens of a prompt, expected {prompt_tokens}", "ids")
    if not token_ids:
        raise UnusableAnswer("found no token in the answer, expected at least one")
    return token_ids, items


def _stop_reason(found: Any, tokens: int, most: int) -> str:
    if found == "limit" and tokens < most:
        raise UnusableAnswer(f"the server ended an answer after {tokens} tokens, expected up to {most}")
    reasons = {"eos": EOS, "word": STOP_STRING, "limit": LENGTH}
    if found not in reasons:
        raise UnusableAnswer(f"found stop_type {found!r}, expected one of {', '.join(reasons)}")
    return reasons[found]


def _places(generated: Sequence[int], listed: Sequence[int]) -> list[int | None]:
    """Where in `generated` each of the tokens in `listed`, some of them, stands; None where that is uncertain.

    Raises: UnusableAnswer if they are not among them in this order.
    """
    first = _first_places(generated, listed)
    last = [len(generated) - 1 - place for place in _first_places(generated[::-1], listed[::-1])][::-1]
    return [one if one == other else None for one, other in zip(first, last, strict=True)]


def _first_places(generated: Sequence[int], listed: Sequence[int]) -> list[int]:
    places, start = [], 0
    for token in listed:
        try:
            start = generated.index(token, start) + 1
        except ValueError:
            raise UnusableAnswer(f"found log-probabilities of token {token}, which was not generated there") from None
        places.append(start - 1)
    return places
