"""Documents to rows: every prediction exactly once, and the loss mask at the position it is made from."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pipeline.errors import DataError
from pipeline.teacher.text import corpus as corpus_module
from pipeline.teacher.text import packing
from pipeline.teacher.text.corpus import Columns, Documents
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.packing import RowPlan, TokenCorpus, build_corpus, plan_rows
from pipeline.teacher.text.reading.sources import Source
from pipeline.teacher.text.windows import cut_documents
from tiny import EOS, english, write_jsonl

LENGTHS = st.lists(st.integers(0, 60), max_size=40).map(np.array)


def corpus_of(*documents: tuple[list[int], list[int]], **config: Any) -> TokenCorpus:
    """A corpus of given (input_ids, is_target) documents."""
    tokens = datasets.Dataset.from_dict(
        {
            "input_ids": [ids for ids, _ in documents],
            "is_target": [[bool(target) for target in targets] for _, targets in documents],
        },
        features=corpus_module._FEATURES,
    )
    source = Source(tokens, (), 0)
    return TokenCorpus(
        Documents(tokens, Columns("text", ("text",)), "all", source),
        DataConfig(data="given", **config),
    )


def planned(lengths: np.ndarray, *, seq_len: int, packing: bool) -> RowPlan:
    return plan_rows(lengths, cut_documents(lengths, seq_len), seq_len=seq_len, packing=packing)


def rows_of(plan: RowPlan) -> list[list[tuple[int, int, int]]]:
    """(document, start, stop) of the pieces, row by row."""
    pieces = list(
        zip(
            plan.pieces.document.tolist(),
            plan.pieces.start.tolist(),
            plan.pieces.stop.tolist(),
            strict=True,
        )
    )
    return [pieces[a:b] for a, b in zip(plan.offsets[:-1], plan.offsets[1:], strict=True)]


# ---- plan_rows


@given(LENGTHS, st.integers(2, 20), st.booleans())
def test_every_transition_exactly_once(lengths: np.ndarray, seq_len: int, packing: bool) -> None:
    plan = planned(lengths, seq_len=seq_len, packing=packing)
    rows = rows_of(plan)
    made = Counter((document, t) for row in rows for document, start, stop in row for t in range(start, stop - 1))
    assert made == Counter((d, t) for d, length in enumerate(lengths) for t in range(length - 1))

    for row in rows:
        lengths_in_row = [stop - start for _, start, stop in row]
        assert 2 <= min(lengths_in_row) and sum(lengths_in_row) <= seq_len
        assert packing or len(row) == 1
    assert plan.report["rows"] == plan.num_rows == len(rows)
    assert plan.report["windows"] == sum(map(len, rows))
    assert plan.report["tokens"] == sum(b - a for row in rows for _, a, b in row)
    assert plan.report["empty_documents"] == sum(n == 0 for n in lengths)
    assert plan.report["single_token_pieces"] == sum(n == 1 for n in lengths)
    assert plan.report["documents_cut"] == sum(n > seq_len for n in lengths)


@given(LENGTHS, st.integers(2, 20))
def test_plan_is_deterministic(lengths: np.ndarray, seq_len: int) -> None:
    first, second = (planned(lengths.copy(), seq_len=seq_len, packing=True) for _ in range(2))
    assert rows_of(first) == rows_of(second)


@given(LENGTHS, st.integers(2, 20))
def test_packing_never_needs_more_rows(lengths: np.ndarray, seq_len: int) -> None:
    packed = planned(lengths, seq_len=seq_len, packing=True)
    apart = planned(lengths, seq_len=seq_len, packing=False)
    assert packed.num_rows <= apart.num_rows
    # No two rows that were open at the same time could have been one.
    fills = [sum(b - a for _, a, b in row) for row in rows_of(packed)]
    assert len(fills) > packing._OPEN_ROWS or all(a + b > seq_len for i, a in enumerate(fills) for b in fills[:i])


def test_windows_by_hand() -> None:
    # 11 tokens make 10 predictions; 4 tokens make 3 of them: 3 + 3 + 3 + 1.
    plan = planned(np.array([11]), seq_len=4, packing=False)
    assert rows_of(plan) == [[(0, 0, 4)], [(0, 3, 7)], [(0, 6, 10)], [(0, 9, 11)]]


def test_pieces_that_are_not_kept_are_counted() -> None:
    pieces = cut_documents(lengths := np.array([5, 3, 2]), 4)
    plan = plan_rows(lengths, pieces, seq_len=4, packing=True, kept=pieces.document != 1)
    assert rows_of(plan) == [[(0, 0, 4)], [(0, 3, 5), (2, 0, 2)]]
    assert (plan.report["windows"], plan.report["windows_without_targets"]) == (4, 1)


def test_many_documents_fill_their_rows() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 100_000).astype(np.int64)
    plan = planned(lengths, seq_len=1024, packing=True)
    assert plan.report["tokens"] / (plan.num_rows * 1024) > 0.99


# ---- rows and masks


def test_loss_mask_is_at_the_position_the_prediction_is_made_from() -> None:
    """Tokens 13 and 14 are to be predicted: from 12 (index 2) and from 13 (index 3)."""
    (row,) = corpus_of(([10, 11, 12, 13, 14, 15], [0, 0, 0, 1, 1, 0]))
    assert row.input_ids.tolist() == [10, 11, 12, 13, 14, 15]
    assert row.loss_mask.tolist() == [False, False, True, True, False, False]


def test_nothing_is_predicted_across_segments() -> None:
    corpus = corpus_of(([1, 2, 3], [1, 1, 1]), ([4, 5], [1, 1]), seq_len=5)
    (row,) = corpus
    assert row.input_ids.tolist() == [1, 2, 3, 4, 5]
    assert row.segment_lengths.tolist() == [3, 2]
    assert row.loss_mask.tolist() == [True, True, False, True, False]
    assert (row.input_ids.dtype, row.loss_mask.dtype, row.segment_lengths.dtype) == (
        np.int32,
        bool,
        np.int32,
    )
    assert corpus.num_tokens == 5 and corpus.num_loss_tokens == 3
    assert corpus.report["fill_ratio"] == 1.0


def test_windows_overlap_by_one_token_and_each_target_counts_once() -> None:
    corpus = corpus_of(([1, 2, 3, 4, 5, 6], [1, 1, 0, 1, 1, 1]), seq_len=3, packing=False)
    assert [row.input_ids.tolist() for row in corpus] == [[1, 2, 3], [3, 4, 5], [5, 6]]
    assert [row.loss_mask.tolist() for row in corpus] == [
        [True, False, False],  # 2 counts, 3 does not
        [True, True, False],
        [True, False],
    ]
    assert corpus.num_loss_tokens == 4


def test_windows_without_targets_are_dropped_and_counted() -> None:
    """The first window holds a target, token 1, but not the prediction of it."""
    corpus = corpus_of(([1, 2, 3, 4, 5], [1, 0, 0, 1, 1]), ([6, 7], [1, 0]), ([], []), ([8], [1]), seq_len=3)
    assert [row.input_ids.tolist() for row in corpus] == [[3, 4, 5]]
    assert corpus.report == {
        "documents": 4,
        "empty_documents": 1,
        "single_token_pieces": 1,
        "documents_cut": 1,
        "windows": 3,
        "windows_without_targets": 2,
        "rows": 1,
        "tokens": 3,
        "counted_tokens": 2,
        "fill_ratio": 1.0,
        "ignored_files": 0,
    }


def test_text_without_loss_tokens_is_an_error() -> None:
    with pytest.raises(DataError, match="no loss tokens in it .*1 documents, .* `loss_on` all"):
        corpus_of(([1, 2, 3], [1, 0, 0]))


# ---- the corpus as a sequence


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "lines.jsonl", [{"text": line} for line in english(150).splitlines()])


def test_corpus_holds_the_tokens_of_the_text(
    lines: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of many record batches, against tokenising each line here."""
    monkeypatch.setattr(corpus_module, "_DOCUMENTS_PER_RECORD_BATCH", 7)
    config = DataConfig(data=str(lines), seq_len=64)
    corpus = build_corpus(config, tokenizer)
    expected: Counter[tuple[int, ...]] = Counter()
    for line in english(150).splitlines():
        ids = tokenizer(line)["input_ids"] + [tokenizer.eos_token_id]
        expected.update(tuple(ids[i : i + 64]) for i in range(0, len(ids) - 1, 63))
    found: Counter[tuple[int, ...]] = Counter()
    for row in corpus:
        ends = np.cumsum(row.segment_lengths)
        segments = np.split(row.input_ids, ends[:-1])
        found.update(tuple(segment.tolist()) for segment in segments)
        assert ends[-1] == len(row.input_ids) == len(row.loss_mask) <= 64
        assert not row.loss_mask[ends - 1].any()
    assert found == expected
    assert corpus.num_tokens == sum(len(row.input_ids) for row in corpus)
    assert corpus.num_loss_tokens == sum(row.loss_mask.sum() for row in corpus)
    assert corpus.report["counted_tokens"] == corpus.num_loss_tokens


