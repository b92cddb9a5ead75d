"""Text in files of every format, and the columns that it is in."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.teacher.text import encoding
from pipeline.teacher.text.corpus import tokenise_documents
from pipeline.teacher.text.data_config import DataConfig
from tiny import EOS, tiny_tokenizer, write_jsonl
from tiny_corpora import TEXTS, jsonl, learned, texts, write_saved, write_saved_splits


def write_jsonl_file(path: Path) -> None:
    write_jsonl(path, [{"text": text} for text in TEXTS])


def write_gzip(writer: Callable[[Path], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        plain = path.with_suffix("")
        writer(plain)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()

    return write


def write_json(path: Path) -> None:
    path.write_text(json.dumps([{"text": text, "id": i} for i, text in enumerate(TEXTS)]))


def write_separated(separator: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        rows = [f'{i}{separator}"{text}"' for i, text in enumerate(TEXTS)]
        path.write_text("\n".join([f"id{separator}text", *rows]) + "\n", encoding="utf-8")

    return write


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS}), path)


def write_arrow_file(path: Path) -> None:
    table = pa.table({"text": TEXTS})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def write_arrow_stream(path: Path) -> None:
    table = pa.table({"text": TEXTS})
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def write_folder(path: Path) -> None:
    path.mkdir()
    for i, text in enumerate(TEXTS):
        (path / f"{i}.txt").write_text(text, encoding="utf-8")
    (path / "README.md").write_text("not text of the corpus")
    (path / ".hidden.txt").write_text("nor this")


@pytest.mark.parametrize(
    "name, write",
    [
        ("a.jsonl", write_jsonl_file),
        ("a.jsonl.gz", write_gzip(write_jsonl_file)),
        ("a.json", write_json),
        ("a.csv", write_separated(",")),
        ("a.csv.gz", write_gzip(write_separated(","))),
        ("a.tsv", write_separated("\t")),
        ("a.parquet", write_parquet),
        ("a.arrow", write_arrow_file),
        ("stream.arrow", write_arrow_stream),
        ("A.JSONL", write_jsonl_file),
        ("odd [1] name*.jsonl", write_jsonl_file),
        ("folder", write_folder),
        ("saved", write_saved),
        ("splits", write_saved_splits),
    ],
)
def test_every_format_gives_the_same_documents(
    tmp_path: Path,
    name: str,
    write: Callable[[Path], None],
    tokenizer: PreTrainedTokenizerFast,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / name)
    capfd.readouterr()
    documents = tokenise_documents(DataConfig(data=str(tmp_path / name)), tokenizer)
    assert texts(documents, tokenizer) == [text + EOS for text in TEXTS]
    assert learned(documents, tokenizer) == [[text + EOS] for text in TEXTS]
    assert documents.columns.format == "text" and documents.loss_on == "all"
    assert documents.source.ignored_files == (name == "folder")
    assert capfd.readouterr() == ("", "")  # the pipeline never prints
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize(
    "sample_by, expected",
    [
        ("document", ["One.\nTwo.\n\nThree.\n" + EOS]),
        ("paragraph", ["One.\nTwo." + EOS, "Three.\n" + EOS]),
        ("line", ["One." + EOS, "Two." + EOS, "", "Three." + EOS]),  # an empty document
    ],
)
def test_what_is_a_document_of_a_text_file(
    tmp_path: Path, sample_by: Any, expected: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    for name, data in (("a.txt", bytes), ("a.txt.gz", gzip.compress)):
        (tmp_path / name).write_bytes(data(b"One.\nTwo.\n\nThree.\n"))
        config = DataConfig(data=str(tmp_path / name), sample_by=sample_by)
        assert texts(tokenise_documents(config, tokenizer), tokenizer) == expected


def test_patterns_are_read_in_order(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for part in ("b", "a", "c"):
        (tmp_path / f"{part}.txt").write_text(part)
    (tmp_path / "d.other").write_text("d")
    documents = tokenise_documents(DataConfig(data=str(tmp_path / "[ab].txt")), tokenizer)
    assert texts(documents, tokenizer) == ["a" + EOS, "b" + EOS]
    assert [path.name for path in documents.source.files] == ["a.txt", "b.txt"]


def test_changed_file_is_read_again(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Also with .gz, which `datasets` could have unpacked into a cache by name."""
    for name, data in (("a.txt", bytes), ("a.txt.gz", gzip.compress)):
        for text in ("before", "after."):
            (tmp_path / name).write_bytes(data(text.encode()))
            documents = tokenise_documents(DataConfig(data=str(tmp_path / name)), tokenizer)
            assert texts(documents, tokenizer) == [text + EOS]


def test_second_run_does_not_tokenise_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(data=jsonl(tmp_path, {"text": "once"}))
    first = texts(tokenise_documents(config, tokenizer), tokenizer)
    monkeypatch.setattr(encoding, "encode", None)
    assert texts(tokenise_documents(config, tokenizer), tokenizer) == first
    # Whatever could change the tokens makes it tokenise again.
    for other, tok in (
        (DataConfig(data=config.data, append_eos=False), tokenizer),
        (config, tiny_tokenizer(seed=1)),
    ):
        with pytest.raises(TypeError, match="NoneType"):
            tokenise_documents(other, tok)


def test_users_folder_is_left_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write_saved(tmp_path / "saved")
    before = sorted((tmp_path / "saved").iterdir())
    tokenise_documents(DataConfig(data=str(tmp_path / "saved")), tokenizer)
    assert sorted((tmp_path / "saved").iterdir()) == before


@pytest.mark.parametrize(
    "record, text_column, expected",
    [
        ({"text": "T", "body": "B"}, None, ("text", ("text",))),
        ({"text": "T", "body": "B"}, "body", ("text", ("body",))),
        ({"id": 3, "body": "B"}, None, ("text", ("body",))),
        ({"text": "T", "messages": [{"role": "user", "content": "U"}]}, None, ("messages",) * 2),
        (
            {"text": "T", "chat": [{"role": "user", "content": "U"}]},
            "chat",
            ("messages", ("chat",)),
        ),
        (
            {"text": "T", "prompt": "P", "completion": "C"},
            None,
            ("prompt-completion", ("prompt", "completion")),
        ),
    ],
)
def test_columns_are_found_by_name(
    tmp_path: Path,
    record: dict[str, Any],
    text_column: str | None,
    expected: tuple[str, Any],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = DataConfig(data=jsonl(tmp_path, record), text_column=text_column)
    columns = tokenise_documents(config, tokenizer).columns
    format, names = expected
    assert columns.format == format and columns.names == ((names,) if names == format else names)


def test_na_and_null_in_a_csv_are_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """pandas would read NA, None and null as missing; only an empty cell is."""
    (tmp_path / "a.csv").write_text("id,text\n1,NA\n2,None\n3,\n4,null\n")
    documents = tokenise_documents(DataConfig(data=str(tmp_path / "a.csv")), tokenizer)
    assert texts(documents, tokenizer) == ["NA" + EOS, "None" + EOS, "", "null" + EOS]
