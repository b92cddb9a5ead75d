"""Before anything is written: each server that cannot be a teacher is refused, with what to change."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_servers import MODEL, FakeServer
from pipeline.errors import ConfigError, ModelError
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.engines.server.server_config import ServerConfig, server_root
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from runs import command
from tiny import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("impatient")

KINDS = ("vllm", "sglang")


Answer = dict[str, Any]


def refused(at: FakeServer, tokenizer: Path, data: Path, output: Path, **options: Any) -> str:
    """What `cache_teacher` says; nothing is written."""
    of_data = DataConfig(data=str(data), **{"sample_by": "line", "seq_len": 48, **options.pop("of_data", {})})
    with at, pytest.raises((ConfigError, ModelError)) as error:
        options = {"targets": TargetRule(top_k=8), **options}
        cache_teacher(
            CacheTeacherConfig(teacher=at.url, tokenizer=str(tokenizer), data=of_data, output=str(output), **options)
        )
    assert not output.exists()
    return str(error.value)


def lists_of(answer: Answer) -> list[Any]:
    return (
        answer["meta_info"]["input_top_logprobs"] if "meta_info" in answer else answer["choices"][0]["prompt_logprobs"]
    )


def each_logprob(answer: Answer, change: Callable[[float], float]) -> Answer:
    for entries in lists_of(answer)[1:]:
        for entry in entries.values() if isinstance(entries, dict) else entries:
            name = "logprob" if isinstance(entry, dict) else 0
            entry[name] = change(entry[name])
    return answer


def add_bos(answer: Answer, body: Answer) -> Answer:
    if "meta_info" in answer:
        answer["meta_info"]["input_token_logprobs"].insert(0, [None, 1, None])
    else:
        answer["choices"][0]["prompt_token_ids"] = [1, *body["prompt"]]
    lists_of(answer).insert(1, lists_of(answer)[1])
    return answer


def truncate(answer: Answer, body: Answer) -> Answer:
    for entries in lists_of(answer)[1:]:
        while len(entries) > 4:
            entries.popitem() if isinstance(entries, dict) else entries.pop()
    return answer


def skip_cached(answer: Answer, body: Answer) -> Answer:
    """A prefix that is in the cache has no log-probabilities."""
    del lists_of(answer)[1:9]
    return answer


FAULTS: dict[str, tuple[Callable[[Answer, Answer], Answer], str, str]] = {
    "BOS added": (
        add_bos,
        "the server scored tokens that it was not sent: found 48 \\(1, ",
        "version of",
    ),
    "logits": (
        lambda answer, body: each_logprob(answer, lambda logprob: logprob + 15),
        "expected at most 1: these are not log-probabilities of the model's own distribution",
        "Start ",
    ),
    "truncated lists": (truncate, "log-probabilities, expected 8", "8 "),
    "NaN": (
        lambda answer, body: each_logprob(answer, lambda logprob: float("nan")),
        "found a log-probability of nan, expected finite ones",
        "",
    ),
    "prefix cached": (skip_cached, "found 39 (prompt_logprobs|input_top_logprobs), expected 47", "-cache|-caching"),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_answers_that_are_not_the_teachers(
    kind: str, fault: str, teacher_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    change, message, advice = FAULTS[fault]
    server = FakeServer(teacher_dir, kind, change=change)
    said = refused(server, teacher_dir, text_file, tmp_path / "cache")
    assert re.search(message, said) and re.search(advice, said)


@pytest.mark.parametrize(("kind", "advice"), [("vllm", "--logprobs-mode raw_logprobs"), ("sglang", "logit processor")])
def test_tempered_log_probabilities(kind: str, advice: str, teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    said = refused(FakeServer(teacher_dir, kind, tempered=True), teacher_dir, text_file, tmp_path / "cache")
    assert "its log-probabilities depend on the temperature of sampling" in said and advice in said


def test_lists_of_the_position_before(teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    def shift(answer: Answer, body: Answer) -> Answer:
        lists = lists_of(answer)
        lists.insert(1, lists.pop())
        return answer

    said = refused(FakeServer(teacher_dir, "sglang", change=shift), teacher_dir, text_file, tmp_path / "cache")
    assert "they belong to different positions" in said


def test_no_echo_of_the_ids(teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    def hide(answer: Answer, body: Answer) -> Answer:
        answer["choices"][0]["prompt_token_ids"] = None
        return answer

    said = refused(FakeServer(teacher_dir, "vllm", change=hide), teacher_dir, text_file, tmp_path / "cache")
    assert "found no token ids of the prompt in the answer" in said and "0.10 or newer" in said


def test_more_entries_than_the_server_gives(teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    said = refused(FakeServer(teacher_dir, "vllm", cap=5), teacher_dir, text_file, tmp_path / "cache")
    assert (
        said.startswith("`top_k` 8: more than this server gives") and "Start vllm serve with --max-logprobs 8" in said
    )


@pytest.mark.parametrize(("kind", "flag"), [("vllm", "--max-model-len 49"), ("sglang", "--context-length 49")])
def test_documents_longer_than_the_context(
    kind: str, flag: str, teacher_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    said = refused(FakeServer(teacher_dir, kind, max_length=48), teacher_dir, text_file, tmp_path / "cache")
    assert said.startswith("`seq_len` 48: the server takes at most 48 tokens, expected 49")
    assert flag in said and "use `seq_len` 47 or less" in said


@pytest.mark.parametrize("kind", KINDS)
def test_another_tokenizer(kind: str, teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    tiny_tokenizer(seed=7).save_pretrained(tmp_path / "other")
    server = FakeServer(teacher_dir, kind, tokenizer=tmp_path / "other")
    said = refused(server, teacher_dir, text_file, tmp_path / "cache")
    assert said.startswith("`tokenizer`: the server splits") and "Give the tokenizer of the model" in said


def test_a_smaller_vocabulary_than_the_servers(teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    def beyond(answer: Answer, body: Answer) -> Answer:
        lists_of(answer)[3][0][1] = 5000
        return answer

    said = refused(FakeServer(teacher_dir, "sglang", change=beyond), teacher_dir, text_file, tmp_path / "cache")
    assert "found token id 5000, expected ids below 400" in said


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_the_server_does_not_have(kind: str, teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    config = ServerConfig(model="llama")
    said = refused(FakeServer(teacher_dir, kind), teacher_dir, text_file, tmp_path / "cache", server=config)
    assert said.startswith("`model` llama: http://127.0.0.1:") and f"has only {MODEL}. Name one" in said


def test_servers_of_another_kind(teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    server = FakeServer(teacher_dir, "vllm")
    answer = server.answer
    server.answer = lambda path, body: answer(path if path == "/v1/models" else "/nothing", body)  # type: ignore[method-assign]
    said = refused(server, teacher_dir, text_file, tmp_path / "cache")
    assert "found neither vLLM" in said and "`server_kind`" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "http://u:pw@host/v1"}, "`teacher` http://host/v1: found a user name, password or parameters"),
        ({"teacher": "http://host/v1?api_key=sk-1"}, "`teacher` http://host/v1: found a user name"),
        ({"teacher": "http:///v1"}, "found no host"),
        ({"teacher": "http://host:abc/v1"}, "`teacher` …host:abc/v1: found a host or port that cannot be, expected"),
        ({"teacher": "http://host:99999/v1"}, "`teacher` …host:99999/v1: found a host or port that cannot be"),
        ({"teacher": "http://[::1/v1"}, "`teacher` …[::1/v1: found a host or port that cannot be"),
        ({"teacher": "http://u:pw@host:x/v1?key=sk-1"}, "`teacher` …host:x/v1: found a host or port that cannot be"),
        ({"teacher": "http://ho st/v1"}, "`teacher` …ho st/v1: found a host or port that cannot be"),
        ({"teacher": "HTTP://host/v1", "tokenizer": None}, "`tokenizer`: missing"),
        ({"tokenizer": None}, "`tokenizer`: missing"),
        ({"targets": TargetRule()}, "`targets` threshold: a server gives lists of its most likely tokens"),
        ({"targets": TargetRule(kind="hidden")}, "`targets` hidden: a server gives lists"),
        ({"targets": TargetRule(top_k=8, temperature=2.0)}, "`temperature` 2: a server gives"),
        ({"objective": "masked"}, "a server has no masked language models"),
        ({"teacher": "model", "server": ServerConfig(concurrency=4)}, "`server_concurrency`: only if `teacher` is the"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    given = {"teacher": "http://host:8000/v1", "tokenizer": "dir", "targets": TargetRule(top_k=8), **options}
    with pytest.raises(ConfigError) as error:
        CacheTeacherConfig(data=DataConfig(data="d"), output="o", **given)
    assert message in str(error.value) and "pw" not in str(error.value) and "sk-1" not in str(error.value)


def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", " sk-1\n")
    assert ServerConfig(api_key_env="MY_KEY").api_key() == "sk-1"
    for key in ("sk-secret\nX-Other: 1", "sk-secré"):
        monkeypatch.setenv("MY_KEY", key)
        with pytest.raises(ConfigError, match="`server_api_key_env` MY_KEY") as error:
            ServerConfig(api_key_env="MY_KEY").api_key()
        assert "secr" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["http://h:8000", "http://h:8000/", "http://h:8000/v1", "http://h:8000/v1/", "HTTP://h:8000/v1/?"]
)
def test_the_url_may_end_with_v1(url: str) -> None:
    assert server_root(url) == "http://h:8000"


def test_the_command_line_names_its_flags(teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    words = ["--data", text_file, "--output", tmp_path / "cache", "--tokenizer", teacher_dir, "--seq-len", 48]
    with FakeServer(teacher_dir, "vllm") as server:
        first = ["cache-teacher", "--teacher", server.url, *words, "--sample-by", "line", "--max-documents", 4]
        line = command(*first, status=1).stderr.splitlines()[-1]
        assert line.startswith("Error: --targets threshold: a server gives lists of its most likely tokens")
        line = command(*first, "--top-k", 65, status=1).stderr.splitlines()[-1]
        assert line.startswith("Error: --top-k 65: more than this server gives") and "--max-logprobs 65" in line
        command(*first, "--top-k", 20)
