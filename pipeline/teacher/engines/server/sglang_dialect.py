"""SGLang: its own `/generate` with `input_ids` and `top_logprobs_num`; its OpenAI-compatible part has no ids.

`meta_info.input_top_logprobs` has K entries (log-probability, id, text) for every token of the prompt but the first;
`input_token_logprobs` has the prompt's own tokens. `output_…` are the same for generated tokens.
"""

from __future__ import annotations

from typing import Any

from pipeline.teacher.engines.answers import EOS, LENGTH, STOP_STRING
from pipeline.teacher.engines.server.dialect import Advice, Prompt, Sampling, Written, check_echo, check_known, list_of
from pipeline.teacher.engines.server.http_client import Query, UnusableAnswer
from pipeline.teacher.engines.server.server_config import ServerKind
from pipeline.teacher.engines.server.top_lists import Entries, TopLists

PATH = "/generate"
NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}


class SglangDialect:
    """See `Dialect`."""

    kind: ServerKind = "sglang"
    advice = Advice(
        cap="Use {k} or fewer entries, or start a server without a limit on top_logprobs_num.",
        length="Start SGLang with --context-length {length} or more",
        raw="Start SGLang without options that change log-probabilities, such as a custom logit processor.",
        raw_answers="Start SGLang with SGLANG_RETURN_ORIGINAL_LOGPROB=1 in its environment.",
        whole="Start SGLang with --disable-radix-cache.",
        ids="Use a version of SGLang that takes input_ids unchanged.",
    )

    def tokenize(self, text: str) -> Query[Any]:
        return Query("/tokenize", {"prompt": text, "add_special_tokens": False}, lambda answer: answer)

    def prompt(self, prompt: Prompt, vocab_size: int) -> Query[TopLists]:
        body = {
            "input_ids": list(prompt.token_ids),
            "sampling_params": {"max_new_tokens": 1, "temperature": prompt.temperature},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": prompt.k,
        }
        return Query(PATH, body, lambda answer: _read_prompt(answer, prompt, vocab_size))

    def answer(self, sampling: Sampling, vocab_size: int) -> Query[Written]:
        parameters = {
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "sampling_seed": sampling.seed,
            "stop": list(sampling.stop),
            "stop_token_ids": list(sampling.stop_tokens),
            "ignore_eos": True,  # unless it is one of these
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            **NEUTRAL,
        }
        body = {
            "input_ids": list(sampling.token_ids),
            "sampling_params": parameters,
            "return_logprob": True,
            "logprob_start_len": -1,
            "top_logprobs_num": sampling.k,
        }
        return Query(PATH, body, lambda answer: _read_answer(answer, sampling, vocab_size))


def _read_prompt(answer: Any, prompt: Prompt, vocab_size: int) -> TopLists:
    try:
        info = answer["meta_info"]
        own, lists = info["input_token_logprobs"], info["input_top_logprobs"]
        echoed = [token for _, token, *_ in own]
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableAnswer(f"found no input_top_logprobs in the answer ({error!r})") from None
    check_echo(echoed, prompt.token_ids)
    list_of(lists, len(prompt.token_ids), "input_top_logprobs")
    found = TopLists.read([_entries(lists[t + 1]) for t in prompt.positions], prompt.k, vocab_size)
    found.check_own([own[t + 1] for t in prompt.positions])
    return found


def _read_answer(answer: Any, sampling: Sampling, vocab_size: int) -> Written:
    try:
        info = answer["meta_info"]
        own, lists = info["output_token_logprobs"], info["output_top_logprobs"]
        token_ids = [int(token) for _, token, *_ in own]
        prompt_tokens, finish = info["prompt_tokens"], info["finish_reason"]
        reason = LENGTH if finish["type"] == "length" else EOS
        reason = STOP_STRING if isinstance(finish.get("matched"), str) else reason
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnusableAnswer(f"found no output_top_logprobs in the answer ({error!r})") from None
    if prompt_tokens != len(sampling.token_ids):
        text = f"the server read {prompt_tokens} tokens of a prompt, expected {len(sampling.token_ids)}"
        raise UnusableAnswer(text, "ids")
    if finish["type"] not in ("length", "stop") or not token_ids:
        raise UnusableAnswer(f"the server ended an answer of {len(token_ids)} tokens by {finish['type']}")
    check_known(token_ids, vocab_size)
    list_of(lists, len(token_ids), "output_top_logprobs")
    found = TopLists.read([_entries(each) for each in lists], sampling.k, vocab_size)
    found.check_own(own)
    return Written(token_ids=token_ids, logprobs=[each[0] for each in own], lists=found, stop_reason=reason)


def _entries(found: Any) -> Entries:
    try:
        return [(token, logprob) for logprob, token, *_ in found]
    except (TypeError, ValueError) as error:
        raise UnusableAnswer(f"found an entry of top_logprobs without logprob or id ({error!r})") from None
