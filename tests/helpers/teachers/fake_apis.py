"""Servers that list log-probabilities only of what they generate, to the letter of their schemas, from a tiny model.

FakeLlamaCpp(teacher_dir)    llama.cpp: `/completion`; no lists where a character is incomplete or a string stops it
FakeHosted(teacher_dir)      OpenAI: `/v1/chat/completions`; tokens by text and bytes, no ids, no token that ends
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fake_servers import MODEL, Answer, FakeServer, Status

FORCED = re.compile(r"<\[(\d+)\]>")
BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}


class FakeApi(FakeServer):
    @cached_property
    def special(self) -> set[int]:
        return set(self.tokenizer.all_special_ids)

    def pieces(self, token: int) -> bytes:
        """The bytes of a token; none of a special one, as servers print them."""
        if token in self.special:
            return b""
        return bytes(BYTES[letter] for letter in self.tokenizer.convert_ids_to_tokens(token))

    def drawn(self, prompt: list[int], body: Answer, forced: Sequence[int] = ()) -> Iterator[tuple[int, Tensor]]:
        """Tokens, with the log-probabilities that they were drawn from, or would have been if they are forced."""
        if forced:
            logprobs = self.logprobs([*prompt, *forced[:-1]], body["temperature"] or 1.0)
            yield from zip(forced, logprobs[len(prompt) - 1 :], strict=True)
            return
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        token_ids, temperature = list(prompt), body["temperature"]
        while True:
            logprobs = self.logprobs(token_ids, temperature or 1.0)[-1]
            probs = (logprobs / (temperature or 1.0)).softmax(dim=0)
            drawn = probs.argmax() if temperature == 0.0 else torch.multinomial(probs, 1, generator=generator)
            token_ids.append(int(drawn))
            yield token_ids[-1], logprobs


class FakeLlamaCpp(FakeApi):
    """Args: slots: requests that it works on at once."""

    def __init__(self, model: Path, *, slots: int = 4, **options: Any) -> None:
        super().__init__(model, "llama.cpp", **options)
        self.slots = slots

    def routes(self, body: Any) -> dict[str, Callable[[], Any]]:
        settings = {"default_generation_settings": {"n_ctx": self.max_length}, "build_info": "b11434-fake"}
        settings["total_slots"] = self.slots
        return {"/props": lambda: settings, "/completion": lambda: self.completion(body)}

    def prompt_of(self, body: Any) -> tuple[int, ...]:
        return (*body["prompt"], -body["n_predict"])

    def completion(self, body: Answer) -> Answer:
        prompt, forced = body["prompt"], [int(token) for token in FORCED.findall(body.get("grammar", ""))]
        if len(prompt) >= self.max_length:
            raise Status(400, {"error": {"message": "the request exceeds the available context size"}})
        if any(token in self.special or _is_damaged(self.pieces(token)) for token in forced):
            raise Status(500, {"error": {"message": "the server aborts: the grammar allows no token"}})
        token_ids: list[int] = []
        items, text, stop = [], b"", "limit"
        for token, logprobs in itertools.islice(self.drawn(prompt, body, forced), body["n_predict"]):
            token_ids.append(token)
            text += self.pieces(token)
            if not _ends_within_a_character(text):
                top = logprobs.topk(min(body["n_probs"], len(logprobs)))
                listed = zip(top.indices.tolist(), top.values.tolist(), strict=True)
                listed = [{"id": each, "token": "?", "bytes": [], "logprob": p} for each, p in listed]
                own = {"id": token, "token": "?", "bytes": [], "logprob": float(logprobs[token])}
                items.append({**own, "top_logprobs": listed})
                found = [word for word in body.get("stop", ()) if word.encode() in text]
                if found:
                    words = self.tokenizer(found[0], add_special_tokens=False)["input_ids"]
                    items, stop = items[: len(items) - min(len(words), len(items))], "word"
                    break
            if token in (self.tokenizer.eos_token_id, self.tokenizer.convert_tokens_to_ids("<|im_end|>")):
                stop = "eos"
                break
        if _is_damaged(text) and not _is_indifferent(body.get("chat_parser")):
            message = "The model produced output that does not match the expected Content-only format"
            raise Status(500, {"error": {"message": message}})
        answer = {"tokens": token_ids, "tokens_evaluated": len(prompt), "stop_type": stop}
        return {**answer, **({"completion_probabilities": items} if items else {})}


class FakeHosted(FakeApi):
    """Args: unnamed: a token whose name the tokenizer does not know."""

    def __init__(self, model: Path, *, unnamed: int | None = None, **options: Any) -> None:
        super().__init__(model, "openai", **{"cap": 20, **options})
        self.unnamed = unnamed

    def routes(self, body: Any) -> dict[str, Callable[[], Any]]:
        return {"/v1/chat/completions": lambda: self.chat(body)}

    def prompt_of(self, body: Any) -> tuple[int, ...]:
        return tuple(json.dumps([body["messages"], body["seed"]]).encode())

    def named(self, token: int, logprob: float) -> Answer:
        data = self.pieces(token) or self.tokenizer.convert_ids_to_tokens(token).encode()
        data = b"<|other|>" if token == self.unnamed else data
        return {"token": data.decode(errors="replace"), "bytes": list(data), "logprob": logprob}

    def chat(self, body: Answer) -> Answer:
        if body["model"] != MODEL:
            raise Status(404, {"error": {"message": f"The model `{body['model']}` does not exist"}})
        if body["top_logprobs"] > self.cap:
            text = "Invalid value for 'top_logprobs': must be less than or equal to 20."
            raise Status(400, {"error": {"message": text, "type": "invalid_request_error", "param": "top_logprobs"}})
        rendered = self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        prompt = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        content, finish = [], "length"
        ends = (self.tokenizer.eos_token_id, self.tokenizer.convert_tokens_to_ids("<|im_end|>"))
        for token, logprobs in itertools.islice(self.drawn(prompt, body), body["max_tokens"]):
            if token in ends:
                finish = "stop"
                break
            top = logprobs.topk(body["top_logprobs"])
            listed = [self.named(each, p) for each, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
            content.append({**self.named(token, float(logprobs[token])), "top_logprobs": listed})
        text = b"".join(bytes(item["bytes"]) for item in content).decode(errors="replace")
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": {"content": content, "refusal": None},
            "finish_reason": finish,
        }
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(content)}
        usage["total_tokens"] = sum(usage.values())
        return {"id": "chatcmpl-1", "object": "chat.completion", "model": MODEL, "choices": [choice], "usage": usage}


def _is_damaged(text: bytes) -> bool:
    return "\ufffd" in text.decode(errors="replace")


def _is_indifferent(parser: str | None) -> bool:
    """Whether a parser, as llama.cpp writes them, accepts a text whatever it holds."""
    if parser is None:
        return False
    found = json.loads(parser)
    return bool(found["parsers"][found["root"]]["type"] == "start" and found["rules"] == {})


def _ends_within_a_character(text: bytes) -> bool:
    """As llama.cpp decides it: by the last four bytes."""
    for i, byte in enumerate(text[:-5:-1], 1):
        size = 2 if byte & 0xE0 == 0xC0 else 3 if byte & 0xF0 == 0xE0 else 4 if byte & 0xF8 == 0xF0 else 0
        if i < size:
            return True
    return False
