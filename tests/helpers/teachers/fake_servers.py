"""Servers in this process that answer to the letter of the schemas of vLLM and SGLang, from a tiny model; and faults.

with FakeServer(teacher_dir, "vllm", faults=Faults(rate=0.05)) as server:
    cache_teacher(… teacher=server.url …)
server.answered      prompt -> number of answers that were not spoilt
"""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from generating import load

MODEL = "tiny"
PROMPTS = ("/v1/completions", "/generate", "/completion", "/v1/chat/completions")
SLOW_S = 1.0  # of a slow answer

Answer = dict[str, Any]


def _drop(answer: Answer) -> Answer:
    raise ConnectionAbortedError


def _status(code: int, **headers: str) -> Callable[[Answer], Answer]:
    def spoil(answer: Answer) -> Answer:
        raise Status(code, {"error": {"message": "not now"}}, headers)

    return spoil


def _slow(answer: Answer) -> Answer:
    time.sleep(SLOW_S)
    return answer


def _edit(edit: Callable[[list[Any]], None]) -> Callable[[Answer], Answer]:
    """Changes the lists of an answer of either kind."""

    def spoil(answer: Answer) -> Answer:
        lists = answer["meta_info"]["input_top_logprobs"] if "meta_info" in answer else None
        edit(answer["choices"][0]["prompt_logprobs"] if lists is None else lists)
        return answer

    return spoil


def _minus_infinity(lists: list[Any]) -> None:
    if isinstance(lists[1], dict):
        list(lists[1].values())[-1]["logprob"] = -9999.0
    else:
        lists[1][0][0] = float("-inf")


def _one_fewer(lists: list[Any]) -> None:
    if isinstance(lists[-1], dict):
        while len(lists[-1]) > 2:
            lists[-1].popitem()
    else:
        lists[-1].pop()


def _missing_ids(answer: Answer) -> Answer:
    if "meta_info" in answer:
        answer["meta_info"]["input_token_logprobs"][0] = [None]
    else:
        answer["choices"][0]["prompt_token_ids"] = None
    return answer


FAULTS: dict[str, Callable[[Answer], Answer | bytes]] = {
    "dropped connection": _drop,
    "429 with Retry-After": _status(429, **{"Retry-After": "0.05"}),
    "500": _status(500),
    "503 while loading": _status(503),
    "slow": _slow,
    "truncated JSON": lambda answer: json.dumps(answer).encode()[:-20],
    "malformed JSON": lambda answer: b"<html>502 Bad Gateway</html>",
    "another object": lambda answer: {"object": "list"},
    "minus infinity": _edit(_minus_infinity),
    "missing ids": _missing_ids,
    "one entry fewer": _edit(_one_fewer),
    "a position missing": _edit(lambda lists: lists.pop()),  # type: ignore[arg-type, return-value]
}


