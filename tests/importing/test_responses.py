"""Responses of servers, to the letter of their schemas: OpenAI chat and completions, vLLM, SGLang."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foreign_files import MadeUp, import_rows, made_up_rows, write_lines
from pipeline.errors import DataError
from pipeline.teacher.engines.server.token_names import TokenNames

K = 8
PROMPT = 12  # tokens of each row that are the prompt
ROWS = made_up_rows(3)


def numbered(row: MadeUp, t: int) -> dict[str, float]:
    """The list about token t, by token_id:N; the token itself is always there, as servers add it."""
    ids, values = row.top(K)
    entries = {f"token_id:{i}": float(v) for i, v in zip(ids[t - 1], values[t - 1], strict=True)}
    return entries | {f"token_id:{row.ids[t]}": float(row.logprobs[t - 1, row.ids[t]])}


def vllm_prompt(row: MadeUp, stop: int) -> list[Any]:
    lists = [
        {
            name.removeprefix("token_id:"): {"logprob": v, "rank": r, "decoded_token": "x"}
            for r, (name, v) in enumerate(numbered(row, t).items(), 1)
        }
        for t in range(1, stop)
    ]
    return [None, *lists]


def chat_content(row: MadeUp, start: int = PROMPT) -> list[dict[str, Any]]:
    return [
        {
            "token": f"token_id:{row.ids[t]}",
            "logprob": float(row.logprobs[t - 1, row.ids[t]]),
            "bytes": None,
            "top_logprobs": [{"token": name, "logprob": v, "bytes": None} for name, v in numbered(row, t).items()],
        }
        for t in range(start, len(row.ids))
    ]


def check(cache: Any, rows: list[MadeUp], first: int) -> None:
    """Each list holds the K most likely tokens and the true one."""
    assert len(cache) == len(rows)
    for row, made in zip(cache, rows, strict=True):
        assert row.input_ids.tolist() == made.ids.tolist()
        assert np.flatnonzero(row.loss_mask).tolist() == list(range(first, len(made.ids) - 1))
        for t in np.flatnonzero(row.loss_mask):
            ids, logprobs = row.targets.at(t)
            assert set(ids.tolist()) == set(made.top(K)[0][t].tolist()) | {made.ids[t + 1]}
            np.testing.assert_allclose(np.exp(logprobs / 2), np.exp(made.logprobs[t, ids] / 2), atol=0.02)


def test_chat_of_openai(tmp_path: Path, tokenizer: Any):
    """A response with the prompt's tokens beside it."""
    lines = [
        {
            "prompt_token_ids": row.ids[:PROMPT].tolist(),
            "choices": [{"index": 0, "logprobs": {"content": chat_content(row)}}],
        }
        for row in ROWS
    ]
    cache, summary = import_rows(write_lines(tmp_path / "a.jsonl", lines), tmp_path / "cache", tokenizer)
    check(cache, ROWS, PROMPT - 1)
    assert cache.metadata.capture["imported"]["reader"] == "Server" and summary.label_listed == 1.0


def test_several_choices_are_several_rows(tmp_path: Path, tokenizer: Any):
    choices = [{"index": i, "logprobs": {"content": chat_content(row)}} for i, row in enumerate(ROWS)]
    line = {"request": {}, "prompt_token_ids": ROWS[0].ids[:PROMPT].tolist(), "response": {"choices": choices}}
    cache, _ = import_rows(write_lines(tmp_path / "a.jsonl", [line]), tmp_path / "cache", tokenizer)
    same_prompt = [MadeUp(np.concatenate([ROWS[0].ids[:PROMPT], row.ids[PROMPT:]]), row.logprobs) for row in ROWS]
    check(cache, same_prompt, PROMPT - 1)


