"""Small corpora, and what their tokens say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerFast

from pipeline.teacher.text.corpus import Documents
from tiny import write_jsonl

TEXTS = ["The first text.", "A second one,\nof two lines.", "Dritter Text: Äpfel."]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "  Six!\n"},
]


def texts(documents: Documents, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(row["input_ids"]) for row in documents.tokens]


def learned(documents: Documents, tokenizer: PreTrainedTokenizerFast) -> list[list[str]]:
    """The text of each run of loss tokens, per document."""
    result = []
    for row in documents.tokens:
        ids, targets = np.array(row["input_ids"], dtype=int), np.array(row["is_target"], dtype=bool)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], targets, [0]])))
        result.append([tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)])
    return result


def jsonl(tmp_path: Path, *records: Any) -> str:
    return str(write_jsonl(tmp_path / "data.jsonl", records))


def write_saved(path: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(path))


def write_saved_splits(path: Path) -> None:
    train, test = (datasets.Dataset.from_dict({"text": t}) for t in (TEXTS, ["other"]))
    datasets.DatasetDict(train=train, test=test).save_to_disk(str(path))
