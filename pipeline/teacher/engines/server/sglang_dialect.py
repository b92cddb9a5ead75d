"""SGLang: its own `/generate` with `input_ids` and `top_logprobs_num`; its OpenAI-compatible part has no ids.

`meta_info.input_top_logprobs` has K entries (log-probability, id, text) for every token of the prompt but the first;
`input_token_logprobs` has the prompt's own tokens.
"""

from __future__ import annotations

from typing import Any

from pipeline.teacher.engines.server.dialect import Advice, Prompt, check_echo, check_length
from pipeline.teacher.engines.server.http_client import UnusableAnswer
from pipeline.teacher.engines.server.server_config import ServerKind
from pipeline.teacher.engines.server.top_lists import Entries, TopLists


class SglangDialect:
    """See `Dialect`."""

    kind: ServerKind = "sglang"
    prompt_path = "/generate"
    advice = Advice(
        cap="Use {k} or fewer entries, or start a server without a limit on top_logprobs_num.",
        length="Start SGLang with --context-length {length} or more",
        raw="Start SGLang without options that change log-probabilities, such as a custom logit processor.",
        whole="Start SGLang with --disable-radix-cache.",
        ids="Use a version of SGLang that takes input_ids unchanged.",
    )

    def tokenize_body(self, text: str) -> dict[str, Any]:
        return {"prompt": text, "add_special_tokens": False}

    def prompt_body(self, prompt: Prompt) -> dict[str, Any]:
        return {
            "input_ids": list(prompt.token_ids),
            "sampling_params": {"max_new_tokens": 1, "temperature": prompt.temperature},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": prompt.k,
        }

    def read_prompt(self, answer: Any, prompt: Prompt, vocab_size: int) -> TopLists:
        try:
            found = answer["meta_info"]
            own, lists = found["input_token_logprobs"], found["input_top_logprobs"]
            echoed = [token for _, token, *_ in own]
        except (KeyError, TypeError, ValueError) as error:
            raise UnusableAnswer(f"found no input_top_logprobs in the answer ({error!r})") from None
        check_echo(echoed, prompt.token_ids)
        check_length(lists, len(prompt.token_ids), "input_top_logprobs")
        found = TopLists.read([_entries(lists[t + 1]) for t in prompt.positions], prompt.k, vocab_size)
        found.check_own([own[t + 1] for t in prompt.positions])
        return found


def _entries(found: Any) -> Entries:
    try:
        return [(token, logprob) for logprob, token, *_ in found]
    except (TypeError, ValueError) as error:
        raise UnusableAnswer(f"found an entry of input_top_logprobs without logprob or id ({error!r})") from None
