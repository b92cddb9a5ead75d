"""Wrong caches of ten kinds: `verify` against the teacher tells them apart, from the numbers alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import cache_format as cf
from full_runs import build_full
from masked_runs import settings
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.targets.hidden_rule import HiddenRule
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.verification import TeacherCheck, verify_against_teacher
from pipeline.teacher.verify_config import TeacherCheckConfig
from runs import build_cache, command
from sampled import random, threshold
from tiny import conversations, write_jsonl
from wrong_caches import WRONG, Source, padding_in_sight

TARGETS = {
    "threshold": threshold(0.05),
    "top-k": TargetRule(top_k=16),
    "top-p": TargetRule(kind="top-p", top_p=0.6),
    "random": random(20),
    "hidden": TargetRule(kind="hidden"),
}
# The others are not wrong there (the two dtypes), or no more so than rounding in every module of a tiny random model.
IN_BFLOAT16 = ("one position late", "another teacher", "one layer less", "another rows targets", "permuted ids")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("text") / "chats.jsonl", conversations(3))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, chats: Path) -> dict[str, Source]:
    """Six rows, most of them of 40 tokens, one of them of two documents."""
    folder = tmp_path_factory.mktemp("right")
    sources = {}
    for name, rule in TARGETS.items():
        if name == "hidden":
            path = build_full(teacher_dir, chats, folder / name)
        else:
            path = build_cache(folder / name, teacher_dir, chats, targets=rule, seq_len=40)
        sources[name] = Source(teacher_dir, path)
    return sources


def check(cache: Path, teacher: Any, **options: Any) -> TeacherCheck:
    config = {"rows": 6, "device": "cpu", **options}
    return verify_against_teacher(TeacherCheckConfig(cache=str(cache), teacher=teacher, **config))


@pytest.mark.long
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_cache_is_found(
    kind: str, targets: str, sources: dict[str, Source], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    source = sources[targets]
    path = WRONG[kind](source, tmp_path / "wrong")
    cf.verify_cache(path)
    found = check(path, source.model(), tokenizer=tokenizer)
    assert not found.agrees and found.same_weights and found.repeatable
    assert max(each.found / each.allowed for each in found.comparisons) > 2


@pytest.mark.long
@pytest.mark.parametrize("targets", ["threshold", "random"])
def test_a_wrong_cache_is_found_in_the_noise_of_bfloat16(
    targets: str, sources: dict[str, Source], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    source = sources[targets].in_dtype("bfloat16", tmp_path / "right")
    model = source.model()
    assert check(tmp_path / "right", model, tokenizer=tokenizer).agrees
    for kind in IN_BFLOAT16:
        found = check(WRONG[kind](source, tmp_path / kind), model, tokenizer=tokenizer)
        assert not found.agrees and found.dtype == "bfloat16", kind


@pytest.mark.parametrize("rule", [TargetRule(top_k=16), random(20)], ids=lambda rule: rule.kind)
def test_a_masked_teacher_that_saw_padding_is_found(rule: TargetRule, masked_dir: Path, tmp_path: Path):
    cache_teacher(settings(masked_dir, "bert", tmp_path / "right", targets=rule))
    source = Source(masked_dir / "bert", tmp_path / "right")
    assert check(tmp_path / "right", str(masked_dir / "bert")).agrees
    found = check(padding_in_sight(source, tmp_path / "wrong"), str(masked_dir / "bert"))
    assert not found.agrees and found.repeatable


def test_hidden_states_of_another_layer_are_found(teacher_dir: Path, chats: Path, tmp_path: Path):
    """Beside targets that are right."""
    right = build_cache(tmp_path / "right", teacher_dir, chats, hidden=HiddenRule(layers="0,1"))
    source = Source(teacher_dir, right)
    states = [replace(row.hidden, states=dict.fromkeys((0, 1), row.hidden.states[0])) for row in source.rows]
    rows = [replace(row, hidden=each) for row, each in zip(source.rows, states, strict=True)]
    assert check(right, source.model(), tokenizer=str(teacher_dir)).agrees
    found = check(source.write(tmp_path / "wrong", rows), source.model(), tokenizer=str(teacher_dir))
    assert not found.agrees and found.divergence.agrees and found.deviation.agrees
    assert found.states is not None and found.states.found > 0.1 and found.states.at.startswith("hidden_1 of row")


def test_rows_in_another_chat_template_than_the_teachers(
    teacher_dir: Path, chats: Path, text_file: Path, tmp_path: Path
):
    """The tokens are consistent with the targets: only the recorded template tells. It says nothing of plain text."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|eos|>")
    for data, agrees in ((chats, False), (text_file, True)):
        path = build_cache(tmp_path / data.stem, teacher_dir, data)
        found = check(path, str(teacher_dir), tokenizer=tokenizer, rows=2)
        assert found.agrees is found.same_template is agrees and found.deviation.agrees


def test_a_teacher_that_sees_the_rest_of_its_batch_excuses_nothing(
    sources: dict[str, Source], tokenizer: PreTrainedTokenizerFast
):
    """Its two passes differ by nats; that is not how far a correct cache may be off."""
    source = sources["top-k"]
    model = source.model()
    model.model.layers[0].register_forward_hook(lambda _, __, states: states + 3.0 * (states - states.mean(0, True)))
    found = check(source.cache._directory.path(), model, tokenizer=tokenizer)
    assert not found.repeatable and not found.agrees
    assert found.divergence.batch > 0.25 >= found.divergence.allowed


def test_what_was_compared_is_said_in_words_and_in_json(sources: dict[str, Source], teacher_dir: Path, tmp_path: Path):
    wrong = WRONG["one position late"](sources["threshold"], tmp_path / "wrong")
    words = ["verify", wrong, "--against-teacher", teacher_dir, "--rows", 4, "--device", "cpu"]
    said = " ".join(command(*words, status=1).output.split())
    for part in ("mean KL(cache ‖ teacher)", "allowed", "rounding alone", "does not match", "make the cache again"):
        assert part in said
    command(*words, "--json", tmp_path / "found.json", status=1)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ok"] is False and found["teacher"]["dtype"] == found["teacher"]["cache_dtype"] == "float32"
    for name in ("divergence", "deviation", "draws"):
        assert found["teacher"][name]["found"] > 100 * found["teacher"][name]["allowed"]
        assert found["teacher"][name]["agrees"] is False and "row" in found["teacher"][name]["at"]
