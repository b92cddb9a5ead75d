"""Answers of a teacher on a server, with their targets, against the same model in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

import cache_format as cf
import fake_servers
from fake_servers import FakeServer, Faults
from generating import load, logprobs_of
from pipeline.errors import ModelError
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.generation.generate import generate_cache
from pipeline.teacher.generation.generation_config import GenerationConfig
from pipeline.teacher.progress import GenerationSummary
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from tiny import write_jsonl

pytestmark = pytest.mark.usefixtures("impatient")

KINDS = ("vllm", "sglang")
V = 400


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    return write_jsonl(path, [{"prompt": "The miller " * n} for n in range(1, 4)])


def generate(teacher: str, tokenizer: Path, prompts: Path, output: Path, **options: Any) -> GenerationSummary:
    here = {} if teacher.startswith("http") else {"device": "cpu"}
    config = CacheTeacherConfig(
        teacher=teacher,
        tokenizer=str(tokenizer),
        data=DataConfig(data=str(prompts), seq_len=options.pop("seq_len", 64)),
        output=str(output),
        targets=TargetRule(top_k=8),
        generation=GenerationConfig(**{"max_new_tokens": 8, **options}),
        **here,
    )
    return generate_cache(config)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_the_model_in_this_process(
    kind: str, teacher_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"temperature": 0.0, "stop": ("e",)}
    here = generate(str(teacher_dir), teacher_dir, prompts, tmp_path / "here", **options)
    with FakeServer(teacher_dir, kind, faults=Faults(0.2, kinds=("500", "truncated JSON", "another object"))) as server:
        there = generate(server.url, teacher_dir, prompts, tmp_path / "there", **options)
    assert there.stop_reasons == here.stop_reasons and there.answers == 3
    one, other = (cf.open_cache(tmp_path / name) for name in ("there", "here"))
    assert [line["text"] for line in one.answers()] == [line["text"] for line in other.answers()]
    for row, expected in zip(one.iter_rows(), other.iter_rows(), strict=True):
        np.testing.assert_array_equal(row.input_ids, expected.input_ids)
        np.testing.assert_array_equal(row.loss_mask, expected.loss_mask)
        np.testing.assert_array_equal(row.targets.ids, expected.targets.ids)
        np.testing.assert_allclose(row.targets.logprobs, expected.targets.logprobs, atol=0.1)  # as stored


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_sampled_answers_have_the_models_own_log_probabilities(
    kind: str, teacher_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"temperature": 0.7, "answers_per_prompt": 2}
    with FakeServer(teacher_dir, kind) as server:
        summary = generate(server.url, teacher_dir, prompts, tmp_path / "cache", **options)
        generate(server.url, teacher_dir, prompts, tmp_path / "again", **options)
    assert summary.answers == 6
    cache, again = (cf.open_cache(tmp_path / name) for name in ("cache", "again"))
    model = load(teacher_dir)
    texts = set()
    for line, row, other in zip(cache.answers(), cache.iter_rows(), again.iter_rows(), strict=True):
        np.testing.assert_array_equal(row.input_ids, other.input_ids)  # the same seeds
        expected = logprobs_of(model, row.input_ids, V)
        at = np.flatnonzero(row.loss_mask)
        np.testing.assert_allclose(line["token_logprobs"], expected[at, row.input_ids[at + 1]], atol=1e-4)
        texts.add(line["text"])
    assert len(texts) == 6


@pytest.mark.parametrize(
    ("kind", "advice"), [("vllm", "--logprobs-mode"), ("sglang", "SGLANG_RETURN_ORIGINAL_LOGPROB")]
)
def test_log_probabilities_of_the_sampler_are_refused(
    kind: str, advice: str, teacher_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    with FakeServer(teacher_dir, kind, tempered=True) as server, pytest.raises(ModelError, match=advice):
        generate(server.url, teacher_dir, prompts, tmp_path / "cache")


def beyond(answer: dict[str, Any]) -> None:
    """Makes the third token of an answer one that the tokenizer does not know."""
    if "meta_info" in answer:
        info = answer["meta_info"]
        info["output_token_logprobs"][2] = info["output_top_logprobs"][2][-1] = [-14.0, V + 50, None]
    else:
        found = answer["choices"][0]
        found["token_ids"][2], found["logprobs"]["token_logprobs"][2] = V + 50, -14.0
        found["logprobs"]["top_logprobs"][2][f"token_id:{V + 50}"] = -14.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("times", [1, 99])
def test_tokens_that_the_tokenizer_does_not_know(
    kind: str, times: int, teacher_dir: Path, prompts: Path, tmp_path: Path
) -> None:
    """Rows of padding in the output matrix can be sampled: another seed gives another answer, or none is stored."""
    seen = 0

    def change(answer: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        nonlocal seen
        if len(body.get("prompt", body.get("input_ids"))) == longest and seen < times:
            seen += 1
            beyond(answer)
        return answer

    longest = len(AutoTokenizer.from_pretrained(teacher_dir)("The miller " * 3)["input_ids"])
    with FakeServer(teacher_dir, kind, change=change) as server:
        summary = generate(server.url, teacher_dir, prompts, tmp_path / "cache", temperature=1.0)
    assert seen == (1 if times == 1 else 8)
    assert summary.rows == (3 if times == 1 else 2)
    assert all(row.input_ids.max() < V for row in cf.open_cache(tmp_path / "cache").iter_rows())
    cf.verify_cache(tmp_path / "cache", deep=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bos_that_the_server_adds_is_refused(kind: str, teacher_dir: Path, prompts: Path, tmp_path: Path) -> None:
    def add_bos(answer: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        if kind == "sglang":
            answer["meta_info"]["prompt_tokens"] += 1
        else:
            answer["choices"][0]["prompt_token_ids"] = [1, *body["prompt"]]
        return answer

    with FakeServer(teacher_dir, kind, change=add_bos) as server:
        with pytest.raises(ModelError, match="the server (scored tokens that it was not sent|read 6[0-9] tokens)"):
            generate(server.url, teacher_dir, prompts, tmp_path / "cache")


def test_a_finished_cache_of_another_served_model_is_refused(
    teacher_dir: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server names no fingerprints, so the name of its model is what there is to compare."""
    with FakeServer(teacher_dir, "vllm") as server:
        first = generate(server.url, teacher_dir, prompts, tmp_path / "cache")
        assert generate(server.url, teacher_dir, prompts, tmp_path / "cache").rows == first.rows
    monkeypatch.setattr(fake_servers, "MODEL", "other")
    with (
        FakeServer(teacher_dir, "vllm") as server,
        pytest.raises(cf.CacheError, match='recorded "tiny", given "other"'),
    ):
        generate(server.url, teacher_dir, prompts, tmp_path / "cache")