class Status(Exception):
    """An answer with another status than 200."""

    def __init__(self, code: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self.code, self.body, self.headers = code, body, headers or {}


@dataclass
class Faults:
    """Spoils a share of the answers to prompts, by one kind of fault after the other."""

    rate: float
    kinds: tuple[str, ...] = tuple(kind for kind in FAULTS if kind != "slow")
    seed: int = 0
    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random, self._lock = random.Random(self.seed), threading.Lock()

    def choose(self) -> str | None:
        with self._lock:
            if self._random.random() >= self.rate:
                return None
            kind = self.kinds[self.seen.total() % len(self.kinds)]
            self.seen[kind] += 1
            return kind


class FakeServer:
    """One server, listening once entered.

    Args:
        cap: most log-probabilities of a position.
        tempered: give log-probabilities at the temperature of sampling.
        change: an answer to a prompt, and the body of its request, to what is sent instead.
    """

    def __init__(
        self,
        model: Path,
        kind: str,
        *,
        faults: Faults | None = None,
        cap: int = 64,
        max_length: int = 512,
        api_key: str | None = None,
        tokenizer: Path | None = None,
        tempered: bool = False,
        change: Callable[[Answer, Answer], Answer] = lambda answer, body: answer,
        port: int = 0,
    ) -> None:
        self.kind, self.cap, self.max_length, self.api_key = kind, cap, max_length, api_key
        self.faults, self.change, self.port, self.tempered = faults, change, port, tempered
        self.model: AutoModelForCausalLM = load(model)
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer or model)
        self.answered: Counter[tuple[int, ...]] = Counter()
        self.in_work = self.most_in_work = 0
        self.lock = threading.Lock()

    def __enter__(self) -> FakeServer:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

            def log_message(self, *args: Any) -> None: ...

            def do_GET(self) -> None:
                self.respond(None)

            def do_POST(self) -> None:
                self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def respond(self, body: Any) -> None:
                try:
                    key = self.headers.get("Authorization", "").removeprefix("Bearer ")
                    if server.api_key is not None and key != server.api_key:
                        raise Status(401, {"error": {"message": f"Incorrect API key provided: {key}"}})
                    status, answer, headers = 200, server.answer(self.path, body), {}
                except Status as error:
                    status, answer, headers = error.code, error.body, error.headers
                except ConnectionAbortedError:
                    self.close_connection = True
                    return
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # the client has given up waiting
                    self.wfile.write(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def answer(self, path: str, body: Any) -> Any:
        text = body.get("prompt", body.get("content")) if body else None
        cards = [{"id": MODEL, "object": "model", "owned_by": self.kind, "max_model_len": self.max_length}]
        known: dict[str, Callable[[], Any]] = {
            "/v1/models": lambda: {"object": "list", "data": cards},
            "/tokenize": lambda: {"tokens": self.tokenizer(text, add_special_tokens=False)["input_ids"]},
        }
        known |= self.routes(body)
        if path not in known:
            raise Status(404, {"detail": "Not Found"})
        if path not in PROMPTS:
            return known[path]()
        with self.lock:
            self.in_work += 1
            self.most_in_work = max(self.in_work, self.most_in_work)
        try:
            answer = self.change(known[path](), body)
            fault = None if self.faults is None else self.faults.choose()
            if fault is not None:
                return FAULTS[fault](answer)
            self.answered[self.prompt_of(body)] += 1
            return answer
        finally:
            with self.lock:
                self.in_work -= 1

    def routes(self, body: Any) -> dict[str, Callable[[], Any]]:
        if self.kind == "vllm":
            return {"/version": lambda: {"version": "0.32.0"}, "/v1/completions": lambda: self.vllm(body)}
        return {
            "/get_model_info": lambda: {"model_path": MODEL, "is_generation": True},
            "/get_server_info": lambda: {"version": "0.5.23", "context_length": self.max_length},
            "/generate": lambda: self.sglang(body),
        }

    def prompt_of(self, body: Any) -> tuple[int, ...]:
        return tuple(body["prompt"] if self.kind == "vllm" else body["input_ids"])

    @torch.inference_mode()
    def logprobs(self, token_ids: list[int], temperature: float) -> Tensor:
        """[T, V]"""
        if not all(0 <= token < len(self.tokenizer) for token in token_ids):
            raise Status(400, {"error": {"message": "Token id is out of vocabulary"}})
        with self.lock:
            logits = self.model(input_ids=torch.tensor([token_ids])).logits[0, :, : len(self.tokenizer)]
        return (logits.float() / (temperature if self.tempered else 1.0)).log_softmax(dim=1)

    def vllm(self, body: Answer) -> Answer:
        prompt, k = body["prompt"], body.get("prompt_logprobs", body.get("logprobs"))
        if body["model"] != MODEL:
            raise Status(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        if k > self.cap:
            text = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.cap}"
            raise Status(400, {"error": {"message": text, "type": "BadRequestError", "code": 400}})
        if len(prompt) + body["max_tokens"] > self.max_length:
            raise Status(400, {"error": {"message": f"maximum context length is {self.max_length} tokens"}})
        if "prompt_logprobs" not in body:
            return self.vllm_answer(body)
        logprobs = self.logprobs(prompt, body["temperature"])
        entries: list[Any] = [None]
        for t, token in enumerate(prompt[1:]):
            top = logprobs[t].topk(k)
            rank = int((logprobs[t] >= logprobs[t, token]).sum())
            listed = [(token, float(logprobs[t, token]), rank)]
            listed += [(int(i), float(p), r + 1) for r, (i, p) in enumerate(zip(top.indices, top.values, strict=True))]
            entries.append({str(i): {"logprob": p, "rank": r, "decoded_token": "?"} for i, p, r in listed})
        choice = {
            "index": 0,
            "text": "?",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "prompt_logprobs": entries,
        }
        echoed = {"prompt_token_ids": prompt} if body.get("return_token_ids") else {}
        return {"id": "cmpl-1", "object": "text_completion", "model": MODEL, "choices": [{**choice, **echoed}]}

    def vllm_answer(self, body: Answer) -> Answer:
        prompt, k = body["prompt"], body["logprobs"]
        token_ids, logprobs, stop = self.write(prompt, body, body["max_tokens"])
        lists = []
        for token, row in zip(token_ids, logprobs, strict=True):
            top = row.topk(k)
            listed = [token, *top.indices.tolist()]
            lists.append({f"token_id:{i}": float(row[i]) for i in listed})
        found = {
            "text_offset": [0] * len(token_ids),
            "tokens": [f"token_id:{token}" for token in token_ids],
            "token_logprobs": [float(row[token]) for token, row in zip(token_ids, logprobs, strict=True)],
            "top_logprobs": lists,
        }
        choice = {"index": 0, "text": "?", "logprobs": found, "prompt_logprobs": None, "token_ids": token_ids}
        reasons = {"finish_reason": "length" if stop is None else "stop", "stop_reason": stop}
        choice |= {"prompt_token_ids": prompt, **reasons}
        return {"id": "cmpl-1", "object": "text_completion", "model": MODEL, "choices": [choice]}

    def sglang_answer(self, body: Answer) -> Answer:
        prompt, k, sampling = body["input_ids"], body["top_logprobs_num"], body["sampling_params"]
        body = {**sampling, "seed": sampling["sampling_seed"]}
        token_ids, logprobs, stop = self.write(prompt, body, sampling["max_new_tokens"])
        own = [[float(row[token]), token, None] for token, row in zip(token_ids, logprobs, strict=True)]
        tops = [row.topk(k) for row in logprobs]
        finish = {"type": "length", "length": len(token_ids)} if stop is None else {"type": "stop", "matched": stop}
        info = {
            "finish_reason": finish,
            "prompt_tokens": len(prompt),
            "completion_tokens": len(token_ids),
            "output_token_logprobs": own,
            "output_top_logprobs": [
                [[p, i, None] for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)] for top in tops
            ],
        }
        return {"text": "?", "output_ids": token_ids, "meta_info": info}

    def write(self, prompt: list[int], body: Answer, most: int) -> tuple[list[int], list[Tensor], int | str | None]:
        """Tokens, the distributions that they were drawn from, and what ended them."""
        generator = torch.Generator().manual_seed(body["seed"])
        temperature, token_ids, found = body["temperature"], [], []
        while len(token_ids) < most:
            found.append(self.logprobs([*prompt, *token_ids], temperature or 1.0)[-1])
            if temperature == 0.0:
                token_ids.append(int(found[-1].argmax()))
            else:
                probs = (found[-1] / temperature).softmax(dim=0)
                token_ids.append(int(torch.multinomial(probs, 1, generator=generator)))
            if token_ids[-1] in body["stop_token_ids"]:
                return token_ids, found, token_ids[-1]
            text = self.tokenizer.decode(token_ids)
            for stop in body["stop"]:
                if stop in text:
                    return token_ids, found, stop
        return token_ids, found, None

    def sglang(self, body: Answer) -> Answer:
        token_ids, k = body["input_ids"], body["top_logprobs_num"]
        if body["logprob_start_len"] == -1:
            return self.sglang_answer(body)
        logprobs = self.logprobs(token_ids, body["sampling_params"]["temperature"])
        own: list[Any] = [[None, token_ids[0], None]]
        own += [[float(logprobs[t, token]), token, None] for t, token in enumerate(token_ids[1:])]
        lists: list[Any] = [None]
        for t in range(len(token_ids) - 1):
            top = logprobs[t].topk(k)
            lists.append([[float(p), int(i), None] for p, i in zip(top.values, top.indices, strict=True)])
        info = {
            "id": "1",
            "finish_reason": {"type": "length", "length": 1},
            "prompt_tokens": len(token_ids),
            "completion_tokens": 1,
            "cached_tokens": 0,
            "input_token_logprobs": own,
            "input_top_logprobs": lists,
        }
        return {"text": "?", "output_ids": [1], "meta_info": info}
