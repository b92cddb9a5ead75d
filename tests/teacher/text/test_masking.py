"""Which tokens are masked, what replaces them, and that both depend on seed, row and position only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.errors import ConfigError, DataError, ModelError
from pipeline.teacher.targets.philox import uniforms
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.masked.mask_rule import MaskRule
from pipeline.teacher.text.masked.masked_corpus import MaskedCorpus, build_masked_corpus, cut_windows
from pipeline.teacher.text.masked.masking import Masker
from tiny import completions, english, write_jsonl
from tiny_masked import bpe_tokenizer, wordpiece_tokenizer

PAD, UNK, CLS, SEP, MASK = range(5)  # of the word pieces


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerFast:
    return wordpiece_tokenizer()


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    file = tmp_path / "lines.txt"
    file.write_text(english(60), encoding="utf-8")
    return file


def corpus_of(file: Path, tokenizer: PreTrainedTokenizerFast, rule: MaskRule | None = None, **data) -> MaskedCorpus:
    settings = {"seq_len": 24, "sample_by": "line", **data}
    return build_masked_corpus(DataConfig(data=str(file), **settings), tokenizer, rule or MaskRule())


def text_of(row) -> np.ndarray:
    """The row before it was masked."""
    return np.where(row.labels >= 0, row.labels, row.input_ids)


# ---- the pattern


def masks_of(tokenizer: PreTrainedTokenizerFast, rule: MaskRule, rows: int = 400, length: int = 100):
    masker = Masker(rule, tokenizer)
    text = np.random.default_rng(0).integers(5, 400, (rows, length)).astype(np.int32)
    allowed = np.ones((rows, length), bool)
    masked, chosen = zip(*(masker.mask(r, text[r], allowed[r]) for r in range(rows)), strict=True)
    return text, np.array(masked), np.array(chosen)


@pytest.mark.parametrize(
    "rule", [MaskRule(), MaskRule(probability=0.4, mask_replace_prob=0.5, random_replace_prob=0.2, seed=3)], ids=str
)
def test_shares_are_as_configured(pieces: PreTrainedTokenizerFast, rule: MaskRule) -> None:
    """40,000 tokens; each bound is Hoeffding's for a false alarm below 1e-6 (log(2e6) = 14.5)."""
    text, masked, chosen = masks_of(pieces, rule)
    expected = {"chosen": rule.probability, "hidden": rule.mask_replace_prob, "changed": rule.random_replace_prob}
    of_chosen = masked[chosen]
    found = {
        "chosen": (chosen.mean(), chosen.size),
        "hidden": ((of_chosen == MASK).mean(), len(of_chosen)),
        # One in 395 draws gives the token that was there.
        "changed": (((of_chosen != MASK) & (of_chosen != text[chosen])).mean(), len(of_chosen)),
    }
    for name, (share, count) in found.items():
        assert abs(share - expected[name]) < np.sqrt(14.5 / (2 * count)) + 1 / 395, name
    assert np.array_equal(masked[~chosen], text[~chosen])


def test_a_random_replacement_is_any_token_but_a_special_one(pieces: PreTrainedTokenizerFast) -> None:
    text, masked, chosen = masks_of(pieces, MaskRule(probability=1.0, mask_replace_prob=0.0, random_replace_prob=1.0))
    assert chosen.all()
    drawn = np.bincount(masked.ravel(), minlength=400)
    assert (drawn[:5] == 0).all() and (drawn[5:] > 0).all()
    assert drawn[5:].max() < 1.6 * 40_000 / 395  # 6 standard deviations


def test_a_pattern_is_a_function_of_seed_row_and_position(pieces: PreTrainedTokenizerFast) -> None:
    rng, masker = np.random.default_rng(1), Masker(MaskRule(), pieces)
    everything = np.ones(60, bool)
    text, other = rng.integers(5, 400, (2, 60)).astype(np.int32)
    masked, chosen = masker.mask(17, text, everything)
    assert np.array_equal(chosen, masker.mask(17, other, everything)[1]), "on what the text says"
    shorter = masker.mask(17, text[:40], everything[:40])
    assert np.array_equal(shorter[1], chosen[:40]) and np.array_equal(shorter[0], masked[:40]), "on the row's length"
    assert not np.array_equal(chosen, masker.mask(18, text, everything)[1])
    assert not np.array_equal(chosen, Masker(MaskRule(seed=1), pieces).mask(17, text, everything)[1])
    some = rng.random(60) < 0.5
    assert np.array_equal(masker.mask(17, text, some)[1], chosen & some)


def test_a_row_has_at_least_one_masked_token(pieces: PreTrainedTokenizerFast) -> None:
    masker = Masker(MaskRule(probability=0.01), pieces)
    allowed = np.array([False, True, True, False, True])
    chosen = np.array([masker.mask(row, np.arange(5, 10, dtype=np.int32), allowed)[1] for row in range(300)])
    assert (chosen.sum(axis=1) == 1).mean() > 0.9 and (chosen.sum(axis=1) >= 1).all()
    assert not chosen[:, ~allowed].any() and (chosen[:, allowed].mean(axis=0) > 0.2).all()


def test_masks_and_tail_samples_are_independent(pieces: PreTrainedTokenizerFast) -> None:
    """With the same random numbers, the tail at masked positions would only be sampled with u < 0.15."""
    _, _, chosen = masks_of(pieces, MaskRule(seed=5))
    row, position = np.nonzero(chosen)
    of_the_tail = uniforms(5, row, position, 1)[:, 0]
    assert abs(of_the_tail.mean() - 0.5) < np.sqrt(14.5 / (2 * len(row)))