def test_prompt_logprobs_of_vllm(tmp_path: Path, tokenizer: Any):
    lines = [
        {
            "choices": [
                {
                    "prompt_token_ids": row.ids[:PROMPT].tolist(),
                    "prompt_logprobs": vllm_prompt(row, PROMPT),
                    "token_ids": row.ids[PROMPT:].tolist(),
                    "logprobs": {
                        "tokens": [f"token_id:{i}" for i in row.ids[PROMPT:]],
                        "top_logprobs": [numbered(row, t) for t in range(PROMPT, len(row.ids))],
                    },
                }
            ]
        }
        for row in ROWS
    ]
    cache, _ = import_rows(write_lines(tmp_path / "a.jsonl", lines), tmp_path / "cache", tokenizer)
    check(cache, ROWS, 0)


def test_prompt_only(tmp_path: Path, tokenizer: Any):
    """max_tokens=1 and no lists for the answer: the prompt is the text."""
    lines = [
        {
            "prompt": row.ids.tolist(),
            "choices": [{"text": " x", "logprobs": None, "prompt_logprobs": vllm_prompt(row, len(row.ids))}],
        }
        for row in ROWS
    ]
    check(import_rows(write_lines(tmp_path / "a.jsonl", lines), tmp_path / "cache", tokenizer)[0], ROWS, 0)


def test_sglang(tmp_path: Path, tokenizer: Any):
    def entries(row: MadeUp, t: int) -> list[list[Any]]:
        return [[v, int(name.removeprefix("token_id:")), None] for name, v in numbered(row, t).items()]

    def own(row: MadeUp, t: int) -> list[Any]:
        return [None if t == 0 else float(row.logprobs[t - 1, row.ids[t]]), int(row.ids[t]), None]

    lines = [
        {
            "input_ids": row.ids[:PROMPT].tolist(),
            "text": "…",
            "meta_info": {
                "input_token_logprobs": [own(row, t) for t in range(PROMPT)],
                "input_top_logprobs": [None, *(entries(row, t) for t in range(1, PROMPT))],
                "output_token_logprobs": [own(row, t) for t in range(PROMPT, len(row.ids))],
                "output_top_logprobs": [entries(row, t) for t in range(PROMPT, len(row.ids))],
            },
        }
        for row in ROWS
    ]
    check(import_rows(write_lines(tmp_path / "a.jsonl", lines), tmp_path / "cache", tokenizer)[0], ROWS, 0)
    lines[1]["input_ids"][3] += 1
    with pytest.raises(DataError, match="a.jsonl, line 2: .*the server changed the prompt"):
        import_rows(write_lines(tmp_path / "a.jsonl", lines), tmp_path / "other", tokenizer)


def echoed(row: MadeUp) -> dict[str, Any]:
    """A completion with `echo`: tokens and lists of the prompt come first, and its first token has none."""
    return {
        "tokens": [f"token_id:{i}" for i in row.ids],
        "token_logprobs": [None, *(float(row.logprobs[t - 1, row.ids[t]]) for t in range(1, len(row.ids)))],
        "top_logprobs": [None, *(numbered(row, t) for t in range(1, len(row.ids)))],
    }


@pytest.mark.parametrize("server", ["plain", "vllm", "text"])
def test_completions_with_echo(server: str, tmp_path: Path, tokenizer: Any):
    lines = []
    for row in ROWS:
        choice: dict[str, Any] = {"logprobs": echoed(row)}
        if server == "vllm":  # has the prompt's lists twice, and the answer's tokens only
            choice |= {"prompt_logprobs": vllm_prompt(row, PROMPT), "token_ids": row.ids[PROMPT:].tolist()}
        if server == "text":  # names of the prompt that no token has do not matter
            choice["logprobs"]["tokens"][3] = "\ufffd"
        lines.append({"prompt_token_ids": row.ids[:PROMPT].tolist(), "choices": [choice]})
    cache, _ = import_rows(write_lines(tmp_path / "a.jsonl", lines), tmp_path / "cache", tokenizer)
    check(cache, ROWS, 0)


