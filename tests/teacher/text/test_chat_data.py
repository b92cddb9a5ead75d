"""Conversations as people have them: tools and nulls in tables, arguments of templates, dates, content in parts."""

from __future__ import annotations

import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

import cache_format as cf
from chat_templates import FORMATS
from pipeline.errors import ConfigError, DataError
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.chat import arguments
from pipeline.teacher.text.corpus import Documents, tokenise_documents
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.prompts import open_prompts
from pipeline.teacher.text.reading import given_rows
from tiny import tiny_llama, write_jsonl


@pytest.fixture
def qwen() -> PreTrainedTokenizerFast:
    return FORMATS["qwen2.5"].tokenizer()


def chat(*contents: Any, **columns: Any) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)], **columns}


def with_call(**given: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "f", "arguments": given}}
    row = chat("Go", "", "Done")
    row["messages"][1]["tool_calls"] = [call]
    row["messages"][2]["role"] = "tool"
    return row


def tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}


def tokens(data: Any, tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[list[int]]:
    data = str(data) if isinstance(data, Path) else data
    return tokenise_documents(DataConfig(data=data, **options), tokenizer).tokens[:]["input_ids"]


def applied(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[list[int]]:
    return [
        tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), **options)["input_ids"] for row in rows
    ]


def documents_of(rows: list[dict[str, Any]], tmp_path: Path, tokenizer: Any, **options: Any) -> Documents:
    return tokenise_documents(DataConfig(data=str(write_jsonl(tmp_path / "rows.jsonl", rows)), **options), tokenizer)


# ---- tables, whose columns have one type


CALLS = [with_call(city="Graz"), with_call(left=2, right=3, unit=None), with_call()]  # a null that somebody wrote
TOOLS = [
    [tool("forecast", city={"type": "string"})],
    [tool("add", left={"type": "number"}, right={"type": "string"})],
    None,
]
ROWS = [{**row, "tools": tools} for row, tools in zip(CALLS, TOOLS, strict=True)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "saved", "dataset", "given rows", "json strings"])
def test_every_source_gives_what_was_written(kind: str, tmp_path: Path, qwen: PreTrainedTokenizerFast) -> None:
    """Arrow unites the keys of all rows; those that a row does not have are not part of it."""
    data: Any = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(data, ROWS)
    elif kind == "json":
        data.write_text(json.dumps(ROWS, indent=1))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), data)
    elif kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(str(data))
    elif kind == "dataset":
        data = datasets.Dataset.from_list(ROWS)
    elif kind == "given rows":
        data = iter(ROWS)
    else:
        data = tmp_path / "rows.parquet"
        rows = json.loads(json.dumps(ROWS))
        for row in rows:
            function = row["messages"][1]["tool_calls"][0]["function"]
            function["arguments"] = json.dumps(function["arguments"])
            row["tools"] = json.dumps(row["tools"])
        pq.write_table(pa.Table.from_pylist(rows), data)
    assert tokens(data, qwen) == applied(ROWS, qwen)


