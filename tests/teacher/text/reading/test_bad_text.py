"""Text that cannot be read: one clear line, which names the file and the row."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.errors import DataError
from pipeline.teacher.text.corpus import tokenise_documents
from pipeline.teacher.text.data_config import DataConfig
from tiny import write_jsonl
from tiny_corpora import jsonl, write_saved, write_saved_splits


def bad(tmp_path: Path, name: str, contents: bytes | str = b"", **config: Any) -> DataConfig:
    contents = contents.encode() if isinstance(contents, str) else contents
    (tmp_path / name).write_bytes(contents)
    return DataConfig(data=str(tmp_path / name), **config)


MESSAGES = '{"messages": [{"role": "user", "content": "a"}]}\n'
BAD_FILES = [
    ("empty.txt", "", {}, "is empty"),
    ("empty.jsonl", "", {}, "is empty"),
    ("header.csv", "text\n", {}, "no rows in it"),
    (
        "broken.jsonl",
        '{"text": "a"}\n{"text": "b\n',
        {},
        "line 2: invalid JSON: Invalid control character at column 12.",
    ),
    ("broken.json", '[{"text": "a"}, \n{"text": ', {}, "broken.json, line 2: invalid JSON"),
    ("broken.parquet", "not parquet", {}, "cannot be read as parquet"),
    ("broken.arrow", "not arrow", {}, "cannot be read as arrow"),
    ("latin1.txt", b"a\n\xe4pfel", {}, "latin1.txt, line 2: found byte 0xe4 at position 0, expected UTF-8"),
    ("latin1.jsonl", b'{"text": "a"}\n{"text": "\xe4"}\n', {}, "latin1.jsonl, line 2: found byte 0xe4 at position 10"),
    ("latin1.csv", b"id,text\n1,a\n2,\xe4\n", {}, "latin1.csv, line 3: found byte 0xe4 at position 2"),
    (
        "half.jsonl",
        '{"text": "a"}\n{"text": "\\ud83d"}\n',
        {},
        "line 2: found \\ud83d, half of a character",
    ),
    ("list.jsonl", '{"text": "a"}\n["b"]\n', {}, "list.jsonl, line 2: found list, expected an object"),
    ("text.docx", "a", {}, "found extension .docx, expected one of .txt .jsonl"),
    ("noextension", "a", {}, "found extension none"),
    ("a.csv", "id,body,title\n1,b,t\n", {}, "found columns id, body, title, expected 'text'"),
    ("a.csv", "id,body\n1,b\n", {"text_column": "boody"}, "no column 'boody', found id, body"),
    ("a.csv", "id,body\n1,b\n", {"text_column": "id"}, "row 0, column 'id': found int"),
    ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', {}, "row 1, column 'text': found int, expected a"),
    (
        "a.jsonl",
        '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": null}\n',
        {},
        "row 1, column 'completion': found null, expected a string",
    ),
    (
        "a.jsonl",
        '{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}\n',
        {},
        "row 0, column 'completion': found str, expected a list of messages",
    ),
    (
        "a.jsonl",
        MESSAGES + '{"messages": [{"role": "user", "content": "a"}, {"role": "user"}]}\n',
        {},
        "row 1, column 'messages', message 1 (user): found null, expected a string as content",
    ),
    (
        "a.jsonl",
        '{"messages": [{"from": "user", "value": "a"}]}\n',
        {},
        "row 0, column 'messages', message 0: found keys from, value, expected a string 'role'",
    ),
    ("a.jsonl", MESSAGES + '{"messages": "a"}\n', {}, "row 1, column 'messages': found str"),
    ("a.jsonl", '{"messages": ["a"]}\n', {}, "row 0, column 'messages', message 0: found str"),
    ("a.txt", "a", {"split": "validation"}, "no split 'validation', expected 'train'"),
]


@pytest.mark.parametrize("name, contents, config, expected", BAD_FILES)
def test_bad_file_is_one_clear_line(
    tmp_path: Path,
    name: str,
    contents: bytes | str,
    config: dict[str, Any],
    expected: str,
    tokenizer: PreTrainedTokenizerFast,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)
    with pytest.raises(DataError) as error:
        tokenise_documents(bad(tmp_path, name, contents, **config), tokenizer)
    message = str(error.value)
    assert expected in message
    assert str(tmp_path / name) in message  # where
    assert message.endswith(".") and "\n" not in message  # one line, ending in the next step
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_null_keys_of_messages_are_absent_keys(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A tool call needs no content; the null key that Arrow gives every message is not a tool call."""
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    messages = [call, {"role": "user"}]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"message 1 \(user\): found null, expected a string"):
        tokenise_documents(DataConfig(data=str(tmp_path / "a.parquet")), tokenizer)


@pytest.mark.parametrize(
    "data, expected",
    [
        ("missing.jsonl", "no such file"),
        ("missing.txt.gz", "no such file"),
        ("./missing", "no such file"),
        ("/missing", "no such file"),
        ("~/missing-folder", "no such file"),
        ("some/deep/missing", "no such file"),
        ("missing-*.txt", "no file matches"),
        ("owner/no-such-dataset", "neither a local file or directory nor a dataset that the hub"),
        ("no-such-dataset", "neither a local file or directory nor a dataset that the hub"),
    ],
)
def test_missing_data(
    data: str, expected: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *a, **k: asked.append(name) or load(name, *a, **k))
    with pytest.raises(DataError) as error:
        tokenise_documents(DataConfig(data=data), tokenizer)
    assert str(error.value).startswith(data) and expected in str(error.value)
    # A name that can only be a local path is never looked up on the hub.
    assert asked == ([data] if "hub" in expected else [])


def test_folders_that_cannot_be_read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no text among the 0 files"):
        tokenise_documents(DataConfig(data=str(tmp_path)), tokenizer)
    (tmp_path / "a.txt").write_text("a")
    write_jsonl(tmp_path / "b.jsonl", [{"text": "b"}])
    with pytest.raises(DataError, match="found json, text files together"):
        tokenise_documents(DataConfig(data=str(tmp_path)), tokenizer)
    write_saved_splits(tmp_path / "splits")
    with pytest.raises(DataError, match="no split 'dev', found train, test"):
        tokenise_documents(DataConfig(data=str(tmp_path / "splits"), split="dev"), tokenizer)
    write_saved(tmp_path / "saved")
    with pytest.raises(DataError, match="no split 'dev', found a single dataset"):
        tokenise_documents(DataConfig(data=str(tmp_path / "saved"), split="dev"), tokenizer)
    next((tmp_path / "saved").glob("data-*.arrow")).write_bytes(b"damaged")
    with pytest.raises(DataError, match="cannot be read as a folder written by save_to_disk"):
        tokenise_documents(DataConfig(data=str(tmp_path / "saved")), tokenizer)


def test_error_of_another_process_arrives(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = jsonl(tmp_path, *[{"text": "a"}] * 5, {"text": 3})
    with pytest.raises(DataError, match="row 5, column 'text': found int"):
        tokenise_documents(DataConfig(data=data, num_proc=2), tokenizer)
