"""llama.cpp's server lists log-probabilities only where it generates a token, and not everywhere there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_server_answers import generate
from test_server_engine import capture, each_text_and_rule, rows_here, same

import cache_format as cf
from fake_apis import FakeLlamaCpp
from fake_servers import Faults
from generating import load, logprobs_of
from pipeline.errors import ConfigError, ModelError
from pipeline.teacher.engines.server.http_client import UnusableAnswer
from pipeline.teacher.engines.server.llama_cpp_dialect import GAP, _places
from tiny import write_jsonl

pytestmark = pytest.mark.usefixtures("impatient")

FAULTS = ("dropped connection", "429 with Retry-After", "500", "truncated JSON", "malformed JSON", "another object")


@pytest.mark.long
@each_text_and_rule
def test_rows_are_those_of_the_model_in_this_process(
    data: str,
    options: dict[str, Any],
    teacher_dir: Path,
    tmp_path: Path,
    raw_rows: list[cf.CacheRow],
    request: pytest.FixtureRequest,
) -> None:
    path, of_data = request.getfixturevalue(data), {"max_documents": 5, "seq_len": 96}
    expected = rows_here(raw_rows, teacher_dir, path, tmp_path, of_data=of_data, **options)
    with FakeLlamaCpp(teacher_dir, faults=Faults(0.1, kinds=FAULTS)) as server:
        capture(server.url, teacher_dir, path, tmp_path / "there", of_data=of_data, **options)
    same(raw_rows, expected)
    capture_of = cf.open_cache(tmp_path / "there").metadata.capture
    assert (capture_of["server"], capture_of["server_version"]) == ("llama.cpp", "b11434-fake")


def test_a_document_is_one_request_and_a_prompt_is_read_at_once(teacher_dir: Path, tmp_path: Path) -> None:
    words = "the miller came back "
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": words * 2 * GAP, "completion": words * 2}])
    with FakeLlamaCpp(teacher_dir, max_length=2048) as server:
        capture(server.url, teacher_dir, data, tmp_path / "cache", of_data={"seq_len": 1024})
        asked = [-prompt[-1] for prompt in server.answered]
    (row,) = cf.open_cache(tmp_path / "cache").iter_rows()
    assert asked[-1] == row.loss_mask.sum() < GAP * 4


@pytest.mark.parametrize("stop", [(), ("e",), ("er ", "“")], ids=str)
def test_greedy_answers_are_those_of_the_model_in_this_process(
    stop: tuple[str, ...], teacher_dir: Path, chat_file: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"temperature": 0.0, "stop": stop, "max_new_tokens": 16}
    here = generate(str(teacher_dir), teacher_dir, chat_file, tmp_path / "here", seq_len=160, **options)
    with FakeLlamaCpp(teacher_dir, faults=Faults(0.1, kinds=FAULTS)) as server:
        there = generate(server.url, teacher_dir, chat_file, tmp_path / "there", seq_len=160, **options)
    assert there.stop_reasons == here.stop_reasons and there.usage is None
    one, other = (cf.open_cache(tmp_path / name) for name in ("there", "here"))
    assert [line["text"] for line in one.answers()] == [line["text"] for line in other.answers()]
    for row, expected in zip(one.iter_rows(), other.iter_rows(), strict=True):
        np.testing.assert_array_equal(row.input_ids, expected.input_ids)
        np.testing.assert_array_equal(row.targets.ids, expected.targets.ids)


@pytest.mark.long
def test_sampled_answers_have_the_models_own_log_probabilities(
    teacher_dir: Path, chat_file: Path, tmp_path: Path
) -> None:
    """A random model writes parts of characters, of which the server says nothing, and unlikely tokens."""
    with FakeLlamaCpp(teacher_dir) as server:
        options: dict[str, Any] = {"temperature": 3.0, "answers_per_prompt": 2, "max_new_tokens": 24}
        summary = generate(server.url, teacher_dir, chat_file, tmp_path / "cache", seq_len=160, **options)
        asked = server.answered.items()
        whole, alone = (sum(n for prompt, n in asked if (prompt[-1] == -1) is one) for one in (False, True))
    assert summary.answers == whole and alone > summary.answers
    cache, model = cf.open_cache(tmp_path / "cache"), load(teacher_dir)
    for line, row in zip(cache.answers(), cache.iter_rows(), strict=True):
        expected = logprobs_of(model, row.input_ids, 400)
        at = np.flatnonzero(row.loss_mask)
        np.testing.assert_allclose(line["token_logprobs"], expected[at, row.input_ids[at + 1]], atol=1e-4)
        for t in at:
            ids, logprobs = row.targets.at(t)
            np.testing.assert_allclose(logprobs, expected[t, ids], atol=0.1)  # as stored


@pytest.mark.long
def test_no_more_requests_at_once_than_the_server_has_slots(teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    with FakeLlamaCpp(teacher_dir, slots=2) as server:
        capture(server.url, teacher_dir, text_file, tmp_path / "cache")
    assert server.most_in_work == 2
    assert cf.open_cache(tmp_path / "cache").metadata.capture["batch_size"] == 16


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12))
def test_lists_are_placed_only_where_they_must_belong(tokens: list[tuple[int, bool]]) -> None:
    generated = [token for token, _ in tokens]
    places = [i for i, (_, listed) in enumerate(tokens) if listed]
    found = _places(generated, [generated[place] for place in places])
    assert all(one in (None, other) for one, other in zip(found, places, strict=True))
    if len(places) == len(generated):
        assert found == places


def test_lists_of_other_tokens_are_not_placed() -> None:
    with pytest.raises(UnusableAnswer, match="token 9, which was not generated"):
        _places([1, 2, 3], [1, 9])


def add_bos(answer: Any, body: Any) -> Any:
    return {**answer, "tokens_evaluated": answer["tokens_evaluated"] + 1}


def ignore_grammar(answer: Any, body: Any) -> Any:
    return {**answer, "tokens": [token ^ 1 for token in answer["tokens"]]}


def truncate(answer: Any, body: Any) -> Any:
    for item in answer["completion_probabilities"]:
        item["top_logprobs"].pop()
    return answer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"change": add_bos}, r"the server read \d+ tokens of a prompt, expected \d+.*takes prompts of token ids"),
        ({"change": ignore_grammar}, r"expected the \d+ of the grammar.*whose grammars take token ids"),
        ({"change": truncate}, "found 7 log-probabilities, expected 8"),
        ({"tempered": True}, "its log-probabilities depend on the temperature of sampling"),
        ({"max_length": 48}, "`seq_len` 48: the server takes at most 48 tokens, expected 49.*ctx-size of 49"),
    ],
)
def test_servers_that_cannot_be_a_teacher(
    options: dict[str, Any], message: str, teacher_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    with FakeLlamaCpp(teacher_dir, **options) as server:
        with pytest.raises((ConfigError, ModelError), match=message):
            capture(server.url, teacher_dir, text_file, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
