"""When two tokenizers are the same, and the fingerprint of a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from cache_format.cache_errors import MismatchError
from pipeline.models.tokenizers import (
    check_same_tokenizer,
    real_vocab_size,
    tokenizer_files,
    tokenizer_fingerprint,
)
from tiny import EOS, tiny_tokenizer

COMPONENTS = {"vocabulary", "segmentation", "special_tokens", "chat_template"}


def changed(tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> set[str]:
    """The components in which the fingerprints differ."""
    ours, theirs = tokenizer_fingerprint(tokenizer), tokenizer_fingerprint(other)
    assert set(ours) == set(theirs) == COMPONENTS
    return {name for name in COMPONENTS if ours[name] != theirs[name]}


def with_core(tokenizer: PreTrainedTokenizerFast, core: dict) -> PreTrainedTokenizerFast:
    """The same tokenizer around another tokenizer.json."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)),
        chat_template=tokenizer.chat_template,
        **tokenizer.special_tokens_map,
    )


@pytest.mark.parametrize("add_bos", [False, True])
def test_fingerprint_survives_saving_and_loading(tmp_path: Path, add_bos: bool) -> None:
    tokenizer = tiny_tokenizer(add_bos=add_bos)
    tokenizer.save_pretrained(tmp_path / "once")
    once = AutoTokenizer.from_pretrained(tmp_path / "once")
    once.save_pretrained(tmp_path / "twice")
    twice = AutoTokenizer.from_pretrained(tmp_path / "twice")
    assert changed(tokenizer, once) == changed(tokenizer, twice) == set()
    assert check_same_tokenizer(tokenizer, twice) == []


def test_fingerprint_does_not_depend_on_use(tokenizer: PreTrainedTokenizerFast) -> None:
    used = tiny_tokenizer()
    used(["a", "some words"], padding="max_length", truncation=True, max_length=4)
    assert changed(tokenizer, used) == set()


def test_fingerprint_is_hex_sha256(tokenizer: PreTrainedTokenizerFast) -> None:
    for digest in tokenizer_fingerprint(tokenizer).values():
        assert len(digest) == 64 and int(digest, 16)


def test_each_component_shows_its_change(tokenizer: PreTrainedTokenizerFast) -> None:
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = core["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    assert changed(tokenizer, with_core(tokenizer, core)) == {"segmentation"}

    core = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = core["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    assert changed(tokenizer, with_core(tokenizer, core)) == {"vocabulary"}

    assert changed(tokenizer, tiny_tokenizer(seed=1)) == {"vocabulary", "segmentation"}
    assert changed(tokenizer, tiny_tokenizer(add_bos=True)) == {"segmentation"}

    template = tiny_tokenizer()
    template.chat_template = "{{ messages }}"
    assert changed(tokenizer, template) == {"chat_template"}

    special = tiny_tokenizer()
    special.pad_token = EOS
    assert changed(tokenizer, special) == {"special_tokens"}


def test_real_vocab_size_cuts_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    assert real_vocab_size(tokenizer, 400) == 400
    assert real_vocab_size(tokenizer, 512) == 400  # a padded embedding matrix
    assert real_vocab_size(tokenizer, 399) == 399  # a token without a row can have no target
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    assert real_vocab_size(tokenizer, 512) == 401


def test_files_make_the_same_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    files = tokenizer_files(tokenizer)
    assert "tokenizer.json" in files
    for name, contents in files.items():
        (tmp_path / name).write_bytes(contents)
    assert changed(tokenizer, AutoTokenizer.from_pretrained(tmp_path)) == set()


def test_other_vocabulary_is_refused_with_ids_and_tokens(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    other = tiny_tokenizer(seed=1)  # same size: only the tokens tell
    first = next(i for i in range(400) if other.convert_ids_to_tokens(i) != tokenizer.convert_ids_to_tokens(i))
    with pytest.raises(MismatchError) as error:
        check_same_tokenizer(tokenizer, other)
    ours, theirs = tokenizer.convert_ids_to_tokens(first), other.convert_ids_to_tokens(first)
    assert f"id {first} is {theirs!r} instead of {ours!r}" in str(error.value)
    assert "\n" not in str(error.value)


def test_smaller_vocabulary_is_refused_with_both_sizes() -> None:
    with pytest.raises(MismatchError, match="found 390 tokens, expected 400; 10 ids differ"):
        check_same_tokenizer(tiny_tokenizer(), tiny_tokenizer(390))


def test_other_segmentation_is_refused_by_part(tokenizer: PreTrainedTokenizerFast) -> None:
    digits = tiny_tokenizer()
    digits.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    with pytest.raises(MismatchError, match="splits text differently: pre_tokenizer differ"):
        check_same_tokenizer(tokenizer, digits)


def test_other_special_tokens_and_templates_are_warnings() -> None:
    student = tiny_tokenizer()
    student.pad_token, student.chat_template = EOS, None
    pad, template = check_same_tokenizer(tiny_tokenizer(), student)
    assert pad == "pad_token is '<|eos|>' (id 2) for the student, '<|pad|>' (id 0) for the teacher."
    assert "chat template" in template


def test_tokens_beyond_the_teachers_are_a_warning() -> None:
    student = tiny_tokenizer()
    student.add_tokens(["<fim>", "<mid>"])
    (warning,) = check_same_tokenizer(tiny_tokenizer(), student)
    assert "2 tokens beyond the teacher's 400, such as '<fim>'" in warning
    # The other way round, the student lacks tokens of the teacher ...
    with pytest.raises(MismatchError, match="2 ids differ"):
        check_same_tokenizer(student, tiny_tokenizer())
    # ... unless the head of the teacher has no rows for those tokens either.
    assert check_same_tokenizer(student, tiny_tokenizer(), vocab_size=400) == []


def test_slow_tokenizer(tmp_path: Path) -> None:
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    slow.save_pretrained(tmp_path)
    again = ByT5Tokenizer.from_pretrained(tmp_path)
    assert changed(slow, again) == set()
    assert check_same_tokenizer(slow, again) == []
    with pytest.raises(MismatchError):
        check_same_tokenizer(tiny_tokenizer(), slow)
