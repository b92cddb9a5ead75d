"""The boundary of prompt and answer: no token lies across it, for any kind of tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.teacher.text.corpus import Documents, tokenise_documents
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.packing import build_corpus
from tiny import BOS, completions, conversations, tiny_sentencepiece, tiny_tokenizer
from tiny_masked import wordpiece_tokenizer

COUNT, ONLY_EOS = "documents_with_split_tokens", "documents_with_only_eos"


def byte_level(*, trim_offsets: bool) -> PreTrainedTokenizerFast:
    """Like Llama 3's: byte-level BPE, and BOS before each text."""
    tokenizer = tiny_tokenizer(add_bos=True)
    adds_bos = tokenizer.backend_tokenizer.post_processor
    trims = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([trims, adds_bos])
    return tokenizer


def normalising(*, prepend: bool) -> PreTrainedTokenizerFast:
    """Like Llama 2's, which puts ▁ before every part between special tokens, or like Gemma's, which does not."""
    tokenizer = tiny_sentencepiece()
    spaces = normalizers.Replace(" ", "▁")
    core = tokenizer.backend_tokenizer
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prepend else spaces
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    return tokenizer


TOKENIZERS = {
    "byte-level": lambda: byte_level(trim_offsets=False),
    "byte-level, trim_offsets": lambda: byte_level(trim_offsets=True),
    "sentencepiece": tiny_sentencepiece,
    "llama 2": lambda: normalising(prepend=True),
    "gemma": lambda: normalising(prepend=False),
    "wordpiece": wordpiece_tokenizer,
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


def sides(documents: Documents, row: int = 0) -> tuple[list[int], list[int]]:
    """Tokens outside and inside the loss."""
    ids, targets = (np.array(documents.tokens[row][name]) for name in ("input_ids", "is_target"))
    return ids[~targets.astype(bool)].tolist(), ids[targets.astype(bool)].tolist()


@pytest.mark.long
@pytest.mark.parametrize(
    "prompt, completion",
    [
        ("Is it cold? ", "the river"),  # " the" is one token
        ("Is it cold?  ", "the river"),
        ("Is it cold? th", "e river"),
        ("Is it cold? ", "the"),  # nothing else would be learned
        ("Is it cold? ", " the"),
        ("Is it cold?\n", "\nthe river"),
    ],
)
def test_prompt_has_the_tokens_that_it_has_alone(
    tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str
) -> None:
    config = DataConfig(data=[{"prompt": prompt, "completion": completion}], append_eos=False)
    documents = tokenise_documents(config, tokenizer)
    before, learned = sides(documents)
    assert before == tokenizer(prompt)["input_ids"][: len(before)]
    answer = tokenizer.decode(learned).strip().replace("##", "").replace("[SEP]", "").strip()
    assert answer == completion.strip()
    ids = documents.tokens[0]["input_ids"]
    whole = tokenizer(prompt + completion)["input_ids"]
    assert tokenizer.decode(ids) == tokenizer.decode(whole) or tokenizer.mask_token  # words of BERT are apart
    assert documents.findings == ({} if ids == whole else {COUNT: 1})


def test_trim_offsets_changes_nothing() -> None:
    data = [{"prompt": "Is it cold? ", "completion": "the"}, {"prompt": "Is it", "completion": " cold? "}]
    trimmed, exact = (
        tokenise_documents(DataConfig(data=data), byte_level(trim_offsets=trim)).tokens[:] for trim in (True, False)
    )
    assert trimmed == exact
    tokenizer = byte_level(trim_offsets=True)
    learned = np.array(trimmed["input_ids"][0])[trimmed["is_target"][0]]
    assert tokenizer.decode(learned) == "the" + tokenizer.eos_token


def test_text_without_such_tokens_is_tokenised_as_a_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = completions(20)
    documents = tokenise_documents(DataConfig(data=rows, append_eos=False), tokenizer)
    for row, tokens in zip(rows, documents.tokens, strict=True):
        assert tokens["input_ids"] == tokenizer(row["prompt"] + row["completion"])["input_ids"]
    assert not documents.findings


def test_split_tokens_and_empty_answers_are_counted() -> None:
    data = [
        {"prompt": "Is it cold? ", "completion": "the"},
        {"prompt": "Is it cold?", "completion": ""},
        {"prompt": "Is it cold?", "completion": " the"},
    ]
    config = DataConfig(data=data)
    corpus = build_corpus(config, tiny_sentencepiece())
    assert corpus.report[COUNT] == 1 and corpus.report[ONLY_EOS] == 1
    assert not {COUNT, ONLY_EOS} & build_corpus(DataConfig(data=data[2:]), tiny_sentencepiece()).report.keys()


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_answers_in_chats_begin_with_their_first_character(trim_offsets: bool) -> None:
    """A template whose answers follow a space: "assistant: " and "the" would merge."""
    tokenizer = byte_level(trim_offsets=trim_offsets)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    turns = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "the miller"}]
    documents = tokenise_documents(DataConfig(data=[{"messages": turns * 2}]), tokenizer)
    before, learned = sides(documents)
    assert tokenizer.decode(learned) == "the miller" * 2
    assert tokenizer.decode(before) == BOS + "user: who\nassistant: \n" * 2
    assert documents.findings == {COUNT: 1}
    opened = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
    assert documents.tokens[0]["input_ids"][: len(opened)] == opened


def test_chats_whose_turns_begin_apart_are_tokenised_as_a_whole() -> None:
    tokenizer = byte_level(trim_offsets=True)
    rows = conversations(6)
    documents = tokenise_documents(DataConfig(data=rows), tokenizer)
    for row, tokens in zip(rows, documents.tokens, strict=True):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert tokens["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert not documents.findings
