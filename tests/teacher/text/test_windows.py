"""Windows of long documents: special tokens and context in front, each token predicted once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pipeline.errors import ConfigError
from pipeline.teacher.text import corpus as corpus_module
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.masked.mask_rule import MaskRule
from pipeline.teacher.text.masked.masked_corpus import build_masked_corpus
from pipeline.teacher.text.packing import TokenCorpus, TokenRow, build_corpus
from pipeline.teacher.text.windows import cut_documents
from tiny import completions, conversations, english, tiny_sentencepiece, tiny_tokenizer
from tiny_masked import wordpiece_tokenizer

LONG = english(12).replace("\n", " ").strip()


@pytest.fixture(params=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return tiny_tokenizer(add_bos=True) if request.param == "byte-level" else tiny_sentencepiece()


def segments(row: TokenRow) -> list[tuple[list[int], list[bool]]]:
    """Token ids and loss mask of each segment."""
    ends = np.cumsum(row.segment_lengths)[:-1]
    parts = zip(np.split(row.input_ids, ends), np.split(row.loss_mask, ends), strict=True)
    return [(ids.tolist(), mask.tolist()) for ids, mask in parts]


def predicted(corpus: TokenCorpus) -> Counter[int]:
    """How often each token id is predicted."""
    return Counter(int(row.input_ids[t + 1]) for row in corpus for t in np.flatnonzero(row.loss_mask))


@given(
    st.lists(st.tuples(st.integers(0, 80), st.sampled_from([0, 2])), max_size=20),
    st.integers(4, 20),
    st.data(),
)
def test_every_token_is_predicted_once_after_enough_context(
    documents: list[tuple[int, int]], seq_len: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(1, seq_len - 3))
    lengths, special = (np.array([pair[i] for pair in documents], int) for i in (0, 1))
    pieces = cut_documents(lengths, seq_len, overlap=overlap, special=special)
    found: Counter[tuple[int, int]] = Counter()
    for i, document in enumerate(pieces.document):
        start, stop, context = pieces.start[i], pieces.stop[i], pieces.context[i]
        assert 2 <= pieces.lengths[i] <= seq_len
        assert pieces.special[i] == (special[document] if start else 0)
        assert (context == overlap and start >= special[document]) if start else context == 1
        found.update((document, token) for token in range(start + context, stop))
    assert found == Counter((d, token) for d, length in enumerate(lengths) for token in range(1, length))


def test_windows_by_hand() -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    ids = tokenizer(LONG)["input_ids"][1:]
    (bos,) = tokenizer("")["input_ids"]
    rows = list(build_corpus(DataConfig(data=[{"text": LONG}], seq_len=6, overlap=2, packing=False), tokenizer))
    assert rows[0].input_ids.tolist() == [bos, *ids[:5]]
    assert rows[0].loss_mask.tolist() == [True] * 5 + [False]
    assert rows[1].input_ids.tolist() == [bos, *ids[3:8]]
    assert rows[1].loss_mask.tolist() == [False, False, True, True, True, False]
    assert rows[2].input_ids.tolist() == [bos, *ids[6:11]]


@pytest.mark.long
@pytest.mark.parametrize("overlap", [1, 5])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["text", "prompts", "chats"])
def test_windows_begin_as_texts_do(
    tokenizer: PreTrainedTokenizerFast, overlap: int, packing: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "_DOCUMENTS_PER_RECORD_BATCH", 1)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ message['role'] + '\n' + message['content'] + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    data = {"text": [{"text": LONG}, {"text": "Short."}], "prompts": completions(3), "chats": conversations(3)}[kind]
    long, short = (
        build_corpus(DataConfig(data=data, seq_len=length, overlap=overlap, packing=packing), tokenizer)
        for length in (4096, 16)
    )
    assert predicted(short) == predicted(long)
    later = 0
    for index, row in enumerate(short):
        for (ids, mask), continues in zip(segments(row), short.continues(index), strict=True):
            assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
            if continues:
                later += 1
                assert not any(mask[:overlap])  # from BOS on: the first prediction has `overlap` tokens before it
    assert later >= 4
    assert short.report["tokens"] == sum(len(row.input_ids) for row in short)
    assert short.description["window_prefix"] == [tokenizer.bos_token_id]
    assert short.description.get("overlap") == (None if overlap == 1 else overlap)
    assert "window_prefix" not in long.description  # nothing was cut


def test_chat_without_bos_has_none_in_later_windows() -> None:
    """What later windows begin with is what their document begins with."""
    tokenizer = tiny_tokenizer(add_bos=True)
    corpus = build_corpus(DataConfig(data=conversations(3), seq_len=16), tokenizer)
    assert any(corpus.continues(row).any() for row in range(len(corpus)))
    assert not any(tokenizer.bos_token_id in row.input_ids for row in corpus)
    assert "window_prefix" not in corpus.description


@pytest.mark.parametrize("packing", [True, False])
def test_tokenizer_without_bos_cuts_as_before(monkeypatch: pytest.MonkeyPatch, packing: bool) -> None:
    monkeypatch.setattr(corpus_module, "_DOCUMENTS_PER_RECORD_BATCH", 3)
    tokenizer = tiny_tokenizer()
    rows = [{"text": line} for line in english(30).splitlines()]
    corpus = build_corpus(DataConfig(data=rows, seq_len=24, packing=packing), tokenizer)
    expected: Counter[tuple[int, ...]] = Counter()
    for row in rows:
        ids = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
        expected.update(tuple(ids[i : i + 24]) for i in range(0, len(ids) - 1, 23))
    assert Counter(tuple(ids) for row in corpus for ids, _ in segments(row)) == expected
    assert not {"overlap", "window_prefix"} & corpus.description.keys()


def test_masked_windows_have_their_special_tokens_and_no_overlap() -> None:
    tokenizer = wordpiece_tokenizer()
    config = DataConfig(data=[{"text": LONG}], seq_len=16)
    for row in build_masked_corpus(config, tokenizer, MaskRule()):
        assert (row.input_ids[0], row.input_ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    with pytest.raises(ConfigError, match="`overlap` 2: .* Leave it out"):
        build_masked_corpus(DataConfig(data=[{"text": LONG}], overlap=2), tokenizer, MaskRule())


@pytest.mark.parametrize("add_bos, most", [(True, 6), (False, 7)])
def test_window_must_hold_a_new_token(add_bos: bool, most: int) -> None:
    tokenizer = tiny_tokenizer(add_bos=add_bos)
    options: dict[str, Any] = {"data": [{"text": LONG}], "seq_len": 8}
    assert len(build_corpus(DataConfig(**options, overlap=most), tokenizer)) > 50
    with pytest.raises(ConfigError, match=f"`overlap` {most + 1}: expected at most {most} "):
        build_corpus(DataConfig(**options, overlap=most + 1), tokenizer)
