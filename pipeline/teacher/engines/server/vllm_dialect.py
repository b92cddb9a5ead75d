"""`vllm serve`: `/v1/completions` with prompts of token ids and `prompt_logprobs`.

An answer has, for every token of the prompt but the first, the K most likely tokens and the token itself: K + 1 entries
where it is not among them. Keys are token ids, so tokens that look alike as text cannot be confused.
"""

from __future__ import annotations

from typing import Any

from pipeline.teacher.engines.server.dialect import Advice, Prompt, check_echo, check_length
from pipeline.teacher.engines.server.http_client import UnusableAnswer
from pipeline.teacher.engines.server.server_config import ServerKind
from pipeline.teacher.engines.server.top_lists import Entries, TopLists


class VllmDialect:
    """Args: model: as the server names it."""

    kind: ServerKind = "vllm"
    prompt_path = "/v1/completions"
    advice = Advice(
        cap="Start vllm serve with --max-logprobs {k} or more.",
        length="Start vllm serve with --max-model-len {length} or more",
        raw="Start vllm serve with --logprobs-mode raw_logprobs.",
        whole="Start vllm serve with --no-enable-prefix-caching.",
        ids="Use a version of vllm serve that takes prompts of token ids unchanged and returns them (0.10 or newer).",
    )

    def __init__(self, model: str) -> None:
        self.model = model

    def tokenize_body(self, text: str) -> dict[str, Any]:
        return {"model": self.model, "prompt": text, "add_special_tokens": False}

    def prompt_body(self, prompt: Prompt) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": list(prompt.token_ids),
            "prompt_logprobs": prompt.k,
            "max_tokens": 1,  # the server always generates a token
            "temperature": prompt.temperature,
            "add_special_tokens": False,
            "return_token_ids": True,
        }

    def read_prompt(self, answer: Any, prompt: Prompt, vocab_size: int) -> TopLists:
        try:
            (choice,) = answer["choices"]
            echoed, logprobs = choice["prompt_token_ids"], choice["prompt_logprobs"]
        except (KeyError, TypeError, ValueError) as error:
            raise UnusableAnswer(f"found no prompt_logprobs with prompt_token_ids in the answer ({error!r})") from None
        check_echo(echoed, prompt.token_ids)
        check_length(logprobs, len(prompt.token_ids), "prompt_logprobs")
        lists = [_entries(logprobs[t + 1], prompt.token_ids[t + 1], prompt.k) for t in prompt.positions]
        return TopLists.read(lists, prompt.k, vocab_size)


def _entries(found: Any, own: int, k: int) -> Entries:
    """The K most likely tokens, without the prompt's own token if it is there besides."""
    if not isinstance(found, dict) or str(own) not in found:
        raise UnusableAnswer(f"found no log-probability of token {own} of the prompt, expected that of every token")
    try:
        return [(int(token), each["logprob"]) for token, each in found.items() if len(found) == k or token != str(own)]
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableAnswer(f"found an entry of prompt_logprobs without id or logprob ({error!r})") from None
