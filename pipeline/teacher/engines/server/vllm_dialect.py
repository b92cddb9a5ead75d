"""`vllm serve`: `/v1/completions` with prompts of token ids and `prompt_logprobs`.

An answer has, for every token of the prompt but the first, the K most likely tokens and the token itself: K + 1 entries
where it is not among them. Keys are token ids, so tokens that look alike as text cannot be confused; those of generated
tokens are `token_id:N`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.teacher.engines.answers import EOS, LENGTH, STOP_STRING
from pipeline.teacher.engines.server.dialect import Advice, Prompt, Sampling, Written, check_echo, check_known, list_of
from pipeline.teacher.engines.server.http_client import Query, UnusableAnswer
from pipeline.teacher.engines.server.server_config import ServerKind
from pipeline.teacher.engines.server.top_lists import Entries, TopLists

PATH = "/v1/completions"
PREFIX = "token_id:"
NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
"""Given always: where a request is silent, the server takes the model's generation_config.json."""


class VllmDialect:
    """See `Dialect`. Args: model: as the server names it."""

    kind: ServerKind = "vllm"
    advice = Advice(
        cap="Start vllm serve with --max-logprobs {k} or more.",
        length="Start vllm serve with --max-model-len {length} or more",
        raw="Start vllm serve with --logprobs-mode raw_logprobs.",
        raw_answers="Start vllm serve with --logprobs-mode raw_logprobs.",
        whole="Start vllm serve with --no-enable-prefix-caching.",
        ids="Use a version of vllm serve that takes prompts of token ids unchanged and returns them (0.10 or newer).",
    )

    def __init__(self, model: str) -> None:
        self.model = model

    def tokenize(self, text: str) -> Query[Any]:
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        return Query("/tokenize", body, lambda answer: answer)

    def prompt(self, prompt: Prompt, vocab_size: int) -> Query[TopLists]:
        body = self._body(prompt.token_ids) | {
            "prompt_logprobs": prompt.k,
            "max_tokens": 1,  # the server always generates a token
            "temperature": prompt.temperature,
        }
        return Query(PATH, body, lambda answer: _read_prompt(answer, prompt, vocab_size))

    def answer(self, sampling: Sampling, vocab_size: int) -> Query[Written]:
        body = self._body(sampling.token_ids) | {
            "logprobs": sampling.k,
            "return_tokens_as_token_ids": True,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": sampling.seed,
            "stop": list(sampling.stop),
            "stop_token_ids": list(sampling.stop_tokens),
            "ignore_eos": True,  # unless it is one of these
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            **NEUTRAL,
        }
        return Query(PATH, body, lambda answer: _read_answer(answer, sampling, vocab_size))

    def _body(self, token_ids: Sequence[int]) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": list(token_ids),
            "add_special_tokens": False,
            "return_token_ids": True,
        }


def _choice(answer: Any, sent: Sequence[int]) -> dict[str, Any]:
    try:
        (choice,) = answer["choices"]
        echoed = choice["prompt_token_ids"]
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableAnswer(f"found no choice with prompt_token_ids in the answer ({error!r})") from None
    check_echo(echoed, sent)
    return dict(choice)


def _read_prompt(answer: Any, prompt: Prompt, vocab_size: int) -> TopLists:
    found = _choice(answer, prompt.token_ids).get("prompt_logprobs")
    logprobs = list_of(found, len(prompt.token_ids), "prompt_logprobs")
    lists = [_entries(logprobs[t + 1], prompt.token_ids[t + 1], prompt.k) for t in prompt.positions]
    return TopLists.read(lists, prompt.k, vocab_size)


def _read_answer(answer: Any, sampling: Sampling, vocab_size: int) -> Written:
    choice = _choice(answer, sampling.token_ids)
    try:
        token_ids = [int(token) for token in choice["token_ids"]]
        found, logprobs = choice["logprobs"]["top_logprobs"], choice["logprobs"]["token_logprobs"]
        by_id = [{int(str(token).removeprefix(PREFIX)): p for token, p in each.items()} for each in found]
        reason = LENGTH if choice["finish_reason"] == "length" else EOS
        reason = STOP_STRING if isinstance(choice["stop_reason"], str) else reason
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnusableAnswer(f"found no token_ids with logprobs of {PREFIX}N in the answer ({error!r})") from None
    if not token_ids:
        raise UnusableAnswer("found no token in the answer, expected at least the one that ends it")
    check_known(token_ids, vocab_size)
    list_of(by_id, len(token_ids), "top_logprobs")
    list_of(logprobs, len(token_ids), "token_logprobs")
    k = sampling.k
    lists = [
        [(token, p) for token, p in each.items() if len(each) == k or token != own]
        for own, each in zip(token_ids, by_id, strict=True)
    ]
    return Written(
        token_ids=token_ids, logprobs=logprobs, lists=TopLists.read(lists, k, vocab_size), stop_reason=reason
    )


def _entries(found: Any, own: int, k: int) -> Entries:
    """The K most likely tokens, without the prompt's own token if it is there besides."""
    if not isinstance(found, dict) or str(own) not in found:
        raise UnusableAnswer(f"found no log-probability of token {own} of the prompt, expected that of every token")
    try:
        return [(int(token), each["logprob"]) for token, each in found.items() if len(found) == k or token != str(own)]
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableAnswer(f"found an entry of prompt_logprobs without id or logprob ({error!r})") from None
