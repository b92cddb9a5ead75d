"""axolotl's three forms, NeMo-Aligner's lines, base files of llama.cpp, and sources that are none."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foreign_files import (
    MadeUp,
    check_entries,
    import_rows,
    made_up_rows,
    nested,
    write_lines,
    write_llama_cpp,
    write_parquet,
)
from pipeline.errors import ConfigError, DataError

K = 8
ROWS = made_up_rows(3)
START = 15  # of the completion


def test_axolotl_v1(tmp_path: Path, tokenizer: Any):
    """Lists about the last tokens of the text, with tokens by number."""
    lines = []
    for row in ROWS:
        ids, values = row.top(K)
        lists = [
            [{"token": f"token_id:{i}", "logprob": float(v)} for i, v in zip(ids[t - 1], values[t - 1], strict=True)]
            for t in range(START, len(row.ids))
        ]
        lines.append({"input_ids": row.ids.tolist(), "llm_text_generation_vllm_logprobs": lists})
    cache, _ = import_rows(write_lines(tmp_path / "a.jsonl", lines), tmp_path / "cache", tokenizer)
    check_entries(cache, ROWS, K, first=START - 1)
    assert cache.metadata.capture["imported"]["reader"] == "Axolotl"


def test_axolotl_v1_of_conversations(tmp_path: Path, tokenizer: Any):
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The miller and the baker."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    lists = [[{"token": f"token_id:{i}", "logprob": -0.1}] for i in ids[-6:]]
    source = write_parquet(tmp_path / "a.parquet", {"messages": [messages], "logprobs": [lists]})
    cache, _ = import_rows(source, tmp_path / "cache", tokenizer)
    assert cache[0].input_ids.tolist() == ids
    assert np.flatnonzero(cache[0].loss_mask).tolist() == list(range(len(ids) - 7, len(ids) - 1))


def test_axolotl_v2(tmp_path: Path, tokenizer: Any):
    """Lists of ids and of values, one for each of the last tokens."""
    columns = nested(ROWS, K)
    columns = {
        "input_ids": columns["tokens"],
        "target_token_ids": [row[START - 1 : -1] for row in columns["top"]],
        "target_logprobs": [row[START - 1 : -1] for row in columns["logprobs"]],
    }
    cache, _ = import_rows(write_parquet(tmp_path / "a.parquet", columns), tmp_path / "cache", tokenizer)
    check_entries(cache, ROWS, K, first=START - 1)


def prepared(rows: list[MadeUp]) -> dict[str, Any]:
    """Positions that predict no token of the completion have lists of padding."""
    columns = nested(rows, K)
    length = len(rows[0].ids)
    there = [[int(START - 1 <= t < length - 1)] * K for t in range(length)]
    return {
        "input_ids": columns["tokens"],
        "labels": [[-100] * START + row[START:] for row in columns["tokens"]],
        "attention_mask": [[1] * length] * len(rows),
        "target_token_ids": [
            [e if m[0] else list(range(K)) for e, m in zip(row, there, strict=True)] for row in columns["top"]
        ],
        "target_logprobs": [
            [e if m[0] else [-np.inf] * K for e, m in zip(row, there, strict=True)] for row in columns["logprobs"]
        ],
        "target_mask": [there] * len(rows),
    }


def test_axolotl_prepared(tmp_path: Path, tokenizer: Any):
    cache, _ = import_rows(write_parquet(tmp_path / "a.parquet", prepared(ROWS)), tmp_path / "cache", tokenizer)
    check_entries(cache, ROWS, K, first=START - 1)


def test_nemo_aligner(tmp_path: Path, tokenizer: Any):
    columns = nested(ROWS, K)
    largest = [[each[0] for each in row] for row in columns["logprobs"]]
    lines = [
        {
            "tokens": tokens,
            "labels": [*tokens[1:], 0],
            "loss_mask": [int(t >= START) for t in range(len(tokens))],
            "topk_logits": [[v - m for v in each] for each, m in zip(values, maxima, strict=True)],
            "topk_token_ids": top,
            "log_sum_exp_logits": [-m for m in maxima],
        }
        for tokens, top, values, maxima in zip(
            columns["tokens"], columns["top"], columns["logprobs"], largest, strict=True
        )
    ]
    cache, summary = import_rows(write_lines(tmp_path / "a.jsonl", lines), tmp_path / "cache", tokenizer)
    check_entries(cache, ROWS, K, first=START)
    assert not summary.renormalised


# ---- llama.cpp


def test_llama_cpp(tmp_path: Path, tokenizer: Any):
    cache, _ = import_rows(write_llama_cpp(tmp_path / "base.kld", ROWS), tmp_path / "cache", tokenizer, top_k=K)
    check_entries(cache, ROWS, K, first=20)
    check_entries(import_rows(tmp_path / "base.kld", tmp_path / "default", tokenizer)[0], ROWS, 64, first=20)


def test_llama_cpp_of_an_odd_vocabulary(tmp_path: Path, tokenizer: Any):
    rows = [MadeUp(row.ids, np.concatenate([row.logprobs, np.full((40, 1), -30.0)], axis=1)) for row in ROWS]
    folder = tmp_path / "data"
    folder.mkdir()
    write_llama_cpp(folder / "base.kld", rows)
    cache, _ = import_rows(folder, tmp_path / "cache", tokenizer, format="llama-cpp", top_k=K)
    check_entries(cache, rows, K, first=20)


@pytest.mark.parametrize("cut", [10, 100, 5000, 20000])
def test_llama_cpp_cut_off(cut: int, tmp_path: Path, tokenizer: Any):
    """llama-perplexity does not notice a full disk."""
    path = write_llama_cpp(tmp_path / "base.kld", ROWS)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"base\.kld(, chunk \d: .*cut off|: it does not begin)"):
        import_rows(path, tmp_path / "cache", tokenizer, format="llama-cpp")


# ---- no sources


@pytest.mark.parametrize("name", ["a.pkl", "a.pt", "plain", "torch.zip"])
def test_pickles_are_refused(name: str, tmp_path: Path, tokenizer: Any):
    path = tmp_path / name
    if name == "torch.zip":
        torch.save({"a": torch.zeros(1)}, path)
    else:
        path.write_bytes(pickle.dumps({"input_ids": [1]}))
    for source in (path, tmp_path) if name.startswith("a.") else (path,):
        with pytest.raises(DataError, match="a pickle, which can run its author's code"):
            import_rows(source, tmp_path.with_name("cache"), tokenizer)


def test_nothing_there(tmp_path: Path, tokenizer: Any):
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "none.jsonl", [])
    write_lines(tmp_path / "other.jsonl", [{"text": "x"}])
    for name, message in (
        ("missing.parquet", "no such file"),
        ("owner/name", "Download the data set first"),
        ("empty", "found no file that ends in"),
        ("none.jsonl", "columns none"),
        ("other.jsonl", "found columns text, which no known tool writes"),
    ):
        source = name if name == "owner/name" else str(tmp_path / name)
        with pytest.raises(DataError, match=message):
            import_rows(source, tmp_path / "cache", tokenizer)
    assert not (tmp_path / "cache").exists()


def test_options_that_a_format_does_not_have(tmp_path: Path, tokenizer: Any):
    path = write_llama_cpp(tmp_path / "base.kld", ROWS)
    for name, value in (("values", "logits"), ("shift", 1), ("flat_k", 4), ("layout", "x"), ("column", ("ids=a",))):
        with pytest.raises(ConfigError) as caught:
            import_rows(path, tmp_path / "cache", tokenizer, **{name: value})
        assert caught.value.field == name