# ---- rows


def test_windows_do_not_overlap() -> None:
    found = cut_windows(np.array([0, 1, 7, 10, 11]), 5)
    assert list(zip(found.document.tolist(), found.start.tolist(), found.stop.tolist(), strict=True)) == [
        *((1, 0, 1), (2, 0, 5), (2, 5, 7)),
        *((3, 0, 5), (3, 5, 10), (4, 0, 5), (4, 5, 10), (4, 10, 11)),
    ]


@pytest.mark.parametrize("build", [wordpiece_tokenizer, bpe_tokenizer])
def test_every_token_is_in_one_window_between_special_tokens(lines: Path, build) -> None:
    tokenizer = build()
    corpus = corpus_of(lines, tokenizer)
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    texts = [text_of(row) for row in corpus]
    assert all(text[0] == first and text[-1] == last and 3 <= len(text) <= 24 for text in texts)
    documents = lines.read_text(encoding="utf-8").splitlines()
    expected = [token for text in documents for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert np.concatenate([text[1:-1] for text in texts]).tolist() == expected
    for row in corpus:
        assert not row.loss_mask[[0, -1]].any() and row.loss_mask.any()
        assert np.array_equal(row.labels >= 0, row.loss_mask) and row.segment_lengths.tolist() == [len(row.input_ids)]
    assert corpus.num_tokens == sum(map(len, texts))
    assert corpus.num_loss_tokens == sum(int(row.loss_mask.sum()) for row in corpus)
    assert corpus.report["documents_cut"] > 5


def test_special_tokens_in_the_text_are_not_masked(tmp_path: Path, pieces: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "special.txt"
    file.write_text("the miller [MASK] sold [SEP] the boat 東\n東 東\n")
    corpus = corpus_of(file, pieces, MaskRule(probability=1.0, mask_replace_prob=0.0, random_replace_prob=0.0))
    (row,) = corpus  # the second document has nothing but unknown tokens
    assert corpus.report["windows_without_targets"] == 1
    special = np.isin(row.input_ids, [PAD, UNK, CLS, SEP, MASK])
    assert special.sum() == 5 and np.array_equal(row.loss_mask, ~special)


def test_only_loss_tokens_are_masked(tmp_path: Path, pieces: PreTrainedTokenizerFast) -> None:
    records = completions(20)
    corpus = corpus_of(write_jsonl(tmp_path / "c.jsonl", records), pieces, MaskRule(probability=1.0), seq_len=64)
    for row, record in zip(corpus, records, strict=True):
        prompt = len(pieces(record["prompt"], add_special_tokens=False)["input_ids"])
        assert not row.loss_mask[: 1 + prompt].any() and row.loss_mask[1 + prompt : -1].all()


def test_copies_have_the_same_text_and_other_masks(lines: Path, pieces: PreTrainedTokenizerFast) -> None:
    once, thrice = corpus_of(lines, pieces), corpus_of(lines, pieces, MaskRule(copies=3))
    windows = len(once)
    assert len(thrice) == 3 * windows and thrice.num_tokens == 3 * once.num_tokens
    for r in range(windows):
        copies = [thrice[r + i * windows] for i in range(3)]
        assert all(np.array_equal(text_of(copy), text_of(once[r])) for copy in copies)
        assert np.array_equal(copies[0].input_ids, once[r].input_ids)
    different = [not np.array_equal(thrice[r].loss_mask, thrice[r + windows].loss_mask) for r in range(windows)]
    assert np.mean(different) > 0.8
    assert thrice.token_stream_sha256 != once.token_stream_sha256


def test_the_metadata_describe_the_masks(lines: Path, pieces: PreTrainedTokenizerFast) -> None:
    corpus = corpus_of(lines, pieces, MaskRule(seed=4, copies=2))
    assert corpus.description["masking"] == {
        "probability": 0.15,
        "mask_replace_prob": 0.8,
        "random_replace_prob": 0.1,
        "seed": 4,
        "copies": 2,
        "mask_token_id": MASK,
    }
    assert corpus.description["packing"] is False and corpus.description["append_eos"] is False


# ---- refused


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"probability": 0.0}, "0.0: expected a positive number and at most 1"),
        ({"mask_replace_prob": 0.8, "random_replace_prob": 0.3}, "at most 1 together"),
        ({"random_replace_prob": -0.1}, "expected 0 to 1"),
        ({"seed": -1}, "-1: expected 0 to"),
        ({"copies": 0}, "0: expected 1 or more"),
    ],
)
def test_invalid_rules(values: dict, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        MaskRule(**values)


def test_invalid_corpora(lines: Path, tmp_path: Path, pieces: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="`packing=True`: a masked language model attends to both sides"):
        corpus_of(lines, pieces, packing=True)
    with pytest.raises(ConfigError, match="`append_eos=True`"):
        corpus_of(lines, pieces, append_eos=True)
    with pytest.raises(ConfigError, match="expected more than the 2 special tokens"):
        corpus_of(lines, pieces, seq_len=2)
    (tmp_path / "unknown.txt").write_text("東\n")
    with pytest.raises(DataError, match="no loss tokens in it"):
        corpus_of(tmp_path / "unknown.txt", pieces)
    without = wordpiece_tokenizer()
    without.mask_token = None
    with pytest.raises(ModelError, match="has no mask token"):
        corpus_of(lines, without)
