"""The fingerprint of all rows: equal to its definition, and stored for as long as it is valid."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pipeline.teacher.text import corpus as corpus_module
from pipeline.teacher.text import packing, windows
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.masked import masked_corpus
from pipeline.teacher.text.masked.mask_rule import MaskRule
from pipeline.teacher.text.masked.masked_corpus import MaskedCorpus, build_masked_corpus
from pipeline.teacher.text.packing import TokenCorpus, add_row_to, build_corpus
from tiny import completions, english, tiny_tokenizer, write_jsonl
from tiny_masked import wordpiece_tokenizer


def by_definition(corpus: Any) -> str:
    digest = hashlib.sha256()
    for row in corpus:
        add_row_to(digest, row)
    return digest.hexdigest()


@pytest.mark.long
@pytest.mark.parametrize("long_piece", [0, 20, 10**6])
@pytest.mark.parametrize("tokens_per_block", [1, 300, 10**6])
def test_blocks_give_what_rows_give(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, long_piece: int,
    tokens_per_block: int,
):  # fmt: skip
    """Documents in many record batches, longer and shorter than a row, packed and not, prompts, BOS and overlap."""
    monkeypatch.setattr(corpus_module, "_DOCUMENTS_PER_RECORD_BATCH", 5)
    monkeypatch.setattr(windows, "_LONG_PIECE", long_piece)
    monkeypatch.setattr(packing, "_TOKENS_PER_BLOCK", tokens_per_block)
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": line} for line in ["", *english(60).splitlines(), "a"]])
    answers = write_jsonl(tmp_path / "answers.jsonl", completions(20))
    found = set()
    for data in (text, answers):
        for each, options in (
            (tokenizer, {}),
            (tokenizer, {"packing": False}),
            (tiny_tokenizer(add_bos=True), {"overlap": 7}),
        ):
            corpus = build_corpus(DataConfig(data=str(data), seq_len=24, **options), each)
            assert corpus.token_stream_sha256 == by_definition(corpus)
            found.add(corpus.token_stream_sha256)
    assert len(found) == 6


def count(monkeypatch: pytest.MonkeyPatch, kind: type) -> list[None]:
    """A list that grows with every computation of a fingerprint from now on."""
    computed: list[None] = []
    compute = kind._fingerprint

    def counted(self: Any) -> Any:
        computed.append(None)
        return compute(self)

    monkeypatch.setattr(kind, "_fingerprint", counted)
    return computed


def test_it_is_computed_once_for_the_same_rows(
    tmp_path: Path, tokenised_cache: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    text = tmp_path / "text.txt"
    text.write_text(english(30))
    computed = count(monkeypatch, TokenCorpus)

    def asked(times: int, **options: Any) -> str:
        """The fingerprint of a corpus that is built again; by now, fingerprints were computed `times` times."""
        corpus = build_corpus(
            DataConfig(**{"data": str(text), "sample_by": "line", "seq_len": 24, **options}), tokenizer
        )
        found = corpus.token_stream_sha256
        assert found == by_definition(corpus) and len(computed) == times
        return found

    first = asked(1)
    assert asked(1) == first == asked(1, num_proc=1)
    assert asked(2, seq_len=32) != first
    assert asked(3, packing=False) != first
    assert asked(4, overlap=2) != first
    text.write_text(english(31))
    assert asked(5) != first
    text.write_text(english(30))
    assert asked(6) == first  # another file by its time
    assert asked(6) == first
    # The stored value is of another text: another time or size, or a damaged record.
    (record,) = [path for path in tokenised_cache.glob("*.json") if by_definition_in(path) == first][-1:]
    for tokens in tokenised_cache.glob("*.arrow"):
        os.utime(tokens, (1, 1))
    asked(7)
    for i, damage in enumerate(
        (b"", b"{}", b"[]", record.read_bytes()[:-9], record.read_bytes().replace(b".arrow", b""))
    ):
        for path in tokenised_cache.glob("*.json"):
            path.write_bytes(damage)
        assert asked(8 + i) == first
    monkeypatch.setattr(packing, "__file__", str(text))  # other code
    asked(13)
    assert not (tokenised_cache / "claims").exists()


def by_definition_in(record: Path) -> str:
    return json.loads(record.read_bytes())["stream"]["sha256"]


def test_counts_of_masked_rows_are_stored_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = tmp_path / "text.txt"
    text.write_text(english(30))
    tokenizer = wordpiece_tokenizer()
    computed = count(monkeypatch, MaskedCorpus)
    config = DataConfig(data=str(text), seq_len=24)
    found = []
    for times, rule in ((1, MaskRule()), (1, MaskRule()), (2, MaskRule(seed=1)), (3, MaskRule(copies=2))):
        corpus = build_masked_corpus(config, tokenizer, rule)
        rows = list(corpus)
        assert corpus.token_stream_sha256 == by_definition(corpus) and len(computed) == times
        assert corpus.num_tokens == sum(len(row.input_ids) for row in rows)
        assert corpus.num_loss_tokens == sum(int(row.loss_mask.sum()) for row in rows)
        found.append((corpus.token_stream_sha256, corpus.report))
    assert found[0] == found[1] and len({digest for digest, _ in found}) == 3
    assert masked_corpus.load_or_compute is packing.load_or_compute
