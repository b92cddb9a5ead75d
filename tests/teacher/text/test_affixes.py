"""A text that brings its BOS does not get another one, in any format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.teacher.text.corpus import tokenise_documents
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.masked.mask_rule import MaskRule
from pipeline.teacher.text.masked.masked_corpus import build_masked_corpus
from pipeline.teacher.text.packing import build_corpus
from pipeline.teacher.text.prompts import open_prompts
from tiny import tiny_sentencepiece, tiny_tokenizer, write_jsonl
from tiny_masked import wordpiece_tokenizer

TOKENIZERS = {"byte-level": lambda: tiny_tokenizer(add_bos=True), "sentencepiece": tiny_sentencepiece}
COUNT = "documents_with_special_tokens"
# As in the published templates of Llama 3 and Gemma.
BOS_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ':\n' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


def text_file(folder: Path, text: str) -> str:
    (folder / "text.txt").write_text(text)
    return str(folder / "text.txt")


def jsonl(folder: Path, text: str) -> str:
    return str(write_jsonl(folder / "text.jsonl", [{"text": text}]))


def given_rows(_: Path, text: str) -> list[dict[str, str]]:
    return [{"text": text}]


def prompt(_: Path, text: str) -> list[dict[str, str]]:
    return [{"prompt": text, "completion": " And an answer."}]


@pytest.mark.long
@pytest.mark.parametrize("copies", [0, 1, 2])
@pytest.mark.parametrize("source", [text_file, jsonl, given_rows, prompt])
def test_text_begins_with_one_bos(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, source: Callable[[Path, str], Any], copies: int
) -> None:
    bos = tokenizer.bos_token
    config = DataConfig(data=source(tmp_path, copies * bos + "A text that begins."))
    documents = tokenise_documents(config, tokenizer)
    ids = documents.tokens[0]["input_ids"]
    whole = (bos if copies else "") + "A text that begins." + (" And an answer." if source is prompt else "")
    expected = tokenizer(whole, add_special_tokens=copies == 0)["input_ids"]
    assert ids == [*expected, tokenizer.eos_token_id] and ids.count(tokenizer.bos_token_id) == 1
    assert documents.tokens[0]["is_target"][1] is (source is not prompt)
    # Only where something was changed: the manifest of other caches stays as it is.
    assert build_corpus(config, tokenizer).report.get(COUNT) == (1 if copies else None)


@pytest.mark.parametrize("copies", [0, 1])
def test_rendered_conversation_begins_with_one_bos(tokenizer: PreTrainedTokenizerFast, copies: int) -> None:
    """Given as messages, and as the text that the template makes of them."""
    tokenizer.chat_template = BOS_TEMPLATE
    messages = [
        {"role": "user", "content": "Who is it?"},
        {"role": "assistant", "content": "Anna."},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    tokenizer.chat_template = copies * "{{ bos_token }}" + BOS_TEMPLATE
    expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    documents = tokenise_documents(DataConfig(data=[{"messages": messages}]), tokenizer)
    assert documents.tokens[0]["input_ids"] == expected
    assert documents.findings == ({COUNT: 1} if copies else {})
    documents = tokenise_documents(DataConfig(data=[{"text": rendered}], append_eos=False), tokenizer)
    assert documents.tokens[0]["input_ids"] == expected and documents.findings == {COUNT: 1}
    prompts = open_prompts(DataConfig(data=[{"messages": messages[:1]}]), tokenizer)
    (prompt,) = prompts.read(range(1))
    assert prompt.ids.tolist().count(tokenizer.bos_token_id) == 1 and prompt.ids[0] == tokenizer.bos_token_id


def test_prompt_to_answer_begins_with_one_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["One and one?", tokenizer.bos_token + "One and one?", ""]
    prompts = open_prompts(DataConfig(data=[{"prompt": text} for text in texts]), tokenizer)
    plain, brought, empty = (prompt.ids.tolist() for prompt in prompts.read(range(3)))
    assert plain == tokenizer(texts[0])["input_ids"]
    assert brought == tokenizer(texts[1], add_special_tokens=False)["input_ids"]
    assert empty == [] and prompts.lengths.tolist() == [len(plain), len(brought), 0]
    assert prompts.findings == {COUNT: 1}


def test_windows_of_masked_text_have_one_cls_and_sep() -> None:
    tokenizer = wordpiece_tokenizer()
    text = "every child counted nine apples before noon, and the baker sold snow near the river"
    expected, brought = (
        build_masked_corpus(DataConfig(data=[{"text": each}], seq_len=10), tokenizer, MaskRule())
        for each in (text, f"[CLS] {text} [SEP]")
    )
    assert brought.token_stream_sha256 == expected.token_stream_sha256
    assert len(expected) > 1  # windows
    assert brought.report == {**expected.report, COUNT: 1}


def test_tokenizer_without_bos_changes_nothing() -> None:
    tokenizer = tiny_tokenizer()
    text = 2 * tokenizer.bos_token + "text"
    documents = tokenise_documents(DataConfig(data=[{"text": text}]), tokenizer)
    assert documents.tokens[0]["input_ids"] == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert not documents.findings
