"""The text of a row in another tokenizer's tokens: which positions end together, and which tokens are the same.

Checked against offsets of characters, and against GPT-2's table of bytes as another library has it.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pipeline.errors import ConfigError
from pipeline.student.data.retokenise import Retokeniser, TokenText, same_tokens
from tiny import BOS, EOS, tiny_sentencepiece, tiny_tokenizer

TEACHER, STUDENT, PIECES = tiny_tokenizer(), tiny_tokenizer(330, seed=7), tiny_sentencepiece()
CHARACTERS = {character: byte for byte, character in bytes_to_unicode().items()}


def between(teacher: PreTrainedTokenizerFast, student: PreTrainedTokenizerFast) -> Retokeniser:
    return Retokeniser(TokenText(teacher, "teacher"), TokenText(student, "student"))


def said(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> bytes:
    """What byte-level tokens say, by the table of another library."""
    return b"".join(bytes(CHARACTERS[c] for c in token) for token in tokenizer.convert_ids_to_tokens(ids))


# -- alignment --------------------------------------------------------------------------------------------------------

TEXT = st.text(alphabet=st.sampled_from("the captain sold  nine\n\tapples 東京é€😀İ—“”0123."), min_size=0, max_size=60)


@given(text=TEXT, cuts=st.sets(st.integers(1, 59)))
def test_aligned_positions_have_read_the_same_bytes_and_no_such_pair_is_missed(text: str, cuts: set[int]):
    # Any segmentation may be in a cache: the teacher's own, or one put together from pieces of the text.
    bounds = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    ids = [i for a, b in zip(bounds, bounds[1:], strict=False) for i in TEACHER(text[a:b])["input_ids"]]
    found = between(TEACHER, STUDENT).document(ids)
    ours = [token.id for token in found.tokens]
    assert ours == STUDENT(text)["input_ids"]  # whatever the teacher's segmentation
    pairs = set(found.aligned())
    theirs_at = {len(said(TEACHER, ids[: t + 1])): t for t in range(len(ids))}
    ours_at = {len(said(STUDENT, ours[: s + 1])): s for s in range(len(ours))}
    assert pairs == {(ours_at[n], theirs_at[n]) for n in ours_at.keys() & theirs_at.keys()}
    for s, t in pairs:
        assert said(STUDENT, ours[: s + 1]) == said(TEACHER, ids[: t + 1])


@given(text=TEXT)
def test_sentencepiece_tokens_say_the_text_without_the_space_that_they_add(text: str):
    assert b"".join(PIECES_TEXT.bytes[t.id] for t in PIECES_TEXT.tokens(text)).removeprefix(b" ") == text.encode() or (
        text.startswith(" ")
    )
    assert [t.end for t in PIECES_TEXT.tokens(text)][-1:] == ([len(text.encode())] if text else [])
    there = between(TEACHER, PIECES).document(TEACHER(text)["input_ids"])
    assert [token.id for token in there.tokens] == [
        PIECES.bos_token_id,
        *PIECES(text, add_special_tokens=False)["input_ids"],
    ]
    back = between(PIECES, TEACHER).document(PIECES(text)["input_ids"])
    if not text.startswith(" "):  # whether the text began with one cannot be told from the tokens
        assert [token.id for token in back.tokens][1:] == TEACHER(text)["input_ids"]
        assert back.tokens[0].id == TEACHER.bos_token_id
        assert not text or (len(back.tokens) - 1, len(back.ends) - 1) in set(back.aligned())
        same = between(PIECES, PIECES).document(PIECES(text)["input_ids"])
        assert {(s, t) for s, t in same.aligned() if s != t} == set() and len(dict(same.aligned())) >= len(
            same.ends
        ) - 1


PIECES_TEXT = TokenText(PIECES, "student")


def test_special_tokens_are_atoms_with_counterparts_by_name_or_role():
    ids = TEACHER(f"{BOS}Snow.{EOS}<|im_start|>")["input_ids"]
    there = between(TEACHER, PIECES).document(ids)
    names = PIECES.convert_ids_to_tokens([token.id for token in there.tokens])
    assert names[0] == "<s>" and "</s>" in names and names.count("<s>") == 1
    end = names.index("</s>")
    after = PIECES.convert_tokens_to_string(names[end + 1 :])
    assert after.strip() == "<|im_start|>"  # no counterpart: its name, as text
    pairs = dict(there.aligned())
    assert pairs[end] == ids.index(TEACHER.eos_token_id)
    assert names[1] == "▁" and pairs[1] == 0 and 0 not in pairs  # after the space that only the student has
    assert pairs[len(names) - 1] == len(ids) - 1  # the last of its tokens ends where it does
    assert not pairs.keys() & set(range(end + 1, len(names) - 1))  # and none before


def test_word_with_a_space_of_its_own_is_not_the_word_without():
    found = between(TEACHER, PIECES).document(TEACHER(f"{BOS}the captain the captain")["input_ids"])
    names = PIECES.convert_ids_to_tokens([token.id for token in found.tokens])
    assert names[:2] == ["<s>", "▁the"] and 0 not in dict(found.aligned())
    assert dict(found.aligned())[1] == len(TEACHER("the")["input_ids"])  # after BOS and the word


def test_half_a_character_at_the_edge_of_a_window_reaches_no_student():
    ids = TEACHER("東京 snow 東")["input_ids"]
    assert said(TEACHER, ids[1:-1]) == "東京 snow 東".encode()[1:-1]  # one token a byte
    found = between(TEACHER, STUDENT).document(ids[1:-1])
    assert said(STUDENT, [token.id for token in found.tokens]).decode() == "京 snow "
    for s, t in found.aligned():
        assert said(TEACHER, ids[1 : t + 2]).endswith(said(STUDENT, [token.id for token in found.tokens[: s + 1]]))
    assert len(list(found.aligned())) > 3


def test_tokenizer_that_changes_the_text_is_aligned_by_its_offsets():
    core = json.loads(STUDENT.backend_tokenizer.to_str())
    core["normalizer"] = json.loads(normalizers.Lowercase().__getstate__())
    lower = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)), eos_token=EOS)
    text = "ANNA sold the Harbour Map."
    ids = TEACHER(text)["input_ids"]
    found = between(TEACHER, lower).document(ids)
    encoded = lower(text, return_offsets_mapping=True)
    theirs = {end: t for t, (_, end) in enumerate(TEACHER(text, return_offsets_mapping=True)["offset_mapping"])}
    expected = {(s, theirs[end]) for s, (_, end) in enumerate(encoded["offset_mapping"]) if end in theirs}
    assert [token.id for token in found.tokens] == encoded["input_ids"]
    assert set(found.aligned()) == expected and len(expected) > 5


def test_word_pieces_do_not_say_what_text_they_are():
    core = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match="the student's tokenizer .* is neither byte-level nor SentencePiece-like"):
        TokenText(PreTrainedTokenizerFast(tokenizer_object=core), "student")


# -- tokens that both have --------------------------------------------------------------------------------------------


def test_same_tokens_are_those_of_the_same_bytes():
    found = same_tokens(TokenText(TEACHER, "teacher"), TokenText(STUDENT, "student"))
    ours, theirs = TEACHER.get_vocab(), STUDENT.get_vocab()
    assert found == {ours[token]: theirs[token] for token in ours.keys() & theirs.keys()}  # both are byte-level
    assert 261 <= len(found) < 400

    found = same_tokens(TokenText(TEACHER, "teacher"), PIECES_TEXT)
    pieces = PIECES.get_vocab()
    assert found[ours["Ġthe"]] == pieces["▁the"] and found[ours["e"]] == pieces["e"]  # not <0x65>
    assert found[ours["â"]] == pieces["<0xE2>"]  # a byte that begins no character alone
    assert found[TEACHER.eos_token_id] == PIECES.eos_token_id and ours["<|im_start|>"] not in found


@pytest.mark.parametrize("tokenizer", [TEACHER, PIECES], ids=["byte-level", "sentencepiece"])
def test_identical_vocabularies_map_to_themselves(tokenizer: PreTrainedTokenizerFast):
    text = TokenText(tokenizer, "either")
    assert same_tokens(text, text) == {i: i for i in range(len(tokenizer))}
