"""JSON lines of responses of servers: OpenAI's `logprobs`, vLLM's `prompt_logprobs`, SGLang's `meta_info`.

A line is one response as it came over HTTP, with the request's fields beside it where the response lacks them, or
with request and response under these names. The requests of a batch are in files of their own (`batch_requests`).

    prompt           `prompt_token_ids` of the response or the line, `input_ids`, `prompt` as tokens or text, `messages`
                     with `tools`, `documents` and `chat_template_kwargs`
    prompt lists     `prompt_logprobs` (vLLM), `meta_info.input_top_logprobs` (SGLang), or the first lists of a
                     completion with `echo`; optional
    answer           `token_ids` of a choice or the tokens of its lists, `meta_info.output_token_logprobs`
    answer lists     `choices[].logprobs.content[].top_logprobs` of chats, `choices[].logprobs.top_logprobs` of
                     completions, `meta_info.output_top_logprobs`

Every choice is a row. Lists are about their own token. A token of an answer must be known, because everything after it
depends on it; an entry whose token is not known joins the tail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.importing.readers.axolotl_reader import chat_tokens
from pipeline.importing.readers.batch_requests import BatchRequests, opened
from pipeline.importing.readers.foreign_rows import BadRow, ForeignRow, UnusableRow
from pipeline.importing.readers.format_reader import Reader
from pipeline.importing.readers.nested_values import integers, plain
from pipeline.importing.readers.numbered_tokens import token_of
from pipeline.importing.readers.source_files import Record, records
from pipeline.teacher.engines.server.token_names import TokenNames
from pipeline.teacher.text.chat.arguments import read_arguments

Entry = tuple[int | None, Any]  # token, if it is known, and its log-probability


@dataclass(frozen=True, kw_only=True)
class ServerReader(Reader):
    """Args:
    requests: those of a batch, if the source holds its responses.
    """

    tokenizer: PreTrainedTokenizerBase
    requests: BatchRequests | None = None
    shift: int = 1

    @cached_property
    def names(self) -> TokenNames:
        return TokenNames(self.tokenizer)

    def records(self) -> Iterator[Record]:
        """One for each choice of each response."""
        for record in records(self.files):
            data = {name: plain(value) for name, value in record.data.items()}
            # The response comes last: a request may have fields of the same names.
            request = opened(data.get("request")) if self.requests is None else self.requests.of(data.get("custom_id"))
            data = {**request, **data, **opened(data.get("response"))}
            choices = data.get("choices")
            if not isinstance(choices, list) or not choices:
                yield Record(record.where, data)
                continue
            for i, choice in enumerate(choices):
                where = record.where if len(choices) == 1 else f"{record.where}, choice {i}"
                yield Record(where, {**data, "choice": choice})

    def decode(self, record: Record) -> ForeignRow:
        data = record.data
        if (failure := _failure(data)) is not None:
            raise UnusableRow(failure)
        if self.requests is not None and data.get("custom_id") not in self.requests:
            raise BadRow(f"custom_id {data.get('custom_id')!r} is not in the requests of {self.requests.source}")
        if isinstance(data.get("meta_info"), Mapping):
            prompt, prompt_lists, answer, answer_lists = self._sglang(data)
        elif isinstance(choice := data.get("choice"), Mapping):
            prompt, prompt_lists, answer, answer_lists = self._openai(record, choice)
        elif data.get("choices") == []:
            raise UnusableRow("no choices")
        else:
            raise BadRow("found neither `choices` nor `meta_info`, expected the response of a server")
        lists = [*(prompt_lists or [[]] * len(prompt)), *answer_lists]
        mask = np.concatenate([np.full(len(prompt), prompt_lists is not None), np.ones(len(answer), np.bool_)])
        known = [[each for each in entries if each[0] is not None] for entries in lists]
        return ForeignRow(
            input_ids=np.array([*prompt, *answer], np.int64),
            counts=np.array([len(entries) for entries in known], np.int64),
            ids=np.array([token for entries in known for token, _ in entries], np.int64),
            values=np.array([_number(value, p) for p, entries in enumerate(known) for _, value in entries], np.float64),
            shift=self.shift,
            token_mask=mask,
            unknown_entries=sum(map(len, lists)) - sum(map(len, known)),
        )

    # ---- OpenAI's shape, with vLLM's additions

    def _openai(self, record: Record, choice: Mapping[str, Any]) -> Any:
        prompt_lists = choice.get("prompt_logprobs", record.data.get("prompt_logprobs"))
        prompt = self._prompt(record, choice)
        if prompt_lists is not None:
            if len(prompt_lists) != len(prompt):
                raise BadRow(f"{len(prompt_lists)} prompt_logprobs for {len(prompt)} tokens of the prompt")
            prompt_lists = [_vllm_list(entries, p) for p, entries in enumerate(prompt_lists)]
        logprobs = choice.get("logprobs") or {}
        content = logprobs.get("content")
        if content is not None:
            named = [(item.get("token"), item.get("bytes")) for item in content]
            lists = [self._with_own(item) for item in content]
        else:
            named = [(token, None) for token in logprobs.get("tokens") or []]
            lists = [
                [(self.names.find(name), value) for name, value in (entries or {}).items()]
                for entries in logprobs.get("top_logprobs") or []
            ]
            if len(lists) != len(named):
                raise BadRow(f"{len(lists)} top_logprobs for {len(named)} tokens")
            if _is_echoed(logprobs):
                self._check_echo(prompt, named)
                echoed, named, lists = lists[: len(prompt)], named[len(prompt) :], lists[len(prompt) :]
                prompt_lists = echoed if prompt_lists is None else prompt_lists
        answer = choice.get("token_ids")
        if answer is None:
            answer = [self._own_token(name, its_bytes, p) for p, (name, its_bytes) in enumerate(named)]
        if lists and len(answer) == len(lists) + 1:
            answer = answer[:-1]  # the token that ended the answer, which some servers list without entries
        if len(answer) != len(lists):
            raise BadRow(f"{len(lists)} lists of entries for {len(answer)} tokens of the answer")
        return prompt, prompt_lists, list(answer), lists

    def _with_own(self, item: Mapping[str, Any]) -> list[Entry]:
        """The list of one token of an answer; its own token is added where the list does not hold it."""
        entries = [
            (self.names.find(each.get("token"), each.get("bytes")), each.get("logprob"))
            for each in item.get("top_logprobs") or []
        ]
        own = self.names.find(item.get("token"), item.get("bytes"))
        if entries and own is not None and all(token != own for token, _ in entries):
            entries.append((own, item.get("logprob")))
        return entries

    def _own_token(self, name: Any, its_bytes: Any, position: int) -> int:
        if (found := self.names.find(name, its_bytes)) is None:
            raise BadRow(
                f"token {position} of the answer: {name!r} is not the text of exactly one token, and what follows "
                "depends on it; expected token ids (vLLM: return_tokens_as_token_ids or return_token_ids)"
            )
        return found

    def _check_echo(self, prompt: list[int], named: list[tuple[Any, Any]]) -> None:
        """Raises: BadRow unless the tokens of a completion with `echo` begin with the prompt's, as far as known."""
        echoed = [self.names.find(*each) for each in named[: len(prompt)]]
        if len(echoed) < len(prompt) or any(e not in (None, p) for e, p in zip(echoed, prompt, strict=True)):
            raise BadRow(
                f"made with echo, but its tokens do not begin with the {len(prompt)} tokens of the prompt; expected "
                "prompt_token_ids beside the response, or a response without echo"
            )

    def _prompt(self, record: Record, choice: Mapping[str, Any]) -> list[int]:
        data = record.data
        for found in (choice.get("prompt_token_ids"), data.get("prompt_token_ids"), data.get("input_ids")):
            if found is not None:
                return integers(found, "prompt_token_ids").tolist()
        prompt, messages = data.get("prompt"), data.get("messages")
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            return integers(prompt, "prompt").tolist()
        if isinstance(prompt, str):
            return _as_counted(list(self.tokenizer(prompt)["input_ids"]), data)
        if messages is not None:
            arguments = read_arguments(data, record.where)
            return _as_counted(chat_tokens(self.tokenizer, messages, arguments, add_generation_prompt=True), data)
        raise BadRow(
            "no prompt: expected prompt_token_ids, prompt or messages beside the response, because the answer's "
            "distributions depend on it; for the responses of a batch, name its `requests`"
        )

    # ---- SGLang

    def _sglang(self, data: Mapping[str, Any]) -> Any:
        info = data["meta_info"]
        prompt = data.get("input_ids", data.get("prompt_token_ids"))
        own = info.get("input_token_logprobs")
        if prompt is None and own is None:
            raise BadRow("no input_ids and no input_token_logprobs: expected one of them, the tokens of the prompt")
        listed = [] if own is None else [_sglang_entry(item, p)[0] for p, item in enumerate(own)]
        if prompt is None:
            prompt = listed
        elif listed and list(prompt) != listed:
            raise BadRow("the tokens of input_token_logprobs are not those of input_ids: the server changed the prompt")
        prompt_lists = info.get("input_top_logprobs")
        if prompt_lists is not None:
            if len(prompt_lists) != len(prompt):
                raise BadRow(f"{len(prompt_lists)} input_top_logprobs for {len(prompt)} tokens of the prompt")
            prompt_lists = [_sglang_list(items, p) for p, items in enumerate(prompt_lists)]
        answer = [_sglang_entry(item, p)[0] for p, item in enumerate(info.get("output_token_logprobs") or [])]
        answer_lists = [_sglang_list(items, p) for p, items in enumerate(info.get("output_top_logprobs") or [])]
        if not answer_lists:
            answer = []
        if len(answer) != len(answer_lists):
            raise BadRow(f"{len(answer_lists)} output_top_logprobs for {len(answer)} tokens of the answer")
        return list(prompt), prompt_lists, answer, answer_lists


