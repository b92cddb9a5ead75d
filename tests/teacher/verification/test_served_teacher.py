"""`verify` against a teacher on a server, which lists its most likely tokens and takes no rounding errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import cache_format as cf
from fake_servers import FakeServer
from pipeline.errors import ConfigError
from pipeline.teacher.engines.server.server_config import ServerConfig
from pipeline.teacher.targets.hidden_rule import HiddenRule
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.verification import TeacherCheck, verify_against_teacher
from pipeline.teacher.verify_config import TeacherCheckConfig
from runs import build_cache, command
from sampled import threshold
from tiny import english, tiny_llama, tiny_tokenizer

TOP, NUCLEUS = TargetRule(top_k=8), TargetRule(kind="top-p", top_p=0.6, max_entries=24)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six rows of 40 tokens or so."""
    path = tmp_path_factory.mktemp("text") / "few.txt"
    path.write_text(english(8), encoding="utf-8")
    return path


def check(cache: Path, url: str, tokenizer: Path, **options: Any) -> TeacherCheck:
    config = {"rows": 4, "tokenizer": str(tokenizer), **options}
    return verify_against_teacher(TeacherCheckConfig(cache=str(cache), teacher=url, **config))


@pytest.mark.parametrize(("kind", "rule"), [("vllm", TOP), ("sglang", NUCLEUS)], ids=["vllm", "sglang"])
def test_a_right_cache_whichever_engine_made_it(
    kind: str, rule: TargetRule, teacher_dir: Path, few: Path, tmp_path: Path
) -> None:
    build_cache(tmp_path / "here", teacher_dir, few, targets=rule)
    with FakeServer(teacher_dir, kind) as server:
        words = ["--teacher", server.url, "--tokenizer", teacher_dir, "--data", few, "--seq-len", 48]
        words += ["--top-k", 8] if rule is TOP else ["--targets", "top-p", "--top-p", 0.6, "--max-entries", 24]
        command("cache-teacher", *words, "--output", tmp_path / "there")
        for cache in ("here", "there"):
            found = check(tmp_path / cache, server.url, teacher_dir)
            assert found.agrees and found.repeatable and found.same_weights is None
            assert found.same_entries == 1.0 and found.positions > 50
            assert found.deviation.found < 1e-4 < found.deviation.allowed < 0.01
            assert found.divergence.found < 1e-7


@pytest.mark.parametrize("rule", [TOP, NUCLEUS], ids=lambda rule: rule.kind)
def test_the_cache_of_another_teacher(rule: TargetRule, teacher_dir: Path, few: Path, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "other", tiny_tokenizer(), seed=5)
    build_cache(tmp_path / "cache", tmp_path / "other", few, targets=rule)
    with FakeServer(teacher_dir, "vllm") as server:
        found = check(tmp_path / "cache", server.url, teacher_dir)
    assert not found.agrees and not found.divergence.agrees and not found.deviation.agrees
    assert found.repeatable and found.same_entries < 0.5


def test_lists_that_leave_no_probability(few: Path, tmp_path: Path) -> None:
    """The tokens that a sure teacher lists sum to 1 in float32, or to more; another teacher's cache has others."""
    for name, seed in (("teacher", 1), ("other", 5)):
        tiny_llama(tmp_path / name, tiny_tokenizer(), seed=seed, hidden=128, scale=1.0)
    for name in ("teacher", "other"):
        build_cache(tmp_path / f"cache-{name}", tmp_path / name, few, targets=TargetRule(top_k=64))
    with FakeServer(tmp_path / "teacher", "vllm") as server:
        right, wrong = (
            check(tmp_path / f"cache-{name}", server.url, tmp_path / "teacher") for name in ("teacher", "other")
        )
    assert right.agrees and right.divergence.found < 1e-6
    assert wrong.repeatable and not wrong.divergence.agrees and not wrong.deviation.agrees


@pytest.mark.parametrize(
    ("dtype", "nats", "agrees"),
    [
        ("float32", 0.001, True),
        ("float32", 0.1, False),
        ("float16", 0.003, True),
        ("float16", 0.1, False),
        ("bfloat16", 0.1, True),
        ("bfloat16", 0.4, False),
    ],
)
def test_how_far_a_server_may_be_off(
    dtype: str, nats: float, agrees: bool, teacher_dir: Path, few: Path, tmp_path: Path
) -> None:
    """A correct cache may be as far off as two engines are in its dtype; not a smaller model or a coarser dtype."""

    def shifted(answer: Any, body: Any) -> Any:
        for entries in answer["choices"][0]["prompt_logprobs"][1:]:
            for each in entries.values():
                each["logprob"] += nats if each["rank"] % 2 else -nats
        return answer

    words = ["--teacher", teacher_dir, "--data", few, "--seq-len", 48, "--top-k", 8, "--dtype", dtype]
    command("cache-teacher", *words, "--output", tmp_path / "cache")
    with FakeServer(teacher_dir, "vllm", change=shifted) as server:
        found = check(tmp_path / "cache", server.url, teacher_dir)
    assert found.agrees is agrees and found.cache_dtype == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": threshold(0.05)}, "its targets are of kind threshold, .* Give the teacher's directory"),
        ({"targets": TargetRule(top_k=8, temperature=2.0)}, "its targets are at temperature 2"),
        ({"hidden": HiddenRule(layers="1")}, "it has hidden states"),
        ({"targets": TargetRule(top_k=65)}, "65 entries: more than this server gives.* --max-logprobs 65"),
    ],
)
def test_what_a_server_cannot_compute_again(
    options: dict[str, Any], message: str, teacher_dir: Path, few: Path, tmp_path: Path
) -> None:
    build_cache(tmp_path / "cache", teacher_dir, few, **{"targets": TOP, **options})
    with FakeServer(teacher_dir, "vllm") as server, pytest.raises(ConfigError, match=message):
        check(tmp_path / "cache", server.url, teacher_dir)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`tokenizer`: missing, and `against_teacher` http://host is the URL"),
        ({"tokenizer": "dir", "dtype": "bfloat16"}, "`dtype`: cannot be combined with a teacher on a server"),
        ({"tokenizer": "dir", "server": ServerConfig(kind="openai")}, "`server_kind` openai: a hosted API scores only"),
        ({"teacher": "dir", "server": ServerConfig(concurrency=3)}, "`server_concurrency`: only if `against_teacher`"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TeacherCheckConfig(**{"cache": "cache", "teacher": "http://host", **options})


def test_the_command(teacher_dir: Path, few: Path, tmp_path: Path) -> None:
    build_cache(tmp_path / "cache", teacher_dir, few, targets=TOP)
    with FakeServer(teacher_dir, "vllm") as server:
        words = ["verify", tmp_path / "cache", "--against-teacher", server.url, "--tokenizer", teacher_dir, "--rows", 2]
        assert "unknown (a server does not tell)" in command(*words).stdout
        found = json.loads(command(*words, "--json").stdout)
    assert found["ok"] and found["teacher"]["same_weights"] is None and found["teacher"]["dtype"] == "unknown"
    assert cf.open_cache(tmp_path / "cache").metadata.entropy_known


def test_the_context_of_the_server_is_too_short(teacher_dir: Path, few: Path, tmp_path: Path) -> None:
    build_cache(tmp_path / "cache", teacher_dir, few, targets=TOP)
    with FakeServer(teacher_dir, "vllm", max_length=20) as server:
        with pytest.raises(ConfigError, match=r"cache, documents of \d+ tokens: the server takes at most 20 tokens"):
            check(tmp_path / "cache", server.url, teacher_dir)
