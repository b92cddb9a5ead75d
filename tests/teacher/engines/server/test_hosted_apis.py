"""Answers of a hosted API, which names tokens by text and bytes, against the same model in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import cache_format as cf
from fake_apis import FakeHosted
from fake_servers import MODEL, Faults, Status
from generating import load, logprobs_of
from pipeline.errors import DataError, DistillError, ModelError
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.engines.server.http_client import MOST_UNUSABLE
from pipeline.teacher.engines.server.server_config import ServerConfig
from pipeline.teacher.engines.server.token_names import TokenNames
from pipeline.teacher.generation.generate import generate_cache
from pipeline.teacher.generation.generation_config import GenerationConfig
from pipeline.teacher.progress import GenerationSummary
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from runs import command
from tiny import tiny_sentencepiece, write_jsonl

pytestmark = pytest.mark.usefixtures("impatient")

FAULTS = ("dropped connection", "429 with Retry-After", "500", "truncated JSON", "malformed JSON", "another object")


def generate(server: FakeHosted, tokenizer: Path, data: Path, output: Path, **options: Any) -> GenerationSummary:
    of_config = {name: options.pop(name) for name in ("targets",) if name in options}
    config = CacheTeacherConfig(
        teacher=server.url,
        tokenizer=str(tokenizer),
        data=DataConfig(data=str(data), seq_len=256, max_documents=6),
        output=str(output),
        server=ServerConfig(kind="openai", model=MODEL),
        generation=GenerationConfig(**{"max_new_tokens": 12, **options}),
        **{"targets": TargetRule(top_k=8), **of_config},
    )
    return generate_cache(config)


def test_answers_have_the_models_own_log_probabilities(
    teacher_dir: Path, chat_file: Path, tmp_path: Path, raw_rows: list[cf.CacheRow]
) -> None:
    """Also of tokens that are part of a character, and in spite of faults."""
    with FakeHosted(teacher_dir, faults=Faults(0.2, kinds=FAULTS)) as server:
        summary = generate(server, teacher_dir, chat_file, tmp_path / "cache", answers_per_prompt=2)
    cache, model = cf.open_cache(tmp_path / "cache"), load(teacher_dir)
    assert summary.answers == len(cache) >= 10
    with_parts = 0
    for line, row in zip(cache.answers(), cache.iter_rows(), strict=True):
        expected = logprobs_of(model, row.input_ids, 400)
        at = np.flatnonzero(row.loss_mask)
        assert len(at) == len(row.input_ids) - line["prompt_tokens"]
        np.testing.assert_allclose(line["token_logprobs"], expected[at, row.input_ids[at + 1]], atol=1e-4)
        for t in at:
            ids, logprobs = row.targets.at(t)
            np.testing.assert_array_equal(ids, np.sort(np.argsort(-expected[t], kind="stable")[:8]))
            np.testing.assert_allclose(logprobs, expected[t, ids], atol=0.1)  # as stored
        with_parts += "\ufffd" in line["text"]
    assert with_parts > 0
    assert cache.metadata.capture["server"] == "openai" and cache.metadata.teacher["name"] == MODEL
    cf.verify_cache(tmp_path / "cache", deep=True)


def test_tokens_are_counted_as_the_server_counts_them(teacher_dir: Path, chat_file: Path, tmp_path: Path) -> None:
    """Those of the probes and of answers that could not be used are paid too."""
    with FakeHosted(teacher_dir, faults=Faults(0.3, kinds=("another object", "truncated JSON"))) as server:
        paid: list[dict[str, int]] = []
        chat = server.chat

        def counted(body: Any) -> Any:
            answer = chat(body)
            paid.append(answer["usage"])
            return answer

        server.chat = counted  # type: ignore[method-assign]
        summary = generate(server, teacher_dir, chat_file, tmp_path / "cache")
    usable = server.answered.total()
    assert summary.usage is not None and len(paid) > usable > 6
    assert 0 < summary.usage.prompt_tokens <= sum(each["prompt_tokens"] for each in paid)
    assert 0 < summary.usage.completion_tokens <= sum(each["completion_tokens"] for each in paid)


def test_the_command_line_shows_what_was_used_and_never_the_key(
    teacher_dir: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret-1234")
    with FakeHosted(teacher_dir, api_key="sk-secret-1234") as server:
        words = ["--teacher", server.url, "--tokenizer", teacher_dir, "--data", chat_file, "--output", tmp_path / "c"]
        words += ["--generate", "--server-kind", "openai", "--model", MODEL, "--server-api-key-env", "MY_KEY"]
        words += ["--top-k", 8, "--gen-max-new-tokens", 6, "--max-documents", 3, "--seq-len", 256]
        done = command("cache-teacher", *words)
        assert "tokens sent" in done.stderr and "completion tokens of the server" in done.stdout + done.stderr
        assert "secret" not in done.output
        line = command("cache-teacher", *words, "--overwrite", "--top-k", 21, status=1).stderr.splitlines()[-1]
    assert line.startswith("Error: --top-k 21: more than this server gives") and "20 or fewer" in line
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"sk-secret" not in path.read_bytes()


def test_what_was_answered_is_not_paid_again(teacher_dir: Path, chat_file: Path, tmp_path: Path) -> None:
    with FakeHosted(teacher_dir) as server:
        for _ in range(2):
            generate(server, teacher_dir, chat_file, tmp_path / "cache")
    assert sorted(server.answered.values()) == [1, 1, 1, 1, 1, 4]  # the probes


def test_a_token_that_the_tokenizer_does_not_name_ends_the_run(
    teacher_dir: Path, chat_file: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    unnamed = tokenizer("e", add_special_tokens=False)["input_ids"][0]
    with FakeHosted(teacher_dir, unnamed=unnamed) as server:
        with pytest.raises(
            ModelError, match=r"token \d+ of the answer: found '<\|other\|>' \(bytes \[60, .*`tokenizer`"
        ):
            generate(
                server, teacher_dir, chat_file, tmp_path / "cache", max_new_tokens=64, targets=TargetRule(top_k=20)
            )


def test_the_row_of_such_a_token_is_named(teacher_dir: Path, chat_file: Path, tmp_path: Path) -> None:
    def rename(answer: Any, body: Any) -> Any:
        if server.answered.total() >= 4:  # not the probes
            answer["choices"][0]["logprobs"]["content"][2]["top_logprobs"][1] |= {"token": "\ufffd", "bytes": None}
        return answer

    with FakeHosted(teacher_dir, change=rename) as server:
        with pytest.raises(
            ModelError, match=r"^row \d+, answer 0: token 2 of the answer: found '\ufffd' \(bytes None\)"
        ):
            generate(server, teacher_dir, chat_file, tmp_path / "cache")


def thinking(answer: Any, body: Any) -> Any:
    answer["choices"][0]["message"]["reasoning_content"] = "Let me see."
    return answer


def counted_thoughts(answer: Any, body: Any) -> Any:
    answer["usage"]["completion_tokens_details"] = {"reasoning_tokens": 64}
    return answer


def thinking_only(answer: Any, body: Any) -> Any:
    """The limit of the test request is reached before there is an answer."""
    answer["choices"][0] |= {"logprobs": None, "message": {"content": None, "reasoning_content": "Let"}}
    return answer


def filtered(answer: Any, body: Any) -> Any:
    answer["choices"][0]["finish_reason"] = "content_filter"
    return answer


def unlikely(answer: Any, body: Any) -> Any:
    item = answer["choices"][0]["logprobs"]["content"][0]
    item |= {**item["top_logprobs"][-1], "logprob": -9999.0}
    item["top_logprobs"][-1] = {"token": " ", "bytes": [32], "logprob": item["top_logprobs"][-1]["logprob"]}
    return answer


def no_lists(answer: Any, body: Any) -> Any:
    answer["choices"][0]["logprobs"] = None
    return answer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (thinking, "the model thought before it answered"),
        (counted_thoughts, "the model thought before it answered"),
        (thinking_only, "the model thought before it answered"),
        (filtered, "ended an answer by content_filter"),
        (unlikely, "found a token without a log-probability|twice at one position"),
        (no_lists, "found no choice with logprobs.content"),
    ],
)
def test_answers_that_cannot_be_used(
    change: Callable[[Any, Any], Any], message: str, teacher_dir: Path, chat_file: Path, tmp_path: Path
) -> None:
    with FakeHosted(teacher_dir, change=change) as server, pytest.raises(ModelError, match=message):
        generate(server, teacher_dir, chat_file, tmp_path / "cache")


def no_content(choice: dict[str, Any]) -> None:
    choice |= {"logprobs": {"content": [], "refusal": None}, "message": {"content": ""}, "finish_reason": "stop"}


def no_answer_at_all(choice: dict[str, Any]) -> None:
    choice |= {"logprobs": None, "message": {"content": None, "refusal": "No."}, "finish_reason": "stop"}


def called_a_tool(choice: dict[str, Any]) -> None:
    choice |= {"logprobs": None, "message": {"content": None, "tool_calls": [{}]}, "finish_reason": "tool_calls"}


def ended_by_a_filter(choice: dict[str, Any]) -> None:
    choice |= {"finish_reason": "content_filter"}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [{"messages": [{"role": "user", "content": f"Question {i}"}]} for i in range(4)]
    return write_jsonl(tmp_path / "questions.jsonl", rows)


@pytest.mark.parametrize("spoil", [no_content, no_answer_at_all, called_a_tool, ended_by_a_filter])
def test_a_question_that_gets_no_answer_is_left_out(
    spoil: Callable[[Any], None],
    teacher_dir: Path,
    questions: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seeds: list[int] = []

    def change(answer: Any, body: Any) -> Any:
        if "Question 2" in json.dumps(body["messages"]):
            seeds.append(body["seed"])
            spoil(answer["choices"][0])
        return answer

    with FakeHosted(teacher_dir, change=change) as server:
        summary = generate(server, teacher_dir, questions, tmp_path / "cache")
    assert len(seeds) == len(set(seeds)) == MOST_UNUSABLE
    assert summary.answers == summary.rows == 3 and summary.corpus_report["skipped_answers"] == 1
    assert {line["document"] for line in cf.open_cache(tmp_path / "cache").answers()} == {0, 1, 3}
    assert "row 2, answer 0: " in caplog.text and "Left out." in caplog.text


def test_what_was_left_out_is_not_asked_for_again(teacher_dir: Path, questions: Path, tmp_path: Path) -> None:
    """The answers are there; only the function that judges them failed."""
    (tmp_path / "checks.py").write_text("def ok(example, answer):\n    return 1 / 0\n")

    def change(answer: Any, body: Any) -> Any:
        if "Question 2" in json.dumps(body["messages"]):
            no_content(answer["choices"][0])
        return answer

    keep_if = f"{tmp_path / 'checks.py'}:ok"
    with FakeHosted(teacher_dir, change=change) as server:
        with pytest.raises(DistillError, match="ZeroDivisionError"):
            generate(server, teacher_dir, questions, tmp_path / "cache", keep_if=keep_if)
        asked = server.answered.total()
        (tmp_path / "checks.py").write_text("def ok(example, answer):\n    return True\n")
        summary = generate(server, teacher_dir, questions, tmp_path / "cache", keep_if=keep_if)
        assert server.answered.total() == asked + 2  # the probes
    assert summary.rows == 3 and summary.corpus_report["skipped_answers"] == 1


def test_a_server_that_answers_nothing(teacher_dir: Path, questions: Path, tmp_path: Path) -> None:
    def change(answer: Any, body: Any) -> Any:
        if body["max_tokens"] > 1:  # not the probes
            no_content(answer["choices"][0])
        return answer

    with FakeHosted(teacher_dir, change=change) as server:
        with pytest.raises(DataError, match="the server gave no usable answer to any of 4 prompts"):
            generate(server, teacher_dir, questions, tmp_path / "cache")


def test_what_cannot_be_sent_is_said_before_anything_is_asked(teacher_dir: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": f"Hi {i}"}]} for i in range(6)]
    rows[5]["chat_template_kwargs"] = {"enable_thinking": False}
    data = write_jsonl(tmp_path / "data.jsonl", [{"chat_template_kwargs": None, **row} for row in rows])
    with FakeHosted(teacher_dir) as server:
        with pytest.raises(DataError, match="row 5: found 'enable_thinking' for the chat template"):
            generate(server, teacher_dir, data, tmp_path / "cache")
    assert not server.answered


def test_log_probabilities_of_the_sampler_are_refused(teacher_dir: Path, chat_file: Path, tmp_path: Path) -> None:
    with FakeHosted(teacher_dir, tempered=True) as server, pytest.raises(ModelError, match="depend on the temperature"):
        generate(server, teacher_dir, chat_file, tmp_path / "cache")


@pytest.mark.parametrize(("limit", "message"), [(2.0, None), (1.0, None), (0.0, "'temperature' is too high")])
def test_apis_that_do_not_take_every_temperature(
    limit: float, message: str | None, teacher_dir: Path, questions: Path, tmp_path: Path
) -> None:
    class Cold(FakeHosted):
        def chat(self, body: Any) -> Any:
            if body["temperature"] != 1.0 and not body["temperature"] < limit:
                raise Status(400, {"error": {"message": "'temperature' is too high"}})
            return super().chat(body)

    for tempered in (False, True):
        with Cold(teacher_dir, tempered=tempered) as server:
            if message is None and not tempered:
                assert generate(server, teacher_dir, questions, tmp_path / "cache").rows == 4
                continue
            expected = message or f"by .* nats at {limit - 0.5:g} instead of 1"
            with pytest.raises(ModelError, match=expected):
                generate(server, teacher_dir, questions, tmp_path / "refused")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "The miller"}, r"row 0: found a text, expected messages, .*Write it as"),
        (
            {"messages": [{"role": "user", "content": "Hi"}], "tools": [{"type": "function"}]},
            "row 0: found 'tools' for the chat template",
        ),
    ],
)
def test_prompts_that_are_more_than_messages(
    record: dict[str, Any], message: str, teacher_dir: Path, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [record])
    with FakeHosted(teacher_dir) as server, pytest.raises(DataError, match=message):
        generate(server, teacher_dir, data, tmp_path / "cache")


def test_a_prompt_of_messages_is_sent_as_it_is(teacher_dir: Path, tmp_path: Path) -> None:
    """Without the last answer, and the teacher's own where it has one."""
    asked, answered = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Ho"}]
    theirs = [{"role": "system", "content": "Be kind."}, *asked]
    records = [{"messages": asked + answered, "teacher_messages": None}]
    records.append({"messages": asked + answered, "teacher_messages": theirs})  # type: ignore[dict-item]
    data = write_jsonl(tmp_path / "data.jsonl", records)
    with FakeHosted(teacher_dir) as server:
        generate(server, teacher_dir, data, tmp_path / "cache")
    sent = [json.loads(bytes(key))[0] for key in server.answered]
    assert asked in sent and theirs in sent and len(sent) == 3  # and the probe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation": None}, "`server_kind` openai: a hosted API gives log-probabilities of its own answers only"),
        ({"generation": GenerationConfig(stop=("\n",))}, "`gen_stop`: cannot be combined with a hosted API"),
        ({"generation": GenerationConfig(top_k=4)}, "`gen_top_k`: cannot be combined with a hosted API"),
        ({"generation": GenerationConfig(writer="student")}, "`writer`: cannot be combined with a hosted API"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        CacheTeacherConfig(
            teacher="http://host/v1",
            tokenizer="dir",
            data=DataConfig(data="d"),
            output="o",
            targets=TargetRule(top_k=8),
            server=ServerConfig(kind="openai"),
            **options,
        )


def test_parts_of_characters_are_known_by_their_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    for each in (tokenizer, tiny_sentencepiece()):
        names = TokenNames(each)
        for text in ("東", "😀"):
            for byte in text.encode():
                token = names.find("\\x00", [byte])
                shown = each.convert_ids_to_tokens(token)
                assert token is not None and shown in (f"<0x{byte:02X}>", shown) and "\ufffd" in each.decode([token])
        assert names.find("\ufffd", list("\ufffd".encode())) is None  # a text that was damaged on its way
