"""Rows with one prompt for the student and another for the teacher, and caches of them against the teacher.

Both sides are tokenised here without the pipeline, and every loss token is found by its text.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import cache_format as cf
from dense import ROUNDING, check_row
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from tiny import completions, conversations, sentence, tiny_tokenizer, write_jsonl

TOKENIZER = tiny_tokenizer(add_bos=True)
BOS, EOS, END = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, "<|im_end|>"
V, SEQ_LEN = 400, 64


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


def contents(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in (path / "shards").iterdir()}
