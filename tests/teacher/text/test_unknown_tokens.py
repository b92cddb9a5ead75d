"""A tokenizer with more tokens than its model, as that of Gemma 3's text models, in both stages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import cache_format as cf
from chat_templates import FORMATS
from pipeline.errors import DataError
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.held_out import evaluate
from pipeline.student.data.cross_tokenizer import CrossTokenizerDataset
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.engines.transformers_engine import TransformersEngine
from pipeline.teacher.generation.generate import generate_cache
from pipeline.teacher.generation.generation_config import GenerationConfig
from pipeline.teacher.plan import plan_cache
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.masked.mask_rule import MaskRule
from runs import build_cache, train
from tiny import english, tiny_llama, tiny_tokenizer, write_jsonl
from tiny_masked import tiny_masked, tokenizer_of

EXTRA, ID = "<image_soft_token>", 400


def with_one_more(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [EXTRA]}, replace_extra_special_tokens=False)
    assert tokenizer.convert_tokens_to_ids(EXTRA) == ID
    return tokenizer


def documents(found_in: int | None, count: int = 200) -> list[dict[str, Any]]:
    lines = english(3 * count).splitlines()[:count]
    return [{"text": f"{line} {EXTRA} {EXTRA}" if i == found_in else line} for i, line in enumerate(lines)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    tiny_llama(folder / "teacher", tokenizer)
    with_one_more(tokenizer).save_pretrained(folder / "teacher")
    tiny_masked(folder / "masked", "bert")
    with_one_more(tokenizer_of("bert")).save_pretrained(folder / "masked")
    return folder


def settings(folder: Path, output: Path, teacher: str, found_in: int | None, **options: Any) -> CacheTeacherConfig:
    data = write_jsonl(output.with_suffix(".jsonl"), documents(found_in))
    text = DataConfig(data=str(data), seq_len=64)
    return CacheTeacherConfig(teacher=str(folder / teacher), data=text, output=str(output), device="cpu", **options)


def generate(config: CacheTeacherConfig) -> object:
    return generate_cache(replace(config, generation=GenerationConfig(max_new_tokens=4)))


@pytest.mark.parametrize(
    "teacher, run, options",
    [
        ("teacher", cache_teacher, {}),
        ("teacher", plan_cache, {}),
        ("teacher", generate, {}),
        ("masked", cache_teacher, {"masking": MaskRule(probability=0.15, random_replace_prob=0.0)}),
    ],
    ids=["causal", "plan", "generation", "masked"],
)
def test_a_token_without_an_embedding_is_reported_before_anything_is_computed(
    folder: Path,
    tmp_path: Path,
    teacher: str,
    run: Callable[[CacheTeacherConfig], object],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TransformersEngine, "run", None)
    monkeypatch.setattr(TransformersEngine, "generate", None)
    found = rf"cache.jsonl, row 151: found token {ID}, '{EXTRA}', expected ids below {ID}: .* its tokenizer has 401"
    with pytest.raises(DataError, match=found):
        run(settings(folder, tmp_path / "cache", teacher, found_in=151, **options))
    assert not (tmp_path / "cache").exists()


def test_the_row_of_a_chat_that_becomes_several_documents_is_named(tmp_path: Path) -> None:
    tokenizer = FORMATS["qwen3"].tokenizer()
    tiny_llama(tmp_path / "teacher", tokenizer)
    known = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [EXTRA]}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(tmp_path / "teacher")

    def chat(row: int) -> dict[str, Any]:
        answers = [f"<think>\nhm\n</think>\n\nsat{EXTRA if row == 3 else ''}", "<think>\nhm\n</think>\n\nran"]
        turns = ([{"role": "user", "content": "?"}, {"role": "assistant", "content": each}] for each in answers)
        return {"messages": [message for turn in turns for message in turn]}

    data = write_jsonl(tmp_path / "chats.jsonl", [chat(row) for row in range(6)])
    text = DataConfig(data=str(data), seq_len=128)
    with pytest.raises(DataError, match=f"chats.jsonl, row 3: found token .*expected ids below {known}"):
        cache_teacher(
            CacheTeacherConfig(teacher=str(tmp_path / "teacher"), data=text, output=str(tmp_path / "c"), device="cpu")
        )


def test_text_without_the_token_is_cached(folder: Path, tmp_path: Path) -> None:
    cache_teacher(settings(folder, tmp_path / "cache", "teacher", found_in=None))
    assert cf.open_cache(tmp_path / "cache").metadata.vocab_size == ID


def test_tokens_are_not_read_again_if_the_model_knows_them_all(
    teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.teacher.text.packing.TokenCorpus.first_token_beyond", None)
    cache_teacher(settings(teacher_dir.parent, tmp_path / "cache", teacher_dir.name, found_in=None))


@pytest.mark.long
def test_a_student_whose_tokenizer_has_more_tokens(folder: Path, tmp_path: Path, teacher_dir: Path) -> None:
    """To the student the token is text like any other, as it is to the teacher."""
    data = write_jsonl(tmp_path / "text.jsonl", documents(found_in=3, count=20))
    cache = build_cache(tmp_path / "cache", teacher_dir, data, seq_len=200)
    student = tiny_llama(tmp_path / "student", tiny_tokenizer(seed=7), layers=1, hidden=16)
    own = with_one_more(tiny_tokenizer(seed=7))
    own.save_pretrained(student)

    opened = cf.open_cache(cache)
    every, known = (
        [dataset[i].input_ids for i in range(len(opened))]
        for dataset in (CrossTokenizerDataset(opened, tiny_tokenizer(), own, vocab_size=size) for size in (None, ID))
    )
    assert any(ID in ids for ids in every) and not any(ID in ids for ids in known)
    assert sum(own.decode(ids).count(EXTRA) for ids in known) == 2

    train(tmp_path / "trained", cache, student=student, cross_tokenizer="project", max_steps=2)
    options = {"cross_tokenizer": "project", "device": "cpu"}
    assert evaluate(EvaluateConfig(cache=str(cache), student=str(tmp_path / "trained"), **options)).kl > 0