@pytest.mark.parametrize("prompt", [[7, 8, 9], [*ROWS[0].ids.tolist(), 7]])
def test_an_echo_of_another_prompt_is_refused(prompt: list[int], tmp_path: Path, tokenizer: Any):
    line = {"prompt_token_ids": prompt, "choices": [{"logprobs": echoed(ROWS[0])}]}
    with pytest.raises(DataError, match="line 1: made with echo, but its tokens do not begin with the"):
        import_rows(write_lines(tmp_path / "a.jsonl", [line]), tmp_path / "cache", tokenizer)


# ---- fields of the request that change the prompt


TOOLS = [{"type": "function", "function": {"name": "weather"}}]
WITH_TOOLS = (
    "{% if tools %}TOOLS {{ tools | tojson }} {% endif %}{% if brief %}BRIEF {% endif %}"
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
)


@pytest.fixture
def with_tools(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tokenizer whose template prints the tools."""
    monkeypatch.setattr(tokenizer, "chat_template", WITH_TOOLS)
    return tokenizer


@pytest.mark.parametrize("form", ["responses", "axolotl"])
def test_arguments_of_the_chat_template_are_passed_to_it(form: str, tmp_path: Path, with_tools: Any):
    messages = [{"role": "user", "content": "hello"}]
    line: dict[str, Any] = {"messages": messages, "tools": TOOLS, "chat_template_kwargs": {"brief": True}}
    answer = [] if form == "axolotl" else ROWS[0].ids[PROMPT:].tolist()
    text = with_tools.apply_chat_template(messages, tools=TOOLS, brief=True, tokenize=False)
    prompt = with_tools(text, add_special_tokens=False)["input_ids"]
    if form == "responses":
        line |= {"choices": [{"logprobs": {"content": chat_content(ROWS[0])}}], "usage": {"prompt_tokens": len(prompt)}}
    else:
        line["logprobs"] = [[{"token": f"token_id:{i}", "logprob": -0.1}] for i in prompt[-3:]]
    cache, _ = import_rows(write_lines(tmp_path / "a.jsonl", [line]), tmp_path / "cache", with_tools)
    assert cache[0].input_ids.tolist() == prompt + answer and "weather" in with_tools.decode(prompt)


@pytest.mark.parametrize("prompt", [{"prompt": "hello"}, {"messages": [{"role": "user", "content": "hello"}]}])
def test_a_prompt_that_the_server_counted_otherwise_is_refused(prompt: Any, tmp_path: Path, tokenizer: Any):
    line = {**prompt, "choices": [{"logprobs": {"content": chat_content(ROWS[0])}}], "usage": {"prompt_tokens": 57}}
    with pytest.raises(DataError, match=r"line 1: the prompt has \d+ tokens by the tokenizer, and 57 by the server"):
        import_rows(write_lines(tmp_path / "a.jsonl", [line]), tmp_path / "cache", tokenizer)


def test_arguments_that_the_template_cannot_take_are_refused(tmp_path: Path, tokenizer: Any):
    line = {"messages": [{"role": "user", "content": "hello"}], "tools": "weather", "choices": [{"logprobs": {}}]}
    with pytest.raises(DataError, match="line 1, column 'tools': found a string that is not JSON"):
        import_rows(write_lines(tmp_path / "a.jsonl", [line]), tmp_path / "cache", tokenizer)


# ---- tokens by text


def texts(tokenizer: Any) -> list[int]:
    names = TokenNames(tokenizer)
    return [i for i in range(5, len(tokenizer)) if names.find(tokenizer.decode([i])) == i]


def test_names_that_belong_to_several_tokens_are_not_tokens(tokenizer: Any):
    names = TokenNames(tokenizer)
    known = texts(tokenizer)
    assert 100 < len(known) < len(tokenizer)  # bytes of several characters have no text of their own
    assert names.find("\ufffd") is None and names.find(None) is None and names.find("no such token") is None
    euro = tokenizer("é", add_special_tokens=False)["input_ids"]
    if len(euro) == 1:
        assert names.find("x", list("é".encode())) == euro[0]


def test_a_text_of_two_tokens_is_neither():
    """As of a byte token and a word that decode alike."""

    class Decoding:
        texts = ("a", "b", "a", "\ufffd")

        def __len__(self) -> int:
            return len(self.texts)

        def batch_decode(self, rows: list[list[int]], **_: Any) -> list[str]:
            return [self.texts[row[0]] for row in rows]

        def convert_ids_to_tokens(self, token: int) -> str:
            return self.texts[token]

    names = TokenNames(Decoding())  # type: ignore[arg-type]
    assert [names.find(text) for text in ("a", "b", "\ufffd")] == [None, 1, None]


def test_tokens_by_text_with_messages(tmp_path: Path, tokenizer: Any):
    """A hosted API: no token ids at all. Entries without a name of their own join the tail."""
    known = np.array(texts(tokenizer))
    messages = [{"role": "user", "content": "Count to ten."}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = known[:20]
    lists = [[(int(token), -0.2), (int(known[(i + 50) % len(known)]), -3.0)] for i, token in enumerate(answer)]
    content = [
        {
            "token": tokenizer.decode([entries[0][0]]),
            "logprob": entries[0][1],
            "bytes": list(tokenizer.decode([entries[0][0]]).encode()),
            "top_logprobs": [
                *({"token": tokenizer.decode([i]), "logprob": v, "bytes": None} for i, v in entries),
                {"token": "\ufffd", "logprob": -4.0, "bytes": [0xE2, 0x82]},
            ],
        }
        for entries in lists
    ]
    line = {"messages": messages, "choices": [{"logprobs": {"content": content}}]}
    cache, summary = import_rows(write_lines(tmp_path / "a.jsonl", [line]), tmp_path / "cache", tokenizer)
    row = cache[0]
    assert row.input_ids.tolist() == [*prompt, *answer.tolist()]
    assert np.flatnonzero(row.loss_mask).tolist() == list(range(len(prompt) - 1, len(prompt) + 19))
    assert row.targets.at(len(prompt) - 1)[0].tolist() == sorted(i for i, _ in lists[0])
    tail = 1 - np.exp(-0.2) - np.exp(-3.0)  # with the entry whose token is not known
    assert abs(np.exp(row.targets.residual_logprob[len(prompt) - 1]) - tail) < 0.02
    assert summary.changed == {"entries whose token is not known": 20}


def test_an_answer_of_unknown_tokens_is_refused(tmp_path: Path, tokenizer: Any):
    content = [{"token": "\ufffd", "logprob": -0.1, "bytes": [0xE2, 0x82], "top_logprobs": []}]
    line = {"prompt_token_ids": [7, 8], "choices": [{"logprobs": {"content": content}}]}
    with pytest.raises(DataError, match="line 1: token 0 of the answer.*return_tokens_as_token_ids"):
        import_rows(write_lines(tmp_path / "a.jsonl", [line]), tmp_path / "cache", tokenizer)


def test_part_of_a_character_is_known_by_its_bytes(tokenizer: Any):
    names = TokenNames(tokenizer)
    (part,) = tokenizer.convert_tokens_to_ids(["â"])  # how byte-level vocabularies write the byte E2
    assert [names.find("\ufffd", data) for data in ([0xE2], [0xE2, 0x82], None)] == [part, None, None]


def test_an_answer_without_its_prompt_is_refused(tmp_path: Path, tokenizer: Any):
    line = {"choices": [{"logprobs": {"content": chat_content(ROWS[0])}}]}
    with pytest.raises(DataError, match="line 1: no prompt"):
        import_rows(write_lines(tmp_path / "a.jsonl", [line]), tmp_path / "cache", tokenizer)


# ---- batches: requests in one file, responses in any order in another


def batch_files(folder: Path, rows: list[MadeUp] = ROWS) -> tuple[Path, Path]:
    """Requests and responses, as OpenAI's batch API and `vllm run-batch` take and give them."""
    requests, responses = [], []
    for i, row in enumerate(rows):
        body = {"model": "teacher", "prompt": row.ids[:PROMPT].tolist(), "logprobs": K, "temperature": 0.7}
        requests.append({"custom_id": f"é-{i}", "method": "POST", "url": "/v1/completions", "body": body, "topic": "a"})
        choices = [{"index": 0, "logprobs": {"content": chat_content(row)}}]
        found = {"id": "cmpl-1", "model": "teacher", "choices": choices}
        response = {"status_code": 200, "request_id": "r", "body": found}
        responses.append({"id": f"batch_{i}", "custom_id": f"é-{i}", "response": response, "error": None})
    return write_lines(folder / "requests.jsonl", requests), write_lines(folder / "responses.jsonl", responses[::-1])


def test_responses_of_a_batch_find_their_requests(tmp_path: Path, tokenizer: Any):
    requests, responses = batch_files(tmp_path)
    options = {"requests": str(requests), "keep_columns": ("topic",)}
    cache, _ = import_rows(responses, tmp_path / "cache", tokenizer, **options)
    check(cache, ROWS[::-1], PROMPT - 1)
    assert [cache.kept["topic"][i] for i in range(len(ROWS))] == [["a"]] * len(ROWS)


def test_requests_that_failed_are_left_out_and_counted(tmp_path: Path, tokenizer: Any):
    requests, responses = batch_files(tmp_path)
    first, *others = responses.read_text().splitlines()
    lines = [json.loads(first), *map(json.loads, others)]
    lines[0]["response"] = {"status_code": 429, "body": {"error": {"message": "slow down"}}}
    lines[1] |= {"response": None, "error": {"code": "batch_expired"}}
    write_lines(responses, lines)
    cache, summary = import_rows(responses, tmp_path / "cache", tokenizer, requests=str(requests))
    check(cache, ROWS[:1], PROMPT - 1)
    assert summary.unusable == {"the server answered with status 429": 1, "the server answered with an error": 1}


def test_batches_that_cannot_be_joined(tmp_path: Path, tokenizer: Any):
    requests, responses = batch_files(tmp_path)

    def refused(match: str) -> None:
        with pytest.raises(DataError, match=match):
            import_rows(responses, tmp_path / "cache", tokenizer, requests=str(requests))
        assert not (tmp_path / "cache").exists()

    with pytest.raises(DataError, match="line 1: no prompt: .*name its `requests`"):
        import_rows(responses, tmp_path / "cache", tokenizer)
    lines = requests.read_text().splitlines()
    requests.write_text("\n".join(lines[:-1]))
    refused("responses.jsonl, line 1: custom_id 'é-2' is not in the requests of .*requests.jsonl")
    requests.write_text("\n".join([*lines, "", lines[0]]))
    refused("requests.jsonl, line 5: custom_id 'é-0' occurs twice")
    requests.write_text('{"messages": []}')
    refused("requests.jsonl, line 1: found custom_id None, expected text")
    requests.write_text("[1]")
    refused("requests.jsonl, line 1: found a list")


def test_request_and_response_beside_each_other(tmp_path: Path, tokenizer: Any):
    """As loggers of proxies write them."""
    lines = [
        {
            "request": {"prompt": row.ids[:PROMPT].tolist(), "choices": "not these"},
            "response": {"choices": [{"index": 0, "logprobs": {"content": chat_content(row)}}]},
        }
        for row in ROWS
    ]
    check(import_rows(write_lines(tmp_path / "a.jsonl", lines), tmp_path / "cache", tokenizer)[0], ROWS, PROMPT - 1)
