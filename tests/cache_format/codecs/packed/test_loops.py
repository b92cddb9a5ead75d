"""Both implementations of the loops give the same arrays, for any bytes; which one is used; threads and forks."""

from __future__ import annotations

import multiprocessing
import sys
import threading
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_format.codecs.packed import block, numpy_loops
from cache_format.codecs.packed import loops as seam
from cache_format.codecs.packed.loops import BITS, ENDED, LEFT, LOW, RANK
from cache_format.rows.row_batch import concatenate
from packed_samples import KINDS, assert_same_batch, lexicon_of, metadata_of, row_of, some_model, through, use_loops

numba = pytest.importorskip("numba")
from cache_format.codecs.packed import numba_loops  # noqa: E402

SEEDS = st.integers(0, 2**32 - 1)


def stream(rng: np.random.Generator, lanes: int, words: int) -> tuple[np.ndarray, np.ndarray]:
    """Any states and words: bytes that no encoder wrote. The last word is never read."""
    state = rng.integers(LOW, 2**32, lanes, dtype=np.uint32)
    return state, rng.integers(0, 2**16, words + 1, dtype=np.uint16)


def some_counts(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw the number of entries of each position; they add up to `size`."""
    ends = np.sort(rng.integers(0, size + 1, rng.integers(0, 40)))
    return np.diff(np.concatenate([[0], ends, [size]]))


@settings(max_examples=60)
@given(
    seed=SEEDS,
    lanes=st.sampled_from([1, 2, 7, 64]),
    size=st.integers(0, 300),
    words=st.sampled_from([0, 1, 20, 400, 900]),
    width=st.sampled_from([1, 60, 104]),
)
def test_reading_gives_the_same_or_ends_for_both(seed: int, lanes: int, size: int, words: int, width: int):
    rng = np.random.default_rng(seed)
    frequencies = some_model(rng, (1 + RANK) * LEFT, width, 3).frequencies
    contexts, widths = rng.integers(0, len(frequencies), size), rng.integers(0, BITS + 1, size)
    counts, before = some_counts(rng, size), rng.integers(-1, 2 ** rng.integers(1, 31, size)).astype(np.int32)
    state, data = stream(rng, lanes, words)
    for what, first, kind in (
        ("symbols", [contexts], np.int64),
        ("bits", [widths], np.int64),
        ("ranks", [counts], np.int32),
        ("codes", [counts, before], np.uint8),
    ):
        outcomes = []
        for implementation in (numpy_loops, numba_loops):
            tables = () if what == "bits" else [implementation.tables(frequencies)]
            states, found = state.copy(), np.full(size, 101, kind)  # memory that was something else before
            at = getattr(implementation, what)(states, data, 0, *first, *tables, found)
            outcomes.append((at, at == ENDED or (states.tolist(), found.tolist())))
        assert outcomes[0] == outcomes[1], what


@settings(max_examples=60)
@given(seed=SEEDS, lanes=st.sampled_from([1, 2, 7, 64]), size=st.integers(0, 300), width=st.sampled_from([1, 60, 104]))
def test_writing_gives_the_same_for_both(seed: int, lanes: int, size: int, width: int):
    rng = np.random.default_rng(seed)
    model = some_model(rng, 5, width, 3)
    places = rng.integers(0, 5, size), rng.integers(0, width, size)
    frequencies, starts = model.frequencies[places], model.starts[places]
    outcomes = []
    for implementation in (numpy_loops, numba_loops):
        state, words = np.full(lanes, LOW, np.uint32), np.full(size + 3, 101, np.uint16)
        at = implementation.write(state, words, size + 1, frequencies, starts)
        outcomes.append((at, state.tolist(), words.tolist()))
        assert 1 <= at <= size + 1 and (words[:at] == 101).all() and (words[size + 1 :] == 101).all()
        found = np.empty(size, np.int64)
        tables = implementation.tables(model.frequencies)
        assert implementation.symbols(state, words, at, places[0], tables, found) == size + 1
        assert found.tolist() == places[1].tolist() and (state == LOW).all()
    assert outcomes[0] == outcomes[1]


@settings(max_examples=40)
@given(seed=SEEDS, groups=st.integers(1, 4), longest=st.sampled_from([1, 3, 9, 70]))
def test_the_rest_is_the_same_for_both(seed: int, groups: int, longest: int):
    rng = np.random.default_rng(seed)
    frequencies = some_model(rng, 4, int(rng.integers(1, 300)), 3).frequencies
    counts = rng.integers(0, longest, (groups, 9))
    each, lists = counts.ravel(), rng.integers(0, 5, 8)
    ranks = rng.integers(-1 if seed % 5 == 0 else 0, 9, int(each.sum())).astype(np.int32)
    codes, shares = rng.integers(0, 256, len(ranks)).astype(np.uint8), rng.integers(0, 2**30, 256)
    starts = np.concatenate([[0], np.cumsum(lists)])
    ranked = rng.integers(0, 8, int(lists.sum()) + 8).astype(np.uint32)
    keys = rng.integers(0, 2**32, len(ranks), dtype=np.uint32)
    outcomes = []
    for implementation in (numpy_loops, numba_loops):
        symbols, _ = implementation.tables(frequencies)
        ids = np.zeros(len(ranks), np.uint32)
        known = implementation.ids(np.arange(len(each)) % 8, each, ranks, starts, ranked, ids)
        sums, arranged = implementation.sums(each, codes, shares), implementation.arranged(keys, counts)
        found = [symbols.tolist(), known, known and ids.tolist(), sums.tolist(), arranged.tolist()]
        assert arranged.dtype == np.uint32 and symbols.dtype == np.uint16
        outcomes.append(found)
    assert outcomes[0] == outcomes[1]


def test_keys_are_arranged_by_position_group_and_key():
    keys = np.array([5, 4, 2**32 - 1, 9, 1, 7, 0], np.uint32)
    counts = np.array([[2, 0, 2], [1, 2, 0]])  # exact: [5 4] [] [max 9]; a sample: [1] [7 0] []
    for implementation in (numpy_loops, numba_loops):
        assert implementation.arranged(keys, counts).tolist() == [4, 5, 1, 0, 7, 9, 2**32 - 1]


def test_compiled_code_reads_nothing_outside_of_its_arrays():
    """Indices that only a fault of this package could pass: numpy refuses most of them, and compiled code would not
    notice."""
    rng, one = np.random.default_rng(0), np.ones(1, np.int64)
    model, every = some_model(rng, 3, 5, 1), some_model(rng, (1 + RANK) * LEFT, 5, 1).frequencies
    wide = some_model(rng, (1 + RANK) * LEFT, 200, 1).frequencies
    state, words = stream(rng, 1, 5)
    few, enough, many = (numba_loops.tables(each) for each in (model.frequencies, every, wide))
    ranks, keys = np.zeros(1, np.int32), np.empty(1, np.uint32)
    for context in (-1, 3, 2**50):
        with pytest.raises(IndexError):
            numba_loops.symbols(state, words, 0, np.array([context]), few, np.empty(1, np.int64))
    for tables in (few, many):
        with pytest.raises(IndexError):
            numba_loops.ranks(state, words, 0, one, tables, ranks.copy())
    with pytest.raises(IndexError):
        numba_loops.codes(state, words, 0, one, ranks, few, np.empty(1, np.uint8))
    for at, frequencies, starts in ((0, one, one), (7, one, one), (-1, one, one), (3, one, np.ones(2, np.int64))):
        with pytest.raises(IndexError):
            numba_loops.write(state, words, at, frequencies, starts)
    codes, shares = np.array([4], np.uint8), np.zeros(4, np.int64)
    with pytest.raises(IndexError):
        numba_loops.sums(one, codes, shares)
    for token in (-1, 3):
        with pytest.raises(IndexError):
            numba_loops.ids(np.array([token]), one, ranks, np.zeros(4, np.int64), np.arange(3, dtype=np.uint32), keys)
    for counts in ([2], [-1, 2], [0], [2**62, -(2**62), 1], []):
        wrong = np.array(counts, np.int64)
        for call in (
            lambda wrong: numba_loops.ranks(state, words, 0, wrong, enough, ranks.copy()),
            lambda wrong: numba_loops.codes(state, words, 0, wrong, ranks, enough, np.empty(1, np.uint8)),
            lambda wrong: numba_loops.sums(wrong, codes, np.zeros(9, np.int64)),
            lambda wrong: numba_loops.ids(
                np.zeros_like(wrong), wrong, ranks, np.zeros(4, np.int64), np.arange(3, dtype=np.uint32), keys
            ),
            lambda wrong: numba_loops.arranged(keys, wrong[None]),
        ):
            with pytest.raises(IndexError):
                call(wrong)


def test_damaged_blocks_have_the_same_outcome(monkeypatch: pytest.MonkeyPatch):
    """Rows or an error, and then the same rows and the same error."""
    rng, metadata = np.random.default_rng(0), metadata_of(KINDS["threshold, three samples"], encoding="packed")
    rows = [row_of(metadata, row, tokens=5) for row in range(2)]
    batch, lexicon = concatenate(rows), lexicon_of(rows * 2, metadata.vocab_size, 100.0)
    data = bytearray(block.pack(batch, metadata, lexicon))
    outcomes = []
    for _ in range(60):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
        both = []
        for implementation in (numpy_loops, numba_loops):
            use_loops(monkeypatch, implementation)
            tokens = batch.input_ids.astype(np.int64)
            try:
                found = block.unpack(memoryview(damaged), tokens, batch.loss_mask, metadata, lexicon, batch.num_entries)
                both.append({name: values.tolist() for name, values in found.items()})
            except ValueError as error:
                both.append(str(error))
        assert both[0] == both[1]
        outcomes.append(both[0])
    assert len({each for each in outcomes if isinstance(each, str)}) > 2


# -- which one --------------------------------------------------------------------------------------------------------


def test_compiled_loops_are_used_where_numba_is(monkeypatch: pytest.MonkeyPatch):
    chosen = seam.loops.__wrapped__
    assert chosen() is numba_loops
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert chosen() is numpy_loops


def test_numpy_is_used_without_numba(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert seam.loops.__wrapped__() is numpy_loops


def test_a_numba_that_does_not_fit_is_reported(monkeypatch: pytest.MonkeyPatch):
    class Unfit:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "numba":
                raise ImportError("Numba needs NumPy 2.0 or less. Got NumPy 2.4.")

    monkeypatch.delitem(sys.modules, "numba")
    monkeypatch.setattr(sys, "meta_path", [Unfit(), *sys.meta_path])
    with pytest.warns(UserWarning, match="decoded more slowly: Numba needs NumPy 2.0"):
        assert seam.loops.__wrapped__() is numpy_loops


def test_code_is_compiled_even_if_it_cannot_be_stored(monkeypatch: pytest.MonkeyPatch):
    """A read-only installation of a user without a writable home: numba finds no place for its cache."""
    from numba.core import caching

    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(numba.int64(numba.int64), cache=True)(successor)
    assert numba_loops._compiled("int64", "int64")(successor)(4) == 5


def successor(value: int) -> int:
    return value + 1


# -- threads and forks ------------------------------------------------------------------------------------------------


def test_threads_and_a_process_forked_meanwhile_decode_the_same():
    """As a data loader: the training process decodes ahead in a thread while workers are forked."""
    metadata = metadata_of(KINDS["threshold, three samples"])
    rows = [row_of(metadata, row, tokens=50) for row in range(3)]
    batch, lexicon = concatenate(rows), lexicon_of(rows, metadata.vocab_size)
    expected, stop, faults = through(batch, metadata, lexicon), threading.Event(), []

    def decode_on() -> None:
        while not stop.is_set():
            try:
                assert_same_batch(through(batch, metadata, lexicon), expected)
            except BaseException as error:
                faults.append(error)
                raise

    def in_the_child() -> None:
        assert_same_batch(through(batch, metadata, lexicon), expected)

    threads = [threading.Thread(target=decode_on) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, from Python 3.12 on
            child = multiprocessing.get_context("fork").Process(target=in_the_child)
            child.start()
        child.join(60)
        assert child.exitcode == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not faults
