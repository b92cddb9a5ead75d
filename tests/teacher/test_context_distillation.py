"""A teacher that reads another prompt than the student: its targets behind that prompt, at the student's tokens."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import cache_format as cf
from dense import ROUNDING, check_row
from pipeline.errors import ConfigError, DataError
from pipeline.teacher.cache_config import CacheTeacherConfig, DataConfig, HiddenRule
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.generation.generate import generate_cache
from pipeline.teacher.generation.generation_config import GenerationConfig
from pipeline.teacher.plan import plan_cache
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.packing import TokenCorpus, build_corpus
from pipeline.teacher.verification import verify_against_teacher
from pipeline.teacher.verify_config import TeacherCheckConfig
from runs import command
from tiny import completions, conversations, sentence, tiny_llama, tiny_tokenizer, write_jsonl

TOKENIZER = tiny_tokenizer(add_bos=True)
BOS, EOS, END = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, "<|im_end|>"
V, SEQ_LEN = 400, 64


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("context") / "teacher", TOKENIZER, seed=5)


@pytest.fixture(scope="module")
def model(teacher: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64).eval()


@dataclass(frozen=True)
class Document:
    """Token ids of both sides, and where the completion begins in each. Made without the pipeline."""

    student: list[int]
    teacher: list[int]
    start: int
    teacher_start: int


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def document(prompt: list[int], teacher_prompt: list[int], completion: list[int]) -> Document:
    return Document(prompt + completion, teacher_prompt + completion, len(prompt), len(teacher_prompt))


def hint(number: int) -> str:
    return " ".join(sentence(random.Random(100 * number + i)) for i in range(1 + number % 3))


def texts() -> tuple[list[dict[str, Any]], list[Document]]:
    rows = [
        {"prompt": row["prompt"], "teacher_prompt": hint(i) + row["prompt"], "completion": row["completion"] + str(i)}
        for i, row in enumerate(completions(8, seed=3))
    ]
    rows[2]["teacher_prompt"] = None  # the teacher reads what the student reads
    found = [
        document(*([BOS, *ids_of(prompt)] for prompt in prompts), ids_of(row["completion"]) + [EOS])
        for row in rows
        for prompts in [(row["prompt"], row["teacher_prompt"] or row["prompt"])]
    ]
    return rows, found


def chats() -> tuple[list[dict[str, Any]], list[Document]]:
    """Of one to three answers; the teacher has a system message of its own."""
    rows, found = [], []
    for i, row in enumerate(conversations(8, seed=3)):
        messages = row["messages"]
        messages[-1]["content"] += str(i)
        first = next(k for k, message in enumerate(messages) if message["role"] == "assistant")
        own = [{"role": "system", "content": hint(i)}, messages[first - 1]]
        rows.append({"messages": messages, "teacher_messages": own})
        student, read = (
            TOKENIZER.apply_chat_template(each, tokenize=False) for each in (messages, own + messages[first:])
        )
        opening = "<|im_start|>assistant\n"
        starts = [text.index(opening) + len(opening) for text in (student, read)]
        found.append(
            document(
                *(ids_of(t[:s]) for t, s in zip((student, read), starts, strict=True)), ids_of(student[starts[0] :])
            )
        )
    return rows, found


def token_ids() -> tuple[list[dict[str, Any]], list[Document]]:
    rows, found = [], texts()[1]
    for each in found:
        labels = [-100] * each.start + each.student[each.start :]
        rows.append(
            {"input_ids": each.student, "labels": labels, "teacher_input_ids": each.teacher[: each.teacher_start]}
        )
    return rows, found


KINDS = {"text": texts, "chat": chats, "token ids": token_ids}


def settings(teacher: Path, rows: list[dict[str, Any]], output: Path, **options: Any) -> CacheTeacherConfig:
    data = write_jsonl(output.with_suffix(".jsonl"), rows)
    names = ("seq_len", "packing", "teacher_seq_len", "overlap", "loss_on", "turns")
    of_data = {name: options.pop(name) for name in names if name in options}
    text = DataConfig(data=str(data), **{"seq_len": SEQ_LEN, "teacher_seq_len": 600, **of_data})
    options = {"targets": TargetRule(top_k=8), "batch_size": 3, "rows_per_shard": 8, "device": "cpu", **options}
    return CacheTeacherConfig(teacher=str(teacher), data=text, output=str(output), **options)


@torch.no_grad()
def read_by(model: PreTrainedModel, documents: list[Document]) -> list[np.ndarray]:
    """Hidden states [layers + 1, R, D] of what the teacher reads, each document alone."""
    return [
        torch.stack(model(input_ids=torch.tensor([each.teacher]), output_hidden_states=True).hidden_states)[
            :, 0
        ].numpy()
        for each in documents
    ]


def places(row: cf.CacheRow, documents: list[Document]) -> list[tuple[int, int, int]]:
    """(position in the row, document, place in what the teacher reads) of every loss token, found by the row's text."""
    found, start = [], 0
    for length in row.segment_lengths.tolist():
        segment = row.input_ids[start : start + length].tolist()
        ((number, begin),) = {
            (i, at - skipped)
            for i, each in enumerate(documents)
            for skipped in (0, 1)  # later windows begin with BOS
            for at in range(len(each.student))
            if each.student[at : at + length - skipped] == segment[skipped:] and (not skipped or segment[0] == BOS)
        }
        each = documents[number]
        for t in np.flatnonzero(row.loss_mask[start : start + length]).tolist():
            found.append((start + t, number, each.teacher_start + begin + t - each.start))
        start += length
    return found