def test_values_in_json_stay_as_written(
    tmp_path: Path, qwen: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nulls, long floats, and strings that look like something else, also where rows and files differ."""
    rows = [
        with_call(unit=None, latitude=47.070712345678901, tiny=1e-12, on="2024-05-01"),
        with_call(unit=None, latitude=1.0, tiny=2, on="x"),
        chat("12", "true"),
        chat('{"a": 1}', "null"),
    ]
    others = [with_call(unit=None), with_call(unit="C", more=[None, {"a": None}])]
    paths = [write_jsonl(tmp_path / name, part) for name, part in (("a.jsonl", rows), ("b.jsonl", others))]
    expected = applied(json.loads(json.dumps([*rows, *others])), qwen)
    assert tokens([str(path) for path in paths], qwen) == expected
    (tmp_path / "all.json").write_text(json.dumps([*rows, *others]))
    assert tokens(tmp_path / "all.json", qwen) == expected
    monkeypatch.setattr(given_rows, "_ROWS_PER_BATCH", 2)
    assert tokens(iter([*rows, *others]), qwen) == expected


def test_columns_of_json_are_parsed_exactly(tmp_path: Path, qwen: PreTrainedTokenizerFast) -> None:
    """`datasets` would read 0.123456789 as 0.12345678900000001."""
    rows = [with_call(a=0.123456789), with_call(b=None)]
    features = datasets.Features(messages=datasets.List(datasets.Json()), note=datasets.Value("string"))
    made = datasets.Dataset.from_list([{**row, "note": "x"} for row in rows], features=features)
    made.to_parquet(str(tmp_path / "rows.parquet"))
    assert tokens(tmp_path / "rows.parquet", qwen) == applied(rows, qwen)
    assert tokens(made.select([1, 0]), qwen) == applied(rows[::-1], qwen)


def test_tools_may_begin_late(tmp_path: Path, qwen: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.teacher.text.reading.records._ROWS_LOOKED_AT", 1)
    rows = [chat("a", "b"), chat("a", "b", tools=TOOLS[0])]
    assert tokens(write_jsonl(tmp_path / "rows.jsonl", rows), qwen) == applied(rows, qwen)


def test_slices_of_json(tmp_path: Path, qwen: PreTrainedTokenizerFast) -> None:
    rows = [chat(str(number), "yes") for number in range(10)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert tokens(path, qwen, split="train[:20%]") == applied(rows[:2], qwen)
    assert tokens(path, qwen, split="train[3:4]+train[-1:]") == applied([rows[3], rows[9]], qwen)
    with pytest.raises(DataError, match="cannot be read as json"):
        tokens(path, qwen, split="train[x]")


# ---- arguments of the template


def test_arguments_of_row_and_option(tmp_path: Path) -> None:
    tokenizer = FORMATS["qwen3"].tokenizer()
    rows = [
        chat("a", chat_template_kwargs={"enable_thinking": True}, documents=None),
        chat("b", chat_template_kwargs='{"enable_thinking": true}'),
        chat("c", chat_template_kwargs=None),
        chat("d", tools=TOOLS[1]),
    ]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    options = {"chat_template_kwargs": {"enable_thinking": False, "tools": TOOLS[0]}}
    found = open_prompts(DataConfig(data=path, **options), tokenizer)

    def prompt(row: int, thinking: bool, tools: Any) -> list[int]:
        return tokenizer.apply_chat_template(
            rows[row]["messages"], add_generation_prompt=True, enable_thinking=thinking, tools=tools
        )["input_ids"]

    expected = [prompt(0, True, TOOLS[0]), prompt(1, True, TOOLS[0]), prompt(2, False, TOOLS[0])]
    assert [each.ids.tolist() for each in found.read(range(4))] == [*expected, prompt(3, False, TOOLS[1])]
    assert found.description["chat_template_kwargs"] == options["chat_template_kwargs"]


def test_template_for_tools_is_chosen(tmp_path: Path) -> None:
    """Some tokenizers have two templates."""
    tokenizer = FORMATS["chatml"].tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": FORMATS["qwen2.5"].template}
    rows = [chat("a", "b"), chat("a", "b", tools=TOOLS[0])]
    assert tokens(write_jsonl(tmp_path / "rows.jsonl", rows), tokenizer) == applied(rows, tokenizer)


def test_what_does_not_reach_the_template_is_named(tmp_path: Path) -> None:
    qwen3, chatml, llama = (FORMATS[name].tokenizer() for name in ("qwen3", "chatml", "llama3"))
    assert documents_of([chat("a", "b", tools=TOOLS[0], id=3)], tmp_path, qwen3).warnings == ()
    (read,) = documents_of([chat("a", "b", enable_thinking=False)], tmp_path, qwen3).warnings
    assert read.startswith(f"{tmp_path}/rows.jsonl: the chat template reads 'enable_thinking'")
    unread = documents_of([chat("a", "b", tools=TOOLS[0])], tmp_path, chatml, chat_template_kwargs={"enable": 1})
    assert ["'tools' is given" in unread.warnings[0], "'enable' is given" in unread.warnings[1]] == [True, True]
    thoughts = chat("a", "b")
    thoughts["messages"][1]["reasoning_content"] = "hm"
    assert "have 'reasoning_content', which" in documents_of([thoughts], tmp_path, chatml).warnings[0]
    assert documents_of([thoughts], tmp_path, qwen3).warnings == ()
    dated = {"date_string": "1 May"}
    (today,) = documents_of([chat("a", "b")], tmp_path, llama, chat_template_kwargs=dated).warnings
    assert "prints today's date" in today
    (undated,) = documents_of([chat("a", "b")], tmp_path, qwen3, template_date="2026-01-31").warnings
    assert "prints no date" in undated


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"chat_template_kwargs": "{"}, "not JSON"),
        ({"chat_template_kwargs": "[1]"}, "found list, expected a JSON object"),
        ({"chat_template_kwargs": {"messages": []}}, "'messages' comes from the data"),
        ({"template_date": "31.1.2026"}, "expected a date such as"),
        ({"turns": "first"}, "expected one of all, last"),
    ],
)
def test_options_are_checked(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        DataConfig(data="a.jsonl", **options)


def test_options_of_chats_belong_to_chats(tmp_path: Path, qwen: PreTrainedTokenizerFast) -> None:
    for option in ({"turns": "last"}, {"chat_template_kwargs": {"a": 1}}, {"template_date": "2026-01-31"}):
        with pytest.raises(ConfigError, match=f"`{next(iter(option))}` is for chats, found text data"):
            documents_of([{"text": "a"}], tmp_path, qwen, **option)
    with pytest.raises(ConfigError, match="`turns=last`: the loss is on all tokens"):
        documents_of([chat("a", "b")], tmp_path, qwen, turns="last", loss_on="all")
    # At their defaults they are not recorded.
    assert not {"turns", "chat_template_kwargs", "template_date"} & set(DataConfig(data="a").to_json())


@pytest.mark.parametrize(
    "columns, expected",
    [
        ({"tools": {"name": "f"}}, "row 1, column 'tools': found dict, expected a list of objects"),
        ({"tools": "f"}, "row 1, column 'tools': found a string that is not JSON"),
        ({"documents": ["a"]}, "row 1, column 'documents': found list, expected a list of objects"),
        ({"chat_template_kwargs": [1]}, "row 1, column 'chat_template_kwargs': found list, expected an object"),
        ({"chat_template_kwargs": {"messages": 1}}, "row 1, column 'chat_template_kwargs': 'messages' comes from"),
    ],
)
def test_columns_are_checked(
    columns: dict[str, Any], expected: str, tmp_path: Path, qwen: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=expected):
        documents_of([chat("a", "b"), chat("a", "b", **columns)], tmp_path, qwen)


# ---- today's date


def on(day: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Date(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2026, 1, day)

    monkeypatch.setattr(arguments.datetime, "date", Date)


def test_a_cache_has_one_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers and a continuation on three days; nobody gives the date."""
    tokenizer = FORMATS["llama3"].tokenizer()
    teacher = tiny_llama(tmp_path / "teacher", tokenizer)
    data = write_jsonl(tmp_path / "rows.jsonl", [chat(f"{number}?", "Yes.") for number in range(6)])

    warnings: list[str] = []

    def run(output: str, **options: Any) -> None:
        config = CacheTeacherConfig(
            teacher=str(teacher),
            data=DataConfig(data=str(data), seq_len=64, packing=False, **options),
            output=str(tmp_path / output),
            targets=TargetRule(top_k=4),
            batch_size=2,
            rows_per_shard=2,
            device="cpu",
        )
        cache_teacher(config, on_warning=warnings.append)

    on(1, monkeypatch)
    begun = iter([0])
    with monkeypatch.context() as patch:
        patch.setattr(cf.CacheWriter, "begin_shard", lambda writer, **_: next(begun, None))
        with pytest.raises(cf.CacheError, match="2 incomplete shards"):
            run("resumed")
    assert ["here 2026-01-01. Give `template_date=2026-01-01`" in warning for warning in warnings] == [True]
    on(2, monkeypatch)
    run("resumed")
    run("resumed")  # a finished one, too
    run("given", template_date="2026-01-01")
    assert len(warnings) == 1
    resumed = cf.open_cache(tmp_path / "resumed")
    assert resumed.manifest.metadata.corpus["template_date"] == "2026-01-01"
    assert "Today Date: 01 Jan 2026" in tokenizer.decode(resumed[5].input_ids)
    for name in ("manifest.json", "distill_config.json"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "given" / name).read_bytes()
    with pytest.raises(cf.CacheError, match="template_date"):
        run("resumed", template_date="2026-01-02")


# ---- content


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", None])
def test_only_text_can_be_distilled(kind: str | None, tmp_path: Path, qwen: PreTrainedTokenizerFast) -> None:
    part = {"type": kind, "url": "a.png"} if kind else "a"
    row = chat([{"type": "text", "text": "What is it?"}, part], "A cat.")
    with pytest.raises(DataError, match=r"row 0, column 'messages', message 0 \(user\), part 1 of the content: found"):
        documents_of([row], tmp_path, qwen)


def test_parts_in_a_table(tmp_path: Path, qwen: PreTrainedTokenizerFast) -> None:
    row = chat([{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}], [{"type": "text", "text": "hi"}])
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    assert tokens(tmp_path / "rows.parquet", qwen) == applied([chat("hello", "hi")], qwen)


# ---- bytes


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_byte_order_marks_are_not_text(
    name: str, packed: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    contents = {"a.txt": "hello", "a.jsonl": '{"text": "hello"}', "a.json": '["hello"]', "a.csv": "text,id\nhello,1\n"}
    data = b"\xef\xbb\xbf" + contents[name].encode()
    paths = [tmp_path / f"{number}{name}{'.gz' if packed else ''}" for number in range(2)]
    for path in paths:  # `datasets` knows one at the beginning of the first file
        path.write_bytes(gzip.compress(data) if packed else data)
    found = tokens([str(path) for path in paths], tokenizer, append_eos=False)
    assert found == [tokenizer("hello")["input_ids"]] * 2


def test_bad_text_in_a_table_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    bad = pa.array([b"good", b"b\xe4d"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows.parquet, in one of the rows 0 to 1: found byte 0xe4"):
        tokens(tmp_path / "rows.parquet", tokenizer)
