"""Hosted APIs in OpenAI's form: `/v1/chat/completions` with `logprobs`, of what the model answers to messages.

There are no token ids, and the server applies its own chat template. Tokens are found by text and bytes. One that is
not exactly one token of the tokenizer ends the run: the ids of an answer have to be known. The token that ends an
answer is not returned, so the answer is stored without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.errors import ModelError
from pipeline.teacher.engines.answers import EOS, LENGTH
from pipeline.teacher.engines.server.dialect import Advice, Prompt, Sampling, Written, check_known
from pipeline.teacher.engines.server.http_client import Query, UnusableAnswer, Unwanted
from pipeline.teacher.engines.server.server_config import ServerKind
from pipeline.teacher.engines.server.token_names import TokenNames
from pipeline.teacher.engines.server.top_lists import MINUS_INFINITY, TopLists

PATH = "/v1/chat/completions"
THOUGHTS = ("reasoning_content", "reasoning")


class ChatDialect:
    """See `Dialect`.

    Args:
        model: as the server names it.
        tokenizer: of the model.
    """

    kind: ServerKind = "openai"
    advice = Advice(
        cap="Hosted APIs give 20 or fewer.",
        length="Use an API with a longer context",
        raw="Use an API that gives the model's own log-probabilities.",
        raw_answers="Use an API that gives the model's own log-probabilities.",
        whole="Use an API that gives log-probabilities of every token.",
        ids="Use an API that takes messages unchanged.",
    )

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.names = model, TokenNames(tokenizer)

    def tokenize(self, text: str) -> None:
        return None

    def prompt(self, prompt: Prompt, vocab_size: int) -> Query[TopLists]:
        raise NotImplementedError  # `check_served` asks for `generate`

    def answer(self, sampling: Sampling, vocab_size: int) -> Query[Written]:
        assert sampling.messages is not None  # requests come from prompts
        body = {
            "model": self.model,
            "messages": list(sampling.messages()),
            "logprobs": True,
            "top_logprobs": sampling.k,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
        return Query(PATH, body, lambda answer: self._read(answer, sampling, vocab_size))

    def _read(self, answer: Any, sampling: Sampling, vocab_size: int) -> Written:
        try:
            (choice,) = answer["choices"]
            finish, message = choice["finish_reason"], choice["message"]
            thoughts = any(message.get(name) for name in THOUGHTS)
            details = (answer.get("usage") or {}).get("completion_tokens_details") or {}
            _check_usable(choice, thoughts=thoughts or bool(details.get("reasoning_tokens")))
            content = [dict(item) for item in choice["logprobs"]["content"]]
            logprobs = [float(item["logprob"]) for item in content]
            listed = [[(each, float(each["logprob"])) for each in item["top_logprobs"]] for item in content]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UnusableAnswer(f"found no choice with logprobs.content in the answer ({error!r})", "whole") from None
        token_ids = [self._token(item, i) for i, item in enumerate(content)]
        check_known(token_ids, vocab_size)
        lists = [[(self._token(each, i), p) for each, p in entries] for i, entries in enumerate(listed)]
        found = TopLists.read(lists, sampling.k, vocab_size)
        found.check_own(list(zip(logprobs, token_ids, strict=True)))
        if min(logprobs) <= MINUS_INFINITY:
            raise UnusableAnswer("found a token without a log-probability in the answer, expected one for each")
        return Written(
            token_ids=token_ids, logprobs=logprobs, lists=found, stop_reason=LENGTH if finish == "length" else EOS
        )

    def _token(self, item: Mapping[str, Any], place: int) -> int:
        """Raises: ModelError if it cannot be known."""
        name = item.get("token")
        found = self.names.find(name, item.get("bytes"))
        if found is None:
            raise ModelError(
                f"token {place} of the answer: found {name!r} (bytes {item.get('bytes')}), expected the name of "
                "exactly one token, since the API gives no ids. Give the tokenizer of its model as `tokenizer`."
            )
        return found


def _check_usable(choice: Mapping[str, Any], *, thoughts: bool) -> None:
    """Checks an answer before its log-probabilities are read, which one that cannot be used need not have.

    Raises: ModelError if the model thinks; Unwanted if there is no answer, or only a part of one.
    """
    if thoughts:
        raise ModelError(
            "the model thought before it answered: its predictions depend on thoughts that are not returned with "
            "log-probabilities. Turn thinking off, or use another model."
        )
    if choice["finish_reason"] not in ("stop", "length"):
        raise Unwanted(f"the server ended an answer by {choice['finish_reason']}, expected stop or length")
    if not choice["message"].get("content") and not (choice["logprobs"] or {}).get("content"):
        raise Unwanted("found no token in the answer, expected at least one")
