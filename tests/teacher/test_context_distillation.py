"""A teacher that reads another prompt than the student: its targets behind that prompt, at the student's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.targets.hidden_rule import HiddenRule
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.packing import TokenCorpus, build_corpus
from tiny import conversations, tiny_llama
from two_prompts import (
    END,
    KINDS,
    SEQ_LEN,
    TOKENIZER,
    check_cache,
    contents,
    document,
    hint,
    ids_of,
    loss_tokens,
    settings,
    texts,
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("context") / "teacher", TOKENIZER, seed=5)


@pytest.fixture(scope="module")
def model(teacher: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64).eval()


@pytest.mark.long
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_those_behind_the_prompt_of_the_teacher(
    kind: str, packing: bool, teacher: Path, model: PreTrainedModel, tmp_path: Path
) -> None:
    rows, documents = KINDS[kind]()
    cache_teacher(settings(teacher, rows, tmp_path / "cache", packing=packing))
    check_cache(tmp_path / "cache", model, documents, loss_tokens(documents, kind))
    found = cf.open_cache(tmp_path / "cache")
    assert (max(len(row.segment_lengths) for row in found.iter_rows()) > 1) == packing
    assert max(len(each.student) for each in documents) > SEQ_LEN  # some completions are cut


@pytest.mark.parametrize(
    "options",
    [
        {"targets": TargetRule(kind="threshold", tail_threshold=0.02)},
        {"hidden": HiddenRule(layers="all", dtype="float32")},
        {"hidden": HiddenRule(layers="1", every=3)},
        {"targets": TargetRule(kind="hidden"), "hidden": HiddenRule(layers="1", dtype="float32")},
    ],
    ids=["threshold", "states", "some states", "hidden targets"],
)
def test_other_targets_too(options: dict[str, Any], teacher: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    rows, documents = texts()
    cache_teacher(settings(teacher, rows, tmp_path / "cache", overlap=6, **options))
    check_cache(tmp_path / "cache", model, documents, loss_tokens(documents, "text"))


def test_with_the_prompt_of_the_student_the_cache_is_the_plain_one(teacher: Path, tmp_path: Path) -> None:
    """Also the random numbers of sampled entries."""
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in texts()[0]]
    rule = TargetRule(kind="threshold", tail_threshold=0.02)
    cache_teacher(settings(teacher, rows, tmp_path / "plain", targets=rule, seq_len=200, teacher_seq_len=None))
    for name, own in (
        ("same", [row["prompt"] for row in rows]),
        ("null", [None] * (len(rows) - 1) + [rows[-1]["prompt"]]),
    ):
        given = [{**row, "teacher_prompt": prompt} for row, prompt in zip(rows, own, strict=True)]
        cache_teacher(settings(teacher, given, tmp_path / name, targets=rule, seq_len=200))
        assert contents(tmp_path / name) == contents(tmp_path / "plain")
    plain, same = (cf.open_cache(tmp_path / name).metadata.corpus for name in ("plain", "same"))
    assert same["token_stream_sha256"] == plain["token_stream_sha256"]
    assert "teacher_stream_sha256" in same and not any(name.startswith("teacher") for name in plain)


# ---- documents and windows


def test_what_the_teacher_cannot_read_is_cut_counted_and_named(
    teacher: Path, model: PreTrainedModel, tmp_path: Path
) -> None:
    rows, documents = texts()
    limit = 100
    config = settings(teacher, rows, tmp_path / "cache", teacher_seq_len=limit)
    warnings: list[str] = []
    summary = cache_teacher(config, on_warning=warnings.append)
    cut = [each for each in documents if len(each.teacher) > limit]
    fitting = sum(min(len(each.teacher), limit) - min(each.teacher_start, limit) for each in documents)
    check_cache(tmp_path / "cache", model, documents, fitting)
    assert 0 < len(cut) < len(documents) and summary.corpus_report["documents_cut_for_teacher"] == len(cut)
    (warning,) = warnings
    first = documents.index(cut[0])
    assert f"{len(cut)} documents are cut" in warning and f"document {first} with {len(cut[0].teacher)} tok" in warning
    assert cf.open_cache(tmp_path / "cache").metadata.corpus["teacher_window_length"] == limit


def test_rows_are_packed_to_the_length_that_the_teacher_reads(tmp_path: Path) -> None:
    def corpus(longest: int) -> TokenCorpus:
        data = settings(tmp_path, texts()[0], tmp_path / "a", teacher_seq_len=longest, seq_len=400).data
        return build_corpus(data, TOKENIZER)

    tight, loose = corpus(250), corpus(1600)
    read = [len(row.teacher.input_ids) for row in tight]
    assert max(read) <= 250 and max(len(row.segment_lengths) for row in tight) > 1
    assert len(loose) < len(tight)


@pytest.mark.parametrize("positions, expected", [(None, 4 * SEQ_LEN), (100, 100), (1000, 4 * SEQ_LEN)])
def test_length_by_default(positions: int | None, expected: int, tmp_path: Path) -> None:
    data = settings(tmp_path, texts()[0], tmp_path / "a", teacher_seq_len=None).data
    assert build_corpus(data, TOKENIZER, positions=positions).longest_read == expected


def test_longer_than_the_positions_of_the_teacher(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`teacher_seq_len` 4000: .* at most 2048 positions"):
        cache_teacher(settings(teacher, texts()[0], tmp_path / "cache", teacher_seq_len=4000))


def test_only_the_last_answer_of_a_chat(teacher: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    """The teacher's messages are then those before it."""
    rows, found = [], []
    for i, row in enumerate(conversations(6, seed=1)):
        *before, answer = row["messages"]
        own = [{"role": "system", "content": hint(i)}, *before[-3:]]
        rows.append({"messages": [*before, answer], "teacher_messages": own})
        prompts = [TOKENIZER.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in (before, own)]
        found.append(document(*map(ids_of, prompts), ids_of(answer["content"] + END + "\n")))
    assert any(message["role"] == "assistant" for row in rows for message in row["teacher_messages"])
    cache_teacher(settings(teacher, rows, tmp_path / "cache", turns="last", seq_len=400))
    check_cache(tmp_path / "cache", model, found, sum(len(each.student) - each.start - 1 for each in found))
