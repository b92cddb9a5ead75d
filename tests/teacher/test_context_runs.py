"""Runs with a prompt for the teacher: refused, continued, verified, planned, and answered."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import cache_format as cf
from cache_format.manifest.card import card
from pipeline.errors import ConfigError, DataError
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.generation.generate import generate_cache
from pipeline.teacher.generation.generation_config import GenerationConfig
from pipeline.teacher.plan import plan_cache
from pipeline.teacher.targets.hidden_rule import HiddenRule
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.verification import verify_against_teacher
from pipeline.teacher.verify_config import TeacherCheckConfig
from runs import command
from tiny import tiny_llama, write_jsonl
from two_prompts import KINDS, TOKENIZER, check_cache, contents, document, hint, ids_of, loss_tokens, settings, texts


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("context") / "teacher", TOKENIZER, seed=5)


@pytest.fixture(scope="module")
def model(teacher: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64).eval()


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def says(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


PAIR = {"prompt": "Why?", "completion": " So."}
CHAT = {"messages": [user("Why?"), says("So.")]}
TWO = {"messages": [user("Why?"), says("So."), user("And?"), says("Yes.")]}
IDS = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}


@pytest.mark.parametrize(
    "row, options, error, message",
    [
        (PAIR | {"teacher_prompt": 3}, {}, DataError, "row 0, column 'teacher_prompt': found int, expected a string"),
        (
            PAIR | {"teacher_messages": [user("Why?")]},
            {},
            DataError,
            "'teacher_messages'.*expected only 'teacher_prompt'",
        ),
        ({"text": "Why?", "teacher_prompt": "Why?"}, {}, DataError, "'teacher_prompt'.*no prompt for the teacher"),
        (PAIR | {"teacher_prompt": "Why?"}, {"loss_on": "all"}, ConfigError, "`loss_on` all.*does not see"),
        (
            CHAT | {"teacher_messages": "Why?"},
            {},
            DataError,
            "row 0, column 'teacher_messages': found str, expected a list",
        ),
        (CHAT | {"teacher_messages": [says("So.")]}, {}, DataError, "row 0, .*last message is the assistant's"),
        (
            TWO | {"teacher_messages": [user("A"), says("B"), user("C")]},
            {},
            DataError,
            "row 0.* 2 answers .*`turns=last`",
        ),
        (IDS | {"teacher_input_ids": []}, {}, DataError, "row 0, column 'teacher_input_ids'.*empty prompt"),
        (PAIR, {}, ConfigError, "`teacher_seq_len` 600: only for data with a prompt for the teacher"),
        (PAIR | {"teacher_prompt": "Why?"}, {"all_positions": True}, ConfigError, "`all_positions`: the teacher reads"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(
    row: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        cache_teacher(settings(teacher, [row], tmp_path / "cache", **options))
    assert not (tmp_path / "cache").exists()


# ---- what else reads a cache or writes one


def test_a_run_is_continued_with_the_same_prompts_only(teacher: Path, tmp_path: Path) -> None:
    rows, _ = texts()
    whole, config = (settings(teacher, rows, tmp_path / name, rows_per_shard=2) for name in ("whole", "cache"))
    cache_teacher(whole)

    def interrupt(progress: Any) -> None:
        if progress.rows >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_teacher(config, on_progress=interrupt)
    other = [{**row, "teacher_prompt": "Now. " + row["prompt"]} for row in rows]
    with pytest.raises(cf.MismatchError, match="teacher_stream_sha256"):
        cache_teacher(settings(teacher, other, tmp_path / "cache", rows_per_shard=2))
    cache_teacher(settings(teacher, rows, tmp_path / "cache", rows_per_shard=2))
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_verify_reads_the_prompts_of_the_teacher_again(kind: str, teacher: Path, tmp_path: Path) -> None:
    rows, _ = KINDS[kind]()
    rule = TargetRule(kind="threshold", tail_threshold=0.05)  # its draws are those of the student's positions
    cache_teacher(settings(teacher, rows, tmp_path / "cache", targets=rule, hidden=HiddenRule(layers="1")))
    check = TeacherCheckConfig(cache=str(tmp_path / "cache"), teacher=str(teacher), rows=4)
    assert verify_against_teacher(check).agrees

    moved = (tmp_path / "cache.jsonl").rename(tmp_path / "moved.jsonl")
    with pytest.raises(ConfigError, match="prompts that are not in the cache.*no such file.*as `data`"):
        verify_against_teacher(check)
    assert verify_against_teacher(replace(check, data=str(moved))).agrees

    name = next(name for name in rows[0] if name.startswith("teacher"))
    changed = [rows[0] | {name: rows[1][name]}, *rows[1:]]
    other = write_jsonl(tmp_path / "other.jsonl", changed)
    with pytest.raises(ConfigError, match="another text in .*other.jsonl than its teacher read"):
        verify_against_teacher(replace(check, data=str(other)))


def test_a_teacher_that_reads_the_rows_needs_no_data(teacher: Path, tmp_path: Path) -> None:
    cache_teacher(settings(teacher, [PAIR], tmp_path / "cache", teacher_seq_len=None))
    config = TeacherCheckConfig(cache=str(tmp_path / "cache"), teacher=str(teacher), data="cache.jsonl")
    with pytest.raises(ConfigError, match="`data`: the teacher of this cache read the cache's own rows"):
        verify_against_teacher(config)


def test_the_card_says_that_the_teacher_read_something_else(teacher: Path, tmp_path: Path) -> None:
    for name, row in (("own", PAIR | {"teacher_prompt": "Why?"}), ("plain", PAIR)):
        cache_teacher(settings(teacher, [row], tmp_path / name, teacher_seq_len=None))
        text = card(cf.open_cache(tmp_path / name).manifest)
        assert ("| prompts | the teacher read prompts of its own" in text) == (name == "own")


def test_plan(teacher: Path, tmp_path: Path) -> None:
    plan = plan_cache(settings(teacher, texts()[0], tmp_path / "cache"))
    assert plan.loss_tokens == loss_tokens(texts()[1], "text") and plan.position_loss is not None


def test_answers_to_the_prompt_of_the_teacher(teacher: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    rows = [{key: row[key] for key in ("prompt", "teacher_prompt")} for row in texts()[0]]
    generation = GenerationConfig(max_new_tokens=9, answers_per_prompt=2)
    generate_cache(settings(teacher, rows, tmp_path / "cache", seq_len=200, generation=generation))
    cache, documents = cf.open_cache(tmp_path / "cache"), []
    for line, row in zip(cache.answers(), cache.iter_rows(), strict=True):
        known = texts()[1][line["document"]]
        own, answer = known.student[: known.start], row.input_ids[line["prompt_tokens"] :].tolist()
        assert row.input_ids[: line["prompt_tokens"]].tolist() == own
        documents.append(document(own, known.teacher[: known.teacher_start], answer))
        logits = model(input_ids=torch.tensor([documents[-1].teacher])).logits[0].log_softmax(1)
        said = logits[known.teacher_start - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert line["token_logprobs"] == pytest.approx(said.tolist(), abs=1e-3)
    check_cache(tmp_path / "cache", model, documents, sum(len(each.student) - each.start for each in documents))
    check = TeacherCheckConfig(cache=str(tmp_path / "cache"), teacher=str(teacher), rows=5)
    assert verify_against_teacher(check).agrees


def test_an_answer_fits_both_sides(teacher: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "Go on: the", "teacher_prompt": hint(5)}, {"prompt": hint(5), "teacher_prompt": "Go on: the"}]
    long, short = len(ids_of(hint(5))) + 1, len(ids_of("Go on: the")) + 1
    lengths = {"seq_len": long + 4, "teacher_seq_len": long + 3}
    generation = GenerationConfig(max_new_tokens=50)
    generate_cache(settings(teacher, rows, tmp_path / "cache", generation=generation, **lengths))
    found = [len(row.input_ids) for row in cf.open_cache(tmp_path / "cache").iter_rows()]
    assert found[0] <= short + 3 and found[1] <= long + 4


def test_from_the_command_line(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "d.jsonl", texts()[0])
    command("cache-teacher", "--teacher", teacher, "--data", "d.jsonl", "--output", "cache", "--teacher-seq-len", 90)
    found = command("verify", "cache", "--against-teacher", teacher, "--data", "d.jsonl", "--json")
    assert json.loads(found.stdout)["ok"]
