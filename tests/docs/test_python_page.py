"""docs/python.md: its training loop computes what `evaluate` computes, and its table names what functions take."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import distill
from pages import blocks, tables
from runs import build_cache
from tiny import conversations, tiny_llama, tiny_tokenizer, write_jsonl


def test_the_loop_computes_the_kl_of_a_row_of_several_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's head has rows beyond the teacher's vocabulary, with large logits."""
    monkeypatch.chdir(tmp_path)
    teacher = tiny_llama(tmp_path / "models/teacher", tiny_tokenizer())
    tiny_llama(tmp_path / "models/student", tiny_tokenizer(), layers=1, seed=1, pad_vocab=8)
    text = write_jsonl(tmp_path / "chats.jsonl", conversations(2))
    cache = build_cache(tmp_path / "caches/train", teacher, text, seq_len=512)
    (row,) = distill.open_cache(cache)
    assert len(row.segment_lengths) == 2

    (loop,) = [block for block in blocks("docs/python.md", "python") if "sparse_kl" in block]
    names: dict[str, Any] = {}
    exec(loop.replace('tail="sampled"', 'tail="bucket"'), names)  # `evaluate` computes this for any targets
    expected = distill.evaluate(cache, tmp_path / "models/student", device="cpu").kl
    assert names["loss"].item() == pytest.approx(expected, rel=1e-4)
    assert names["fused"].item() == pytest.approx(expected, rel=1e-4)


def test_the_ten_lines_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "models/teacher", tiny_tokenizer())
    tiny_llama(tmp_path / "models/student", tiny_tokenizer(), layers=1, seed=1)
    (tmp_path / "data").mkdir()
    for name in ("chats", "heldout"):
        write_jsonl(tmp_path / f"data/{name}.jsonl", conversations(4))
    lines = blocks("docs/python.md", "python")[0]
    first, second = ({}, {})
    for names in (first, second):
        exec(lines, names)
    assert first["result"].kl == second["result"].kl and first["cache"].rows == second["cache"].rows


def test_the_table_of_functions_names_their_parameters() -> None:
    (table,) = [table for table in tables("docs/python.md") if table[0][0] == "function"]
    for row in table[1:]:
        name, given = re.findall(r"^`(\w+)\((.*)\)`$", row[0])[0]
        named = [each.removesuffix("=…") for each in given.split(", ") if each != "…"]
        parameters = inspect.signature(getattr(distill, name)).parameters
        assert [each for each in named if each not in parameters] == [], name
