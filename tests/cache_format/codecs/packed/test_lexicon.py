"""Ranks and tokens are each other's inverse, whatever was learned, and a damaged lexicon says so."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import cache_format as cf
from cache_format.codecs.packed.lexicon import Lexicon
from cache_format.codecs.packed.loops import HIGHEST
from packed_samples import empty_lexicon

pytestmark = pytest.mark.usefixtures("implementation")


@pytest.fixture(scope="module")
def lexicon():
    """Of 40 tokens, some of which have no candidates and some of which never occurred."""
    rng = np.random.default_rng(0)
    contexts = rng.integers(0, 20, 3000)
    return Lexicon.learn(contexts, (contexts + rng.geometric(0.2, 3000)) % 30, 40, 10.0)


def test_every_token_has_a_rank_after_every_token(lexicon):
    for context in range(40):
        contexts, tokens = np.full(40, context), np.arange(40)
        ranks = lexicon.ranks(contexts, tokens)
        assert len(set(ranks.tolist())) == 40 and ranks.min() >= 0
        assert ranks.max() < 40 + np.diff(lexicon.starts)[context]
        np.testing.assert_array_equal(lexicon.ids(contexts, ranks.astype(np.int32), np.ones_like(ranks)), tokens)


def test_every_rank_stands_for_a_token_or_for_nothing(lexicon):
    lists = np.diff(lexicon.starts)
    assert lists.min() == 0 < lists.max()
    for context in range(40):
        known = np.arange(40 + lists[context], dtype=np.int32)
        tokens = lexicon.ids(np.array([context]), known, np.array([len(known)]))
        mine = lexicon.candidates[lexicon.starts[context] : lexicon.starts[context + 1]]
        np.testing.assert_array_equal(tokens, np.concatenate([mine, lexicon.order]))
        for beyond in (len(known), len(known) + 1, HIGHEST, -1):
            with pytest.raises(ValueError, match="a rank that no token has"):
                lexicon.ids(np.array([context]), np.array([beyond], np.int32), np.array([1]))


def test_likely_tokens_come_first():
    """After 1: 7 four times, 3 twice, 5 once, which is not worth a place in the table. In all: 7, then 3, then 5."""
    contexts, ids = np.array([1] * 7 + [2]), np.array([7, 7, 7, 7, 3, 3, 5, 5])
    found = Lexicon.learn(contexts, ids, 8, weight=100.0)
    assert found.candidates.tolist() == [7, 3]
    assert found.starts.tolist() == [0, 0] + [2] * 7
    assert found.order.tolist() == [7, 3, 5, 0, 1, 2, 4, 6]
    assert found.ranks(np.array([1, 1, 1, 2]), np.array([7, 3, 5, 7])).tolist() == [0, 1, 4, 0]


def test_rare_pairs_are_kept_only_where_they_will_recur():
    contexts, ids = np.repeat(np.arange(10), 3), np.repeat(np.arange(10), 3)
    assert len(Lexicon.learn(contexts, ids, 10, weight=100.0).candidates) == 10
    assert len(Lexicon.learn(contexts, ids, 10, weight=0.5).candidates) == 0


def test_a_token_has_at_most_256_candidates():
    contexts, ids = np.zeros(1800, np.int64), np.repeat(np.arange(600), 3)
    found = Lexicon.learn(contexts, ids, 600, weight=100.0)
    assert np.diff(found.starts).tolist() == [256] + [0] * 599
    every = np.arange(600)
    np.testing.assert_array_equal(
        found.ids(contexts[:600], found.ranks(contexts[:600], every).astype(np.int32), np.ones_like(every)), every
    )


@pytest.mark.parametrize("vocab", [2, 40, 2**16, 2**16 + 1])
def test_a_lexicon_comes_back(vocab):
    rng = np.random.default_rng(0)
    contexts, ids = rng.integers(0, min(vocab, 50), 2000), rng.integers(0, min(vocab, 50), 2000)
    for made in (Lexicon.learn(contexts, ids, vocab, 10.0), empty_lexicon(vocab)):
        data = made.to_bytes()
        found = Lexicon.from_bytes(data, vocab, "here")
        for name in ("order", "starts", "candidates"):
            a, b = getattr(found, name), getattr(made, name)
            assert a.dtype == np.int64
            np.testing.assert_array_equal(a, b, name)
        assert found.to_bytes() == data and found.vocab_size == vocab


def lexicon_file(order: Any, counts: Any, candidates: Any, kind: pa.DataType | None = None, rows: int = 1) -> bytes:
    columns = {"order": order, "candidate_counts": counts, "candidates": candidates}
    kind = pa.uint16() if kind is None else kind
    return arrow_file(pa.table({name: pa.array([values] * rows, pa.list_(kind)) for name, values in columns.items()}))


def arrow_file(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    return sink.getvalue().to_pybytes()


LIES = {
    "nothing": (b"", "not a lexicon"),
    "text": (b"order,candidates\n", "not a lexicon"),
    "no record batch": (arrow_file(pa.table({"order": pa.array([], pa.uint16())})), "not a lexicon"),
    "a row too many": (lexicon_file([1], [0, 0, 0], [], rows=2), "a lexicon of another vocabulary, expected 3"),
    "null": (lexicon_file(None, None, None), "a lexicon of another vocabulary"),
    "too few tokens": (lexicon_file([1], [0, 0], []), "a lexicon of another vocabulary, expected 3"),
    "too many tokens": (lexicon_file([1], [0, 0, 0, 0], []), "a lexicon of another vocabulary"),
    "a token twice": (lexicon_file([1, 0, 1], [0, 0, 0], []), "a lexicon of another vocabulary"),
    "a token outside": (lexicon_file([1, 3], [0, 0, 0], []), "a lexicon of another vocabulary"),
    "a negative token": (lexicon_file([1, -1], [0, 0, 0], [], pa.int64()), "a lexicon of another vocabulary"),
    "a candidate outside": (lexicon_file([1], [0, 1, 0], [3]), "a lexicon of another vocabulary"),
    "a negative candidate": (lexicon_file([1], [0, 1, 0], [-1], pa.int64()), "a lexicon of another vocabulary"),
    "too few candidates": (lexicon_file([1], [0, 2, 0], [2]), "found 1 candidates, its counts add up to 2"),
    "too many candidates": (lexicon_file([1], [0, 2, 0], [0, 1, 2]), "found 3 candidates, its counts add up to 2"),
    "a negative count": (lexicon_file([1], [-1, 2, 0], [2], pa.int64()), "found 1 candidates, its counts add up"),
    "no token": (lexicon_file([1, None], [0, 0, 0], []), "not a lexicon"),
    "text for tokens": (lexicon_file(["a", "b"], ["0"] * 3, [], pa.string()), "not a lexicon"),
    "columns without lists": (
        arrow_file(pa.table({name: [0, 1, 2] for name in ("order", "candidate_counts", "candidates")})),
        "not a lexicon",
    ),
    "a column missing": (arrow_file(pa.table({"order": [[0]], "candidates": [[1]]})), "not a lexicon"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lexicon_that_says_something_else(name):
    data, expected = LIES[name]
    with pytest.raises(cf.FormatError, match=expected) as caught:
        Lexicon.from_bytes(data, 3, "caches/x/lexicon.arrow")
    message = str(caught.value)
    assert message.startswith("caches/x/lexicon.arrow: ") and "\n" not in message and message.endswith("copy.")


def test_tokens_that_nobody_named_stand_behind_the_others():
    """Ascending, and not in the file."""
    found = Lexicon.from_bytes(lexicon_file([4, 1], [0, 2, 0, 0, 0, 0], [5, 0]), 6, "here")
    assert found.order.tolist() == [4, 1, 0, 2, 3, 5]
    assert found.starts.tolist() == [0, 0, 2, 2, 2, 2, 2] and found.candidates.tolist() == [5, 0]
    learned = Lexicon.learn(np.zeros(3, np.int64), np.array([4, 4, 1]), 50_000, 1.0)
    assert learned.order[:4].tolist() == [4, 1, 0, 2]
    assert pa.ipc.open_file(learned.to_bytes()).get_batch(0)["order"].to_pylist() == [[4, 1, 0]]
    assert pa.ipc.open_file(empty_lexicon(50_000).to_bytes()).get_batch(0)["order"].to_pylist() == [[]]


def test_a_vocabulary_that_a_manifest_only_claims_is_not_allocated(lexicon):
    tracemalloc.start()
    try:
        with pytest.raises(cf.FormatError, match="expected 20,000,000 tokens"):
            Lexicon.from_bytes(lexicon.to_bytes(), 20_000_000, "here")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_damaged_lexicon_is_a_lexicon_or_an_error(lexicon):
    """And what is taken for one has a rank for every token."""
    data, rng, outcomes = lexicon.to_bytes(), np.random.default_rng(0), set()
    plain = lexicon_file(lexicon.order, np.diff(lexicon.starts), lexicon.candidates)
    contexts, tokens = np.repeat(np.arange(40), 40), np.tile(np.arange(40), 40)
    damaged = [data[:length] for length in range(0, len(data), 3)]
    for good in (data, plain):
        for _ in range(300):
            changed = bytearray(good)
            changed[rng.integers(len(good))] = rng.integers(256)
            damaged.append(bytes(changed))
    for each in damaged:
        try:
            found = Lexicon.from_bytes(each, 40, "here")
        except cf.FormatError:
            outcomes.add("error")
        else:
            np.testing.assert_array_equal(
                found.ids(contexts, found.ranks(contexts, tokens).astype(np.int32), np.ones_like(tokens)), tokens
            )
            outcomes.add("lexicon")
    assert outcomes == {"error", "lexicon"}
