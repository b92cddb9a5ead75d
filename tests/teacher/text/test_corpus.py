"""Text to tokens: special tokens, and which tokens are in the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tokenizers import processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from pipeline.errors import ConfigError, DataError, DistillError, ModelError
from pipeline.teacher.text import encoding
from pipeline.teacher.text.corpus import tokenise_documents
from pipeline.teacher.text.data_config import DataConfig
from tiny import BOS, CHAT_TEMPLATE, EOS, tiny_tokenizer, write_jsonl
from tiny_corpora import CHAT, jsonl, learned, texts


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


# ---- what does not go together


def test_loss_must_go_with_the_format(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = jsonl(tmp_path, {"text": "a"})
    with pytest.raises(ConfigError, match="`loss_on` assistant cannot be used with text data"):
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
        DataConfig(data="a.txt", **options)


def test_errors_have_one_root() -> None:
    assert all(issubclass(error, DistillError) for error in (DataError, ModelError, ConfigError))
