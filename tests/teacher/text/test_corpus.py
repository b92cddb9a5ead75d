"""Text in every format to tokens and loss mask, and one clear line for bad input."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from pipeline.errors import ConfigError, DataError, DistillError, ModelError
from pipeline.teacher.text import encoding
from pipeline.teacher.text.corpus import Documents, tokenise_documents
from pipeline.teacher.text.data_config import DataConfig
from tiny import BOS, CHAT_TEMPLATE, EOS, tiny_tokenizer, write_jsonl

TEXTS = ["The first text.", "A second one,\nof two lines.", "Dritter Text: Äpfel."]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


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


# ---- file formats


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


def write_saved(path: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(path))


def write_saved_splits(path: Path) -> None:
    train, test = (datasets.Dataset.from_dict({"text": t}) for t in (TEXTS, ["other"]))
    datasets.DatasetDict(train=train, test=test).save_to_disk(str(path))


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


# ---- columns


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


# ---- special tokens


def test_text_gets_the_tokenizers_special_tokens_and_one_eos(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    data = jsonl(tmp_path, {"text": "plain"}, {"text": "ended" + EOS}, {"text": ""}, {"text": None})
    documents = tokenise_documents(DataConfig(data=data), tokenizer)
    assert texts(documents, tokenizer) == [BOS + "plain" + EOS, BOS + "ended" + EOS, "", ""]
    documents = tokenise_documents(DataConfig(data=data, append_eos=False), tokenizer)
    assert texts(documents, tokenizer) == [BOS + "plain", BOS + "ended" + EOS, "", ""]


def test_eos_that_the_tokenizer_adds_is_not_repeated(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 1), (EOS, 2)]
    )
    data = jsonl(tmp_path, {"prompt": "ask", "completion": " tell"})
    for append_eos in (True, False):
        config = DataConfig(data=data, append_eos=append_eos)
        documents = tokenise_documents(config, tokenizer)
        assert texts(documents, tokenizer) == [BOS + "ask tell" + EOS]
        assert learned(documents, tokenizer) == [[" tell" + EOS]]


def test_conversations_get_only_the_templates_special_tokens(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    data = jsonl(tmp_path, {"messages": [{"role": "user", "content": "Hi"}]})
    documents = tokenise_documents(DataConfig(data=data), tokenizer)
    assert texts(documents, tokenizer) == ["<|im_start|>user\nHi<|im_end|>\n"]


# ---- which tokens are in the loss

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "  Six!\n"},
]
GENERATION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As in templates of reasoning models: earlier messages of the assistant are rendered differently.
REWRITING_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, GENERATION_TEMPLATE])
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_assistant_messages_and_end_of_turn_are_in_the_loss(tmp_path: Path, template: str, trim_offsets: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    data = jsonl(tmp_path, {"messages": CHAT}, {"messages": CHAT[:2]}, {"messages": []})
    documents = tokenise_documents(DataConfig(data=data), tokenizer)
    assert documents.loss_on == "assistant"
    whole = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\nFour.<|im_end|>\n<|im_start|>user\nAnd 3 + 3?<|im_end|>\n"
        "<|im_start|>assistant\n  Six!\n<|im_end|>\n"
    )
    assert texts(documents, tokenizer)[0] == whole
    # Not in the loss: the newlines between turns, and a conversation without an assistant message.
    assert learned(documents, tokenizer) == [
        ["Four.<|im_end|>", "  Six!\n<|im_end|>"],
        [],
        [],
    ]
    documents = tokenise_documents(DataConfig(data=data, loss_on="all"), tokenizer)
    assert learned(documents, tokenizer)[0] == [whole]


def test_turn_without_an_end_token_ends_with_its_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    documents = tokenise_documents(DataConfig(data=jsonl(tmp_path, {"messages": CHAT})), tokenizer)
    assert learned(documents, tokenizer) == [[" Four.", "   Six!"]]


def test_each_turn_has_its_own_text_if_the_template_rewrites_earlier_ones(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = REWRITING_TEMPLATE
    data = jsonl(tmp_path, {"messages": CHAT[:2]}, {"messages": CHAT})
    documents = tokenise_documents(DataConfig(data=data), tokenizer)
    said = ["<think></think>Four.<|im_end|>", "<think></think>  Six!\n<|im_end|>"]
    assert learned(documents, tokenizer) == [[], [said[0]], [said[1]]]
    (warning,) = documents.warnings
    assert "2 chats became 3 documents" in warning
    wholes = [tokenizer.apply_chat_template(CHAT[:stop], tokenize=False) for stop in (2, 3, 5)]
    assert texts(documents, tokenizer) == wholes
    # The last turn is the same in the whole conversation, so nothing else changes.
    last = tokenise_documents(DataConfig(data=data, turns="last"), tokenizer)
    assert (texts(last, tokenizer), learned(last, tokenizer)) == (wholes[::2], [[], [said[1]]])
    assert last.warnings == ()
    pairs = jsonl(tmp_path, {"prompt": CHAT[:2], "completion": CHAT[2:]}, {"prompt": CHAT[:4], "completion": CHAT[4:]})
    completed = tokenise_documents(DataConfig(data=pairs), tokenizer)
    assert learned(completed, tokenizer) == [[said[0]], [said[1]], [said[1]]]
    assert len(tokenise_documents(DataConfig(data=data, loss_on="all"), tokenizer).tokens) == 2


DROPPING_TEMPLATE = GENERATION_TEMPLATE.replace(
    "{% generation %}{{ message['content']", "{% generation %}{{ message['content'].split('</think>')[-1]"
)


@pytest.mark.parametrize("turns, kept", [("all", slice(0, 2)), ("last", slice(1, 2))])
@pytest.mark.parametrize("blocks", [True, False])
def test_thoughts_that_the_template_always_drops_are_learned(
    tmp_path: Path, blocks: bool, turns: Any, kept: slice
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = DROPPING_TEMPLATE
    if not blocks:
        for mark in ("{% generation %}", "{% endgeneration %}"):
            tokenizer.chat_template = tokenizer.chat_template.replace(mark, "")
    answers = ["<think>two twos</think>Four.", "<think>two threes</think>Six."]
    messages = [{**message} for message in CHAT]
    messages[2]["content"], messages[4]["content"] = answers
    documents = tokenise_documents(DataConfig(data=jsonl(tmp_path, {"messages": messages}), turns=turns), tokenizer)
    assert learned(documents, tokenizer) == [[f"{answer}<|im_end|>"] for answer in answers[kept]]
    before = [tokenizer.apply_chat_template(messages[:k], tokenize=False, add_generation_prompt=True) for k in (2, 4)]
    expected = [f"{prompt}{answer}<|im_end|>" for prompt, answer in zip(before, answers, strict=True)]
    assert texts(documents, tokenizer) == expected[kept]


def test_answer_that_cannot_be_found_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ 'calls' if messages[-1].tool_calls else 'text' }}" + CHAT_TEMPLATE
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    data = jsonl(tmp_path, {"messages": [CHAT[1], call]})
    with pytest.raises(DataError, match=r"row 0, message 1 \(assistant\): .* `loss_on=all`"):
        tokenise_documents(DataConfig(data=data), tokenizer)
    assert len(tokenise_documents(DataConfig(data=data, loss_on="all"), tokenizer).tokens) == 1


def test_completion_and_its_eos_are_in_the_loss(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    data = jsonl(
        tmp_path,
        {"prompt": "Äpfel und", "completion": " Birnen\n"},
        {"prompt": "", "completion": "Alone"},
        {"prompt": "Silence", "completion": ""},
    )
    documents = tokenise_documents(DataConfig(data=data), tokenizer)
    assert texts(documents, tokenizer)[0] == BOS + "Äpfel und Birnen\n" + EOS
    assert learned(documents, tokenizer) == [[" Birnen\n" + EOS], ["Alone" + EOS], [EOS]]
    documents = tokenise_documents(DataConfig(data=data, loss_on="all"), tokenizer)
    assert learned(documents, tokenizer)[0] == [BOS + "Äpfel und Birnen\n" + EOS]


def test_trimmed_space_of_the_prompt_stays_in_the_prompt() -> None:
    """Prompt "a", three spaces whose trimmed offsets are empty at their end; completion "b"."""
    offsets = np.array([[0, 1], [4, 4], [4, 5]])
    assert encoding.token_targets(offsets, [(4, 5)]).tolist() == [False, False, True]


def test_token_across_the_end_of_a_span_is_in_the_loss() -> None:
    """ "!\\n" as one token, whose newline is outside the span: without it there is no "!"."""
    offsets = np.array([[0, 2], [2, 4], [4, 5]])
    assert encoding.token_targets(offsets, [(0, 3)]).tolist() == [True, True, False]


@pytest.mark.parametrize(
    "loss_on, expected",
    [
        ("completion", ["  Six!\n<|im_end|>"]),
        ("assistant", ["Four.<|im_end|>", "  Six!\n<|im_end|>"]),
    ],
)
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, GENERATION_TEMPLATE])
def test_prompt_and_completion_of_messages(tmp_path: Path, template: str, loss_on: Any, expected: list[str]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    data = jsonl(tmp_path, {"prompt": CHAT[:4], "completion": CHAT[4:]})
    documents = tokenise_documents(DataConfig(data=data, loss_on=loss_on), tokenizer)
    assert learned(documents, tokenizer) == [expected]


def test_long_text_is_tokenised_in_blocks_without_loss(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "".join(f"Line {i}: some words and numbers.\n" for i in range(50))
    completion = "word " * 100 + "x" * 300  # no line to cut after, then not even a space
    data = jsonl(tmp_path, {"prompt": prompt, "completion": completion}, {"prompt": "a", "completion": "b"})
    whole = tokenise_documents(DataConfig(data=data), tokenizer).tokens[:]
    monkeypatch.setattr(encoding, "_BLOCK_CHARACTERS", 200)
    monkeypatch.setattr(encoding, "_GROUP_CHARACTERS", 500)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "other-cache"))
    documents = tokenise_documents(DataConfig(data=data), tokenizer)
    assert texts(documents, tokenizer) == [prompt + completion + EOS, "ab" + EOS]
    assert learned(documents, tokenizer) == [[completion + EOS], ["b" + EOS]]
    # Cut after lines and before spaces, a byte-level BPE gives the very same tokens.
    cut = len(tokenizer(prompt + "word " * 100)["input_ids"]) - 10
    assert documents.tokens[0]["input_ids"][:cut] == whole["input_ids"][0][:cut]


# ---- bad input


def bad(tmp_path: Path, name: str, contents: bytes | str = b"", **config: Any) -> DataConfig:
    contents = contents.encode() if isinstance(contents, str) else contents
    (tmp_path / name).write_bytes(contents)
    return DataConfig(data=str(tmp_path / name), **config)


MESSAGES = '{"messages": [{"role": "user", "content": "a"}]}\n'
BAD_FILES = [
    ("empty.txt", "", {}, "is empty"),
    ("empty.jsonl", "", {}, "is empty"),
    ("header.csv", "text\n", {}, "no rows in it"),
    ("broken.jsonl", '{"text": "a"}\n{"text": "b\n', {}, "broken.jsonl, line 2: invalid JSON"),
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


def test_loss_must_go_with_the_format(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = jsonl(tmp_path, {"text": "a"})
    with pytest.raises(ConfigError, match="`loss_on` assistant does not go with text data"):
        tokenise_documents(DataConfig(data=data, loss_on="assistant"), tokenizer)
    data = jsonl(tmp_path, {"messages": CHAT})
    with pytest.raises(ConfigError, match="`loss_on` completion .* expected assistant or all"):
        tokenise_documents(DataConfig(data=data, loss_on="completion"), tokenizer)


def test_tokenizer_that_lacks_what_the_text_needs(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.eos_token = None
    chat = DataConfig(data=jsonl(tmp_path, {"messages": CHAT}))
    with pytest.raises(ModelError, match="no chat template"):
        tokenise_documents(chat, tokenizer)
    text = DataConfig(data=str(write_jsonl(tmp_path / "text.jsonl", [{"text": "a"}])))
    with pytest.raises(ConfigError, match="no EOS token"):
        tokenise_documents(text, tokenizer)

    slow = ByT5Tokenizer()
    assert len(tokenise_documents(text, slow).tokens[0]["input_ids"]) == 2  # "a" and EOS
    pair = {"prompt": "a", "completion": "b"}
    with pytest.raises(ModelError, match="found a slow tokenizer"):
        tokenise_documents(DataConfig(data=str(write_jsonl(tmp_path / "pairs.jsonl", [pair]))), slow)


def test_template_that_rejects_a_conversation(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    config = DataConfig(data=jsonl(tmp_path, {"messages": CHAT}))
    with pytest.raises(DataError, match="row 0: .* cannot render .* roles must alternate"):
        tokenise_documents(config, tokenizer)


@pytest.mark.parametrize(
    "options",
    [{"loss_on": "some"}, {"sample_by": "page"}, {"seq_len": 1}, {"max_documents": 0}],
)
def test_config_is_checked(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=f"`{name}` .*: expected"):
        DataConfig(data="a.txt", **options).check()


def test_errors_have_one_root() -> None:
    assert all(issubclass(error, DistillError) for error in (DataError, ModelError, ConfigError))
