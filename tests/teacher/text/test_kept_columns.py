"""Columns of the data that a cache keeps for each document: where they come from, and where they stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

import cache_format as cf
from foreign_files import NESTED, import_rows, made_up_rows, nested, write_parquet
from generating import generate
from pipeline.errors import ConfigError, DataError
from pipeline.hub import FILES
from pipeline.options import build, flat
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.masked.mask_rule import MaskRule
from pipeline.teacher.text.masked.masked_corpus import build_masked_corpus
from pipeline.teacher.text.packing import TokenCorpus, build_corpus
from runs import command
from tiny import sentence, write_jsonl

DOMAINS = ("web", "code", "books")


def rows_of(count: int = 24) -> list[dict[str, Any]]:
    """Short texts and long ones; of the third domain only one, long."""
    import random

    rng = random.Random(0)
    rows = []
    for i in range(count):
        domain = DOMAINS[2] if i == 5 else DOMAINS[i % 2]
        text = " ".join(sentence(rng) for _ in range(8 if i == 5 else 1))
        rows.append({"text": f"{i}: {text}", "domain": domain, "number": i % 3, "good": i % 2 == 0})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("kept") / "data.jsonl", rows_of())


def capture(teacher: Path, data: Path, output: Path, keep: tuple[str, ...] = ("domain",), **options: Any) -> cf.Cache:
    text = DataConfig(data=str(data), seq_len=48, keep_columns=keep)
    rule, shards = TargetRule(top_k=8), {"rows_per_shard": 8, "batch_size": 4, "device": "cpu"}
    config = CacheTeacherConfig(
        teacher=str(teacher), data=text, output=str(output), targets=rule, **{**shards, **options}
    )
    cache_teacher(config)
    return cf.open_cache(output) if (output / "manifest.json").is_file() else None  # type: ignore[return-value]


def kept_of(corpus: TokenCorpus | Any, name: str) -> list[list[str]]:
    """Values by row, from the contents of the file."""
    import pyarrow as pa

    return pa.ipc.open_file(pa.py_buffer(corpus.documents_file)).read_all()[name].to_pylist()


def test_every_piece_has_the_values_of_its_row(data: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    names = ("domain", "number", "good")
    corpus = build_corpus(DataConfig(data=str(data), seq_len=48, keep_columns=names), tokenizer)
    plain = build_corpus(DataConfig(data=str(data), seq_len=48), tokenizer)
    assert corpus.token_stream_sha256 == plain.token_stream_sha256 and plain.documents_file is None
    found = {name: kept_of(corpus, name) for name in names}
    rows, several, unique, windows = rows_of(), 0, 0, 0
    for row, *kept in zip(corpus, *found.values(), strict=True):
        several += len(row.segment_lengths) > 1
        ends = np.cumsum(row.segment_lengths)
        for i, piece in enumerate(np.split(row.input_ids, ends[:-1])):
            text = tokenizer.decode(piece, skip_special_tokens=True)
            origins = [each for each in rows if text in each["text"]]
            values = [(each["domain"], str(each["number"]), str(each["good"]).lower()) for each in origins]
            assert tuple(each[i] for each in kept) in values
            unique += len(origins) == 1
            windows += [each["domain"] for each in origins] == ["books"]
    assert several and windows > 1 and unique > 20


def test_masked_copies_and_their_windows(data: Path, masked_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(next(masked_dir.glob("*/tokenizer.json")).parent)
    config = DataConfig(data=str(data), seq_len=32, keep_columns=("domain",))
    one = build_masked_corpus(config, tokenizer, MaskRule())
    two = build_masked_corpus(config, tokenizer, MaskRule(copies=2))
    assert kept_of(two, "domain") == 2 * kept_of(one, "domain")
    assert sum(kept == ["books"] for kept in kept_of(one, "domain")) > 1


@pytest.mark.parametrize("kind", ["messages", "ids", "parquet", "rows"])
def test_of_every_format(kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows: Any = [{"domain": DOMAINS[i % 2], "text": f"text {i}"} for i in range(4)]
    if kind == "messages":
        turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]
        rows = write_jsonl(tmp_path / "chats.jsonl", [{"messages": turn, "domain": each["domain"]} for each in rows])
    if kind == "ids":
        rows = [{"input_ids": tokenizer(each["text"])["input_ids"], "domain": each["domain"]} for each in rows]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        rows = tmp_path / "rows.parquet"
    config = DataConfig(data=str(rows) if isinstance(rows, Path) else rows, seq_len=64, keep_columns=("domain",))
    assert sum(kept_of(build_corpus(config, tokenizer), "domain"), []) == ["web", "code"] * 2


def one(**columns: Any) -> list[dict[str, Any]]:
    return [{"text": "some text", **columns}]


@pytest.mark.parametrize(
    "rows, message",
    [
        (one(), "no column 'domain' to keep, found text"),
        (one(domain="web") + one(domain=None), "row 1: found null in the column 'domain'"),
        (one(domain="a\nb"), r"row 0: found 'a\\nb' in the column 'domain', expected a string of 1 to 100"),
        (one(domain="x" * 101), "expected a string of 1 to 100 printable characters"),
        (one(domain=1.5), "found '1.5' in the column 'domain'"),
        ([one(domain=str(i))[0] for i in range(257)], "found 257 different values in the column 'domain'"),
    ],
)
def test_what_cannot_be_kept(rows: list[dict[str, Any]], message: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=message):
        build_corpus(DataConfig(data=rows, seq_len=32, keep_columns=("domain",)), tokenizer)


def test_a_column_is_kept_once(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="`keep_columns` domain, domain: expected each column once"):
        build_corpus(DataConfig(data=one(domain="a"), seq_len=32, keep_columns=("domain", "domain")), tokenizer)


def test_one_name_in_python_needs_no_list() -> None:
    config = build(CacheTeacherConfig, {"teacher": "t", "data": "d", "output": "o", "keep_columns": "domain"})
    assert config.data.keep_columns == ("domain",) and flat(config)["keep_columns"] == ["domain"]


def test_a_cache_that_keeps_columns_is_the_same_otherwise(data: Path, teacher_dir: Path, tmp_path: Path) -> None:
    kept, plain = capture(teacher_dir, data, tmp_path / "kept"), capture(teacher_dir, data, tmp_path / "plain", keep=())
    for file in sorted((tmp_path / "plain").rglob("*")):
        same = tmp_path / "kept" / file.relative_to(tmp_path / "plain")
        if file.is_file() and file.name not in ("manifest.json", "distill_config.json", "README.md"):
            assert file.read_bytes() == same.read_bytes()
    assert not (tmp_path / "plain/documents.arrow").exists() and plain.kept == {}
    assert "keep_columns" not in plain.metadata.corpus and "documents.arrow" in FILES
    assert kept.metadata.corpus["keep_columns"] == ["domain"]
    for i, row in enumerate(kept.iter_rows()):
        assert len(kept.kept["domain"][i]) == len(row.segment_lengths)
    assert kept.manifest.stored_bytes - kept.manifest.shard_bytes == (tmp_path / "kept/documents.arrow").stat().st_size
    # Settings: a run with others is refused, the same is left alone.
    command("verify", tmp_path / "kept")
    with pytest.raises(cf.MismatchError, match="keep_columns"):
        capture(teacher_dir, data, tmp_path / "kept", keep=())
    with pytest.raises(cf.MismatchError, match="keep_columns"):
        capture(teacher_dir, data, tmp_path / "plain")
    capture(teacher_dir, data, tmp_path / "kept")
    # A conversion takes the file along, a damaged or missing one is found.
    command("convert", tmp_path / "kept", tmp_path / "packed", "--encoding", "packed")
    file = tmp_path / "packed/documents.arrow"
    assert file.read_bytes() == (tmp_path / "kept/documents.arrow").read_bytes()
    file.write_bytes(file.read_bytes()[:-1])
    assert "documents.arrow: checksum" in command("verify", tmp_path / "packed", status=1).stderr
    file.unlink()
    assert "documents.arrow: no such file" in command("verify", tmp_path / "packed", status=1).stderr


def test_workers_on_several_machines(data: Path, teacher_dir: Path, tmp_path: Path) -> None:
    words = ["cache-teacher", "--teacher", teacher_dir, "--data", data, "--seq-len", 48, "--keep-columns", "domain"]
    words += ["--rows-per-shard", 8, "--targets", "top-k", "--top-k", 8, "--device", "cpu", "--batch-size", 4]
    whole = capture(teacher_dir, data, tmp_path / "whole")
    assert whole.metadata.num_shards == 3
    for part, output in (("0:1", "a"), ("1:3", "b")):
        command(*words, "--output", tmp_path / output, "--shard-range", part)
    for file in (tmp_path / "b/shards").iterdir():
        file.rename(tmp_path / "a/shards" / file.name)
    kept = (tmp_path / "a/documents.arrow").read_bytes()
    assert kept == (tmp_path / "b/documents.arrow").read_bytes() == (tmp_path / "whole/documents.arrow").read_bytes()
    (tmp_path / "a/documents.arrow").unlink()
    assert "documents.arrow: missing" in command("merge", tmp_path / "a", status=1).stderr
    (tmp_path / "a/documents.arrow").write_bytes(kept)
    command("merge", tmp_path / "a")
    assert cf.open_cache(tmp_path / "a").kept["domain"][0] == whole.kept["domain"][0]


def test_answers_have_the_values_of_their_prompts(teacher_dir: Path, tmp_path: Path) -> None:
    prompts = [{"prompt": f"Question {i}", "domain": DOMAINS[i % 3], "number": i} for i in range(5)]
    data = write_jsonl(tmp_path / "prompts.jsonl", prompts)
    options = {"answers_per_prompt": 2, "temperature": 1.0, "max_new_tokens": 4}
    generate(teacher_dir, data, tmp_path / "cache", keep_columns=("domain", "number"), **options)
    cache = cf.open_cache(tmp_path / "cache")
    for line, domain, number in zip(cache.answers(), *(cache.kept[name] for name in ("domain", "number")), strict=True):
        assert (domain, number) == ([DOMAINS[line["document"] % 3]], [str(line["document"])])
    with pytest.raises(cf.CacheError, match="keep_columns"):
        generate(teacher_dir, data, tmp_path / "cache", keep_columns=("domain",), **options)
    with pytest.raises(DataError, match="row 5: found null in the column 'domain'"):
        write_jsonl(data, [*prompts, {"prompt": "more"}])
        generate(teacher_dir, data, tmp_path / "other", keep_columns=("domain",), **options)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_imported_rows(kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """One record is two documents; all of a record have its values."""
    columns = {**nested(made_up_rows(3), 12), "domain": ["web", "code", "web"]}
    columns["attention"] = [[1] * 20 + [2] * 20, [1] * 40, [1] * 40]
    source = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        write_parquet(source, columns)
    else:
        write_jsonl(source, [dict(zip(columns, each, strict=True)) for each in zip(*columns.values(), strict=True)])
    options = {**NESTED, "column": (*NESTED["column"], "attention=attention")}
    cache, _ = import_rows(source, tmp_path / "cache", tokenizer, **options, keep_columns=("domain",))
    assert [cache.kept["domain"][row] for row in range(3)] == [["web", "web"], ["code"], ["web"]]
    cf.verify_cache(tmp_path / "cache")
    with pytest.raises(DataError, match=r"found null in the column 'other', expected a string"):
        import_rows(source, tmp_path / "other", tokenizer, **options, keep_columns=("other",))


def test_the_saved_options_make_the_cache_again(data: Path, teacher_dir: Path, tmp_path: Path) -> None:
    capture(teacher_dir, data, tmp_path / "kept")
    saved = json.loads((tmp_path / "kept/distill_config.json").read_text())["config"]
    assert saved["keep_columns"] == ["domain"]
