"""Text that is given as objects: datasets, lists and generators of dicts, and lists of paths."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pipeline.errors import DataError
from pipeline.teacher.text import encoding
from pipeline.teacher.text.corpus import tokenise_documents
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.masked.mask_rule import MaskRule
from pipeline.teacher.text.masked.masked_corpus import build_masked_corpus
from pipeline.teacher.text.packing import build_corpus
from pipeline.teacher.text.prompts import open_prompts
from pipeline.teacher.text.reading import given_rows
from pipeline.teacher.text.reading.data_paths import data_name, local_paths
from pipeline.teacher.text.reading.sources import load_source
from tiny import EOS, english, write_jsonl
from tiny_masked import wordpiece_tokenizer

ROWS = [{"text": line} for line in english(30).splitlines()]


def config(data: Any, **options: Any) -> DataConfig:
    return DataConfig(data=data, seq_len=48, **options)


def load(data: Any, *, split: str = "train") -> list[dict[str, Any]]:
    source = load_source(DataConfig(data=data, split=split))
    return source.reader.read(source.rows[:])


def generator() -> Iterator[dict[str, str]]:
    yield from ROWS


GIVEN: dict[str, Callable[[], Any]] = {
    "list": lambda: ROWS,
    "tuple": lambda: tuple(ROWS),
    "generator": generator,
    "map": lambda: map(dict, ROWS),
    "dataset": lambda: datasets.Dataset.from_list(ROWS),
    "dataset with a format": lambda: datasets.Dataset.from_list(ROWS).with_format("torch"),
    "streaming dataset": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "splits": lambda: datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_given_rows_are_the_rows_of_a_file(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    expected = build_corpus(config(str(write_jsonl(tmp_path / "rows.jsonl", ROWS))), tokenizer)
    corpus = build_corpus(config(GIVEN[kind]()), tokenizer)
    assert corpus.token_stream_sha256 == expected.token_stream_sha256
    assert corpus.report == expected.report
    assert capfd.readouterr() == ("", "")
    (recorded,) = corpus.description["files"]
    assert recorded["name"] == "rows" and len(recorded["fingerprint"]) >= 16
    assert corpus.description["source"].startswith("given ")
    ours, theirs = corpus.description, expected.description
    assert {**ours, "source": 0, "files": 0} == {**theirs, "source": 0, "files": 0}


def test_the_same_rows_are_tokenised_once(
    tokenised_cache: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_corpus(config(generator()), tokenizer)
    monkeypatch.setattr(encoding, "encode", None)
    for again in (ROWS, generator()):
        corpus = build_corpus(config(again), tokenizer)
        assert corpus.token_stream_sha256 == first.token_stream_sha256
        assert corpus.description["files"] == first.description["files"]
    assert len(list(tokenised_cache.glob("rows-*"))) == 1
    with pytest.raises(TypeError, match="NoneType"):
        build_corpus(config([*ROWS, {"text": "one more"}]), tokenizer)
    assert len(list(tokenised_cache.glob("rows-*"))) == 2


def test_several_batches_of_rows(tokenised_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given_rows, "_ROWS_PER_BATCH", 7)
    assert load(generator()) == ROWS
    monkeypatch.setattr(given_rows, "_ROWS_PER_BATCH", 1)
    assert load(ROWS) == ROWS


def test_processes_read_given_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    one, two = (build_corpus(config(generator(), num_proc=n), tokenizer) for n in (None, 2))
    assert one.token_stream_sha256 == two.token_stream_sha256


def test_keys_that_a_row_lacks_are_null() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": ["f"]}]
    first, second = load([{"text": "a"}, {"text": "b", "messages": messages}])
    assert first == {"text": "a", "messages": None}
    assert [message["role"] for message in second["messages"]] == ["user", "assistant"]


def test_conversations_and_prompts_may_be_given(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "Four."}]
    documents = tokenise_documents(config([{"messages": chat}]), tokenizer)
    assert documents.columns.format == "messages" and documents.loss_on == "assistant"
    prompts = open_prompts(config([{"prompt": "One"}, {"prompt": "Two"}]), tokenizer)
    assert [tokenizer.decode(prompt.ids) for prompt in prompts.read(range(2))] == ["One", "Two"]
    assert prompts.description["source"] == "given list"


def test_masked_rows_may_be_given(tmp_path: Path) -> None:
    tokenizer = wordpiece_tokenizer()
    expected = build_masked_corpus(config(str(write_jsonl(tmp_path / "a.jsonl", ROWS))), tokenizer, MaskRule())
    corpus = build_masked_corpus(config(generator()), tokenizer, MaskRule())
    assert corpus.token_stream_sha256 == expected.token_stream_sha256


def test_a_dataset_is_not_changed(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a"], "number": [1]}).with_format("torch")
    before = rows._fingerprint
    build_corpus(config(rows), tokenizer)
    assert rows._fingerprint == before and isinstance(rows[0]["number"], torch.Tensor)


def test_a_transform_is_not_left_out_silently() -> None:
    rows = datasets.Dataset.from_dict({"text": ["LOUD"]})
    rows.set_transform(lambda batch: {"text": [text.lower() for text in batch["text"]]})
    for given in (rows, datasets.DatasetDict(train=rows)):
        with pytest.raises(DataError, match="found a transform .*Apply it with `map` first"):
            load(given)


def test_columns_whose_first_rows_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given_rows, "_ROWS_PER_BATCH", 2)
    for value in ([{"name": "f"}], "a title", 3, [1, 2]):
        rows: list[dict[str, Any]] = [{"text": "a", "more": None}, {"text": "b", "more": []}, {"text": "c"}]
        expected = [*rows[:2], {"text": "c", "more": None}, {"text": "d", "more": value}]
        assert load([*rows, expected[3]]) == expected


def test_ids_may_begin_with_an_empty_row(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"ids": []}, {"ids": [5, 6, 7]}]
    for data in (rows, datasets.Dataset.from_list(rows), str(write_jsonl(tmp_path / "ids.jsonl", rows))):
        documents = tokenise_documents(config(data, text_column="ids"), tokenizer)
        assert documents.columns.is_ids and documents.tokens["input_ids"][-1] == [5, 6, 7]


def test_splits_of_given_datasets() -> None:
    one, two = (datasets.Dataset.from_dict({"text": [text]}) for text in ("one", "two"))
    assert load(datasets.DatasetDict(train=one, test=two), split="test") == [{"text": "two"}]
    with pytest.raises(DataError, match="given DatasetDict: no split 'dev', found train, test"):
        load(datasets.DatasetDict(train=one, test=two), split="dev")
    with pytest.raises(DataError, match="given Dataset: no split 'dev', found a single dataset"):
        load(one, split="dev")
    with pytest.raises(DataError, match="given list: no split 'dev'"):
        load([{"text": "a"}], split="dev")


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "given list: no rows in it"),
        (iter(()), "no rows in it, .*A generator can be read only once"),
        (datasets.Dataset.from_dict({"text": []}), "given Dataset: no rows in it"),
        (["a text", {"text": "a"}], "given list, row 0: found str, expected a dict"),
        ([{"text": "a"}, "b"], "given list, row 1: found str, expected a dict"),
        ([{"text": "a"}, {}], "given list, row 1: found keys none, expected a dict"),
        ([{3: "a"}], "given list, row 0: found keys 3, expected a dict"),
        ({"text": ["a"]}, "given dict: expected a path, a Dataset, or rows"),
        (b"data.txt", "given bytes: expected a path"),
        (3, "given int: expected a path"),
        (pandas.DataFrame({"text": ["a"]}), "given DataFrame, row 0: found str, expected a dict"),
        ([{"text": "a"}, {"text": 3}], "row 1, column 'text': found int"),
    ],
)
def test_rows_that_cannot_be_used(
    rows: Any, message: str, tokenised_cache: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=message) as error:
        build_corpus(config(rows), tokenizer)
    assert "\n" not in str(error.value)
    assert not list(tokenised_cache.glob("*.tmp"))


def test_rows_that_differ_from_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given_rows, "_ROWS_PER_BATCH", 2)
    rows = [{"text": "a"}, {"text": "b"}, {"text": "c"}, {"text": "d", "title": "D"}]
    with pytest.raises(DataError, match="rows 2 to 3: found key 'title', expected text as in the first 2 rows"):
        load(rows)
    with pytest.raises(DataError, match="rows 2 to 2: found values that cannot be stored as columns"):
        load([{"n": 1}, {"n": 2}, {"n": "three"}])


def test_an_error_of_the_generator_is_its_own(tokenised_cache: Path) -> None:
    def failing() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        load(failing())
    assert not list(tokenised_cache.iterdir())


def test_a_generator_is_read_once() -> None:
    rows = generator()
    assert load(rows) == ROWS
    with pytest.raises(DataError, match="A generator can be read only once"):
        load(rows)


# ---- lists of paths


@pytest.mark.parametrize("streamed", [False, True])
def test_an_endless_iterable_is_read_as_far_as_it_is_used(streamed: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    read = []

    def endless() -> Iterator[dict[str, str]]:
        for number in itertools.count():
            assert number < 5, "read beyond `max_documents`"
            read.append(number)
            yield {"text": f"line {number}", "prompt": f"line {number}"}

    data = datasets.IterableDataset.from_generator(endless) if streamed else endless()
    documents = tokenise_documents(config(data, max_documents=5, text_column="text"), tokenizer)
    assert len(documents.tokens) == 5 and read[-5:] == list(range(5))
    data = datasets.IterableDataset.from_generator(endless) if streamed else endless()
    assert len(open_prompts(config(data, max_documents=5, text_column="prompt"), tokenizer)) == 5


def test_several_paths_are_read_in_order(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("c", "a", "folder/b", "folder/d"):
        (tmp_path / f"{name}.txt").write_text(name[-1])
    (tmp_path / "folder/other.md").write_text("not text of the corpus")
    paths = [tmp_path / "c.txt", str(tmp_path / "[ab].txt"), tmp_path / "folder"]
    documents = tokenise_documents(config(paths), tokenizer)
    assert [tokenizer.decode(row["input_ids"]) for row in documents.tokens] == [t + EOS for t in "cabd"]
    assert documents.source.ignored_files == 1
    assert [file["name"] for file in documents.source.describe_files()] == [
        *("c.txt", "a.txt"),
        *("folder/b.txt", "folder/d.txt"),
    ]


def test_a_path_object_and_a_list_of_one_are_that_path(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    expected = build_corpus(config(str(file)), tokenizer).description
    for data in (file, [file], (str(file),)):
        assert build_corpus(config(data), tokenizer).description == expected
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert load([tmp_path / "saved"]) == ROWS


def test_paths_relative_and_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    source = load_source(DataConfig(data=["a.txt", tmp_path / "b.txt"]))
    assert [file["name"] for file in source.describe_files()] == ["a.txt", "b.txt"]


def test_paths_that_do_not_go_together(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    write_jsonl(tmp_path / "b.jsonl", [{"text": "b"}])
    with pytest.raises(DataError, match="found json, text files together"):
        load([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    with pytest.raises(DataError, match="some-dataset: no such file or directory, expected a list of local paths"):
        load([tmp_path / "a.txt", "some-dataset"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no text in these directories"):
        load([tmp_path / "empty", tmp_path / "empty"])


def test_names() -> None:
    assert data_name(Path("a/b.txt")) == "a/b.txt"
    assert data_name(["a", "b", "c"]) == "a, b, c"
    assert data_name(list("abcde")) == "a, b, c and 2 more"


@pytest.mark.parametrize("data", ["missing.jsonl", "./missing", "missing-*.txt", ["owner/name", "missing.txt"]])
def test_a_missing_path_is_found_without_opening_anything(data: Any) -> None:
    with pytest.raises(DataError, match=r"missing.*(no such file|no file matches)"):
        local_paths(data)


@pytest.mark.parametrize("text", ["the cat sat on the mat " * 40, "[a]" * 300])
def test_a_text_is_no_path(text: str) -> None:
    with pytest.raises(DataError, match=r"^.{40}…: found a string of 9\d\d characters.* Give a text as rows"):
        local_paths(text)


@pytest.mark.parametrize("data", ["owner/name", __file__, Path(__file__), [Path(__file__)], [{"text": "a"}], 3])
def test_other_data_passes(data: Any) -> None:
    local_paths(data)