def test_indexing(lines: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = build_corpus(DataConfig(data=str(lines), seq_len=64), tokenizer)
    assert corpus[-1].input_ids.tolist() == corpus[len(corpus) - 1].input_ids.tolist()
    assert corpus[0].input_ids.tolist() == corpus[-len(corpus)].input_ids.tolist()
    for row in (len(corpus), -len(corpus) - 1):
        with pytest.raises(IndexError):
            corpus[row]


def test_processes_change_nothing(lines: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    one, two = (build_corpus(DataConfig(data=str(lines), seq_len=64, num_proc=n), tokenizer) for n in (None, 2))
    assert one.token_stream_sha256 == two.token_stream_sha256
    assert one.description == two.description


def test_token_stream_hash_by_hand() -> None:
    corpus = corpus_of(([1, 2, 3], [1, 1, 0]), ([4, 5], [1, 1]), seq_len=5)
    stream = struct.pack("<qq", 5, 2) + struct.pack("<5i", 1, 2, 3, 4, 5)
    stream += bytes([1, 0, 0, 1, 0]) + struct.pack("<2i", 3, 2)
    assert corpus.token_stream_sha256 == hashlib.sha256(stream).hexdigest()


def test_token_stream_hash_covers_ids_masks_and_segments() -> None:
    hashes = {
        corpus_of(*documents, seq_len=4).token_stream_sha256
        for documents in (
            [([1, 2, 3, 4], [1, 1, 1, 1])],
            [([1, 2, 3, 5], [1, 1, 1, 1])],
            [([1, 2, 3, 4], [1, 1, 0, 1])],
            [([1, 2], [1, 1]), ([3, 4], [1, 1])],
        )
    }
    assert len(hashes) == 4


def test_description_of_a_file(lines: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(data=str(lines), seq_len=64, max_documents=20)
    assert build_corpus(config, tokenizer).description == {
        "source": str(lines),
        "files": [
            {
                "name": "lines.jsonl",
                "bytes": lines.stat().st_size,
                "sha256": hashlib.sha256(lines.read_bytes()).hexdigest(),
            }
        ],
        "format": "text",
        "columns": ["text"],
        "data_config": None,
        "split": "train",
        "text_column": None,
        "sample_by": "document",
        "loss_on": "all",
        "append_eos": True,
        "max_documents": 20,
        "packing": True,
        "window_length": 64,
    }


def test_first_documents_only(lines: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = build_corpus(DataConfig(data=str(lines), max_documents=3, packing=False, seq_len=512), tokenizer)
    texts = [tokenizer.decode(row.input_ids) for row in corpus]
    assert texts == [line + EOS for line in english(150).splitlines()[:3]]