def check_cache(path: Path, model: PreTrainedModel, documents: list[Document], expected: int) -> None:
    """Every loss token once, each with the targets that the teacher has behind its own prompt."""
    cache, states = cf.open_cache(path), read_by(model, documents)
    learned: Counter[tuple[int, int]] = Counter()
    for row in cache.iter_rows():
        logprobs = np.full((len(row.input_ids), V), -np.inf)
        where = places(row, documents)
        for t, number, place in where:
            learned[number, place] += 1
            assert documents[number].teacher[place + 1] == row.input_ids[t + 1]
            with torch.no_grad():
                logits = model.lm_head(torch.from_numpy(states[number][-1, place]))
            logprobs[t] = logits.log_softmax(0).numpy()
        check_targets(row, logprobs, cache.metadata)
        if row.hidden is not None:
            at = {t: (number, place) for t, number, place in where}
            for layer in row.hidden.states:
                exact = [states[number][layer, place] for number, place in map(at.get, np.flatnonzero(row.hidden.mask))]
                assert row.hidden.values(layer) == pytest.approx(np.array(exact), rel=2e-3, abs=2e-3)
    assert set(learned.values()) == {1} and len(learned) == expected
    cf.verify_cache(path, deep=True)


def check_targets(row: cf.CacheRow, logprobs: np.ndarray, metadata: cf.CacheMetadata) -> None:
    """Exact entries, and the entropy of all probabilities."""
    if metadata.targets["kind"] == "top-k":
        check_row(row, logprobs, metadata)
        return
    for t in np.flatnonzero(row.loss_mask):
        p = np.exp(logprobs[t])
        off = np.sqrt(row.targets.entropy[t]) - np.sqrt(-(p * logprobs[t]).sum())
        assert abs(off) <= metadata.codebooks["entropy"].max_error + ROUNDING
        if metadata.targets["kind"] == "threshold":
            ids, values = (each[: row.targets.exact_counts[t]] for each in row.targets.at(t))
            assert set(np.flatnonzero(p >= metadata.targets["tail_threshold"] + 1e-4)) <= set(ids.tolist())
            bound = metadata.codebooks["target_logprobs"].max_error + ROUNDING
            assert np.exp(values / 2) == pytest.approx(np.sqrt(p[ids.astype(int)]), abs=bound)


def loss_tokens(documents: list[Document], kind: str) -> int:
    if kind != "chat":
        return sum(len(each.student) - each.start for each in documents)
    answers = [each.student[each.start :] for each in documents]
    told = 0
    for answer in answers:  # after the first answer, user turns and the openings of later answers are not in the loss
        text = TOKENIZER.decode(answer)
        turns = text.split("<|im_start|>assistant\n")
        told += sum(len(ids_of(turn.split(END)[0] + END)) for turn in turns)
    return told


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


def contents(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in (path / "shards").iterdir()}


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


@pytest.mark.parametrize("kind", KINDS)
def test_verify_reads_the_prompts_of_the_teacher_again(kind: str, teacher: Path, tmp_path: Path) -> None:
    rows, _ = KINDS[kind]()
    cache_teacher(settings(teacher, rows, tmp_path / "cache", hidden=HiddenRule(layers="1")))
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
    with pytest.raises(ConfigError, match="`data`: the teacher of this cache read what its rows hold"):
        verify_against_teacher(config)


def test_plan(teacher: Path, tmp_path: Path) -> None:
    plan = plan_cache(settings(teacher, texts()[0], tmp_path / "cache"))
    assert plan.counted_tokens == loss_tokens(texts()[1], "text") and plan.position_loss is not None


def test_answers_to_the_prompt_of_the_teacher(teacher: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    rows = [{key: row[key] for key in ("prompt", "teacher_prompt")} for row in texts()[0]]
    config = settings(teacher, rows, tmp_path / "cache", seq_len=200)
    generate_cache(config, GenerationConfig(max_new_tokens=9, answers_per_prompt=2))
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
    generate_cache(settings(teacher, rows, tmp_path / "cache", **lengths), GenerationConfig(max_new_tokens=50))
    found = [len(row.input_ids) for row in cf.open_cache(tmp_path / "cache").iter_rows()]
    assert found[0] <= short + 3 and found[1] <= long + 4


def test_from_the_command_line(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "d.jsonl", texts()[0])
    command("cache-teacher", "--teacher", teacher, "--data", "d.jsonl", "--output", "cache", "--teacher-seq-len", 90)
    found = command("verify", "cache", "--against-teacher", teacher, "--data", "d.jsonl", "--json")
    assert json.loads(found.stdout)["ok"]