def _failure(data: Mapping[str, Any]) -> str | None:
    """What a server answered instead of a response; None if it did not."""
    status = data.get("status_code")
    if isinstance(status, int) and status != 200:
        return f"the server answered with status {status}"
    return "the server answered with an error" if data.get("error") else None


def _as_counted(prompt: list[int], data: Mapping[str, Any]) -> list[int]:
    """The tokens of a text. Raises: BadRow if the server counted another number of them."""
    usage = data.get("usage")
    counted = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    if counted not in (None, len(prompt)):
        raise BadRow(
            f"the prompt has {len(prompt)} tokens by the tokenizer, and {counted} by the server (usage.prompt_tokens): "
            "the teacher read another prompt; expected prompt_token_ids (vLLM: return_token_ids), or all fields of the "
            "request that reach the chat template (tools, documents, chat_template_kwargs)"
        )
    return prompt


def _is_echoed(logprobs: Mapping[str, Any]) -> bool:
    """Whether the lists of a completion begin with the prompt, whose first token has no log-probability."""
    if own := logprobs.get("token_logprobs"):
        return own[0] is None
    lists = logprobs.get("top_logprobs") or [None]
    return not lists[0] and any(lists)


def _vllm_list(entries: Any, position: int) -> list[Entry]:
    """{"123": {"logprob": …}}, or null for the first token. The prompt's own token is among them."""
    if entries is None:
        return []
    if not isinstance(entries, Mapping):
        raise BadRow(f"token {position} of the prompt: found {entries!r}, expected an object of tokens")
    values = ((name, each) for name, each in entries.items())
    return [
        (token_of(name, position), each.get("logprob") if isinstance(each, Mapping) else each) for name, each in values
    ]


def _sglang_list(items: Any, position: int) -> list[Entry]:
    return [_sglang_entry(item, position) for item in items or [] if item is not None]


def _sglang_entry(item: Any, position: int) -> tuple[int, Any]:
    if not isinstance(item, list | tuple) or len(item) < 2:
        raise BadRow(f"token {position}: found {item!r}, expected [logprob, token, text]")
    return token_of(item[1], position), item[0]


def _number(value: Any, position: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"list {position}: logprob {value!r}, expected a number")
    return float(value)
