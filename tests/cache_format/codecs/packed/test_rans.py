"""The entropy coder: what goes in comes out, at the cost that theory says, and damage is noticed.

The reference is rANS as in the paper, one symbol and one Python integer at a time.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_format.codecs.packed.loops import BITS, LOW, TOTAL
from cache_format.codecs.packed.rans import Decoder, Encoder, Model
from packed_samples import some_model

pytestmark = pytest.mark.usefixtures("implementation")

LANES = [1, 2, 3, 8, 64]


def reference_encode(calls: list[list[tuple[int, int]]], lanes: int) -> bytes:
    """`calls` hold (start, frequency) of each symbol. The last symbol is coded first, so the words come in reverse."""
    states, reversed_words = [1 << 16] * lanes, []
    for call in reversed(calls):
        for index in reversed(range(len(call))):
            start, frequency = call[index]
            x = states[index % lanes]
            if x >= frequency << 20:  # else it would leave [2^16, 2^32)
                reversed_words.append(x % 2**16)
                x >>= 16
            states[index % lanes] = (x // frequency << 12) + x % frequency + start
    words = reversed_words[::-1]
    return b"".join([*(x.to_bytes(4, "little") for x in states), *(w.to_bytes(2, "little") for w in words)])


def reference_decode(data: bytes, lanes: int, calls: list[list[list[int]]]) -> list[list[int]]:
    """`calls` hold the row of frequencies with which each symbol is to be read."""
    states = [int.from_bytes(data[4 * lane : 4 * lane + 4], "little") for lane in range(lanes)]
    words = [int.from_bytes(data[at : at + 2], "little") for at in range(4 * lanes, len(data), 2)]
    found = []
    for call in calls:
        found.append([])
        for index, frequencies in enumerate(call):
            x = states[index % lanes]
            place, symbol, start = x % 4096, 0, 0
            while place >= start + frequencies[symbol]:
                start += frequencies[symbol]
                symbol += 1
            x = frequencies[symbol] * (x // 4096) + place - start
            if x < 2**16:
                x = x << 16 | words.pop(0)
            states[index % lanes] = x
            found[-1].append(symbol)
    assert not words and set(states) == {1 << 16}
    return found


def draw(rng: np.random.Generator, model: Model, contexts: np.ndarray) -> np.ndarray:
    """Symbols with the model's own frequencies."""
    return model.tables[0].reshape(-1, TOTAL)[contexts, rng.integers(0, TOTAL, len(contexts))].astype(np.int64)


def around(lanes: int) -> st.SearchStrategy[int]:
    """Sizes where something may be left over: none, one, and next to multiples of the lanes."""
    near = [n for turns in (1, 2, 3, 7) for n in (turns * lanes - 1, turns * lanes, turns * lanes + 1)]
    return st.sampled_from([0, 1, *near]) | st.integers(0, 300)


# -- round trips ------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(data=st.data(), lanes=st.sampled_from(LANES), seed=st.integers(0, 2**32 - 1))
def test_what_goes_in_comes_out(data, lanes, seed):
    """Any sequence of calls: symbols of several models, numbers of any width, nothing at all."""
    rng = np.random.default_rng(seed)
    encoder, calls = Encoder(lanes), []
    for _ in range(data.draw(st.integers(0, 6))):
        size = data.draw(around(lanes))
        if data.draw(st.booleans()):
            widths = rng.integers(0, BITS + 1, size)
            values = rng.integers(0, 2**widths)
            encoder.bits(values, widths)
            calls.append((None, widths, values))
        else:
            contexts, symbols = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 2, 17, 300, 4096]))
            model = some_model(rng, contexts, symbols, data.draw(st.sampled_from([0, 10, 1000])))
            where = rng.integers(0, contexts, size)
            values = draw(rng, model, where)
            encoder.symbols(values, where, model)
            calls.append((model, where, values))
    decoder = Decoder(encoder.finish(), lanes)
    for model, given_, values in calls:
        found = decoder.bits(given_) if model is None else decoder.symbols(given_, model)
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, values)
    decoder.finish()


@pytest.mark.parametrize("lanes", LANES)
def test_nothing_at_all(lanes):
    empty = np.zeros(0, np.int64)
    encoder = Encoder(lanes)
    encoder.symbols(empty, empty, Model(np.array([[2048, 2048]])))
    encoder.bits(empty, empty)
    data = encoder.finish()
    assert data == LOW.to_bytes(4, "little") * lanes
    decoder = Decoder(data, lanes)
    assert len(decoder.symbols(empty, Model(np.array([[2048, 2048]])))) == len(decoder.bits(empty)) == 0
    decoder.finish()


def test_every_width_of_every_number():
    widths = np.repeat(np.arange(BITS + 1), 2 ** np.arange(BITS + 1))
    values = np.concatenate([np.arange(2**width) for width in range(BITS + 1)])
    encoder = Encoder(4)
    encoder.bits(values, widths)
    decoder = Decoder(encoder.finish(), 4)
    np.testing.assert_array_equal(decoder.bits(widths), values)
    decoder.finish()


def test_what_is_certain_costs_nothing():
    """In all contexts: not coded. In one of them: coded, at no cost. No bits: at no cost."""
    everywhere, in_one = Model(np.array([[0, TOTAL, 0]] * 2)), Model(np.array([[0, TOTAL, 0], [2048, 0, 2048]]))
    assert everywhere.certain == 1 and in_one.certain is None
    ones, zeros = np.ones(1000, np.int64), np.zeros(1000, np.int64)
    encoder = Encoder(3)
    encoder.symbols(ones, zeros, everywhere)
    encoder.symbols(ones, zeros, in_one)
    encoder.bits(zeros, zeros)
    data = encoder.finish()
    assert data == LOW.to_bytes(4, "little") * 3
    decoder = Decoder(data, 3)
    np.testing.assert_array_equal(decoder.symbols(ones, everywhere), ones)
    np.testing.assert_array_equal(decoder.symbols(zeros, in_one), ones)
    np.testing.assert_array_equal(decoder.bits(zeros), zeros)
    decoder.finish()


# -- the bytes --------------------------------------------------------------------------------------------------------


def test_bytes_by_hand():
    """One lane, frequencies 1024 and 3072, symbols 0 1 1 0; the last is coded first, from 2^16:

    0:  65536 =  64 · 1024,          64 · 4096               = 262144
    1: 262144 =  85 · 3072 + 1024,   85 · 4096 + 1024 + 1024 = 350208
    1: 350208 = 114 · 3072,         114 · 4096        + 1024 = 467968
    0: 467968 = 457 · 1024,         457 · 4096               = 0x1c9000

    And twice the number 4095 of 12 bits, f = 1: 2^16 · 4096 + 4095 = 0x10000fff, which is not below 2^20, so its low
    half 0x0fff is the first word, and 0x1000 · 4096 + 4095 = 0x1000fff.

    And the very limit: f = 256 and start 0 make 2^16 to 2^20, which is not below 1 · 2^20. So with f = 1 and start 256
    the word 0 goes out, and 2^4 · 4096 + 256 = 0x10100 stays.
    """
    symbols = Encoder(1)
    symbols.symbols(np.array([0, 1, 1, 0]), np.zeros(4, np.int64), Model(np.array([[1024, 3072]])))
    assert symbols.finish().hex() == "00901c00"
    numbers = Encoder(1)
    numbers.bits(np.array([4095, 4095]), np.array([12, 12]))
    assert numbers.finish().hex() == "ff0f0001" + "ff0f"
    limit = Encoder(1)
    limit.symbols(np.array([1, 0]), np.zeros(2, np.int64), Model(np.array([[256, 1, 3839]])))
    assert limit.finish().hex() == "00010100" + "0000"


def test_bytes_of_two_lanes():
    """Recorded from `reference_encode`. Every call begins with lane 0, also behind one of odd length."""
    calls = [
        [(0, 1024), (1024, 3072), (1024, 3072), (0, 1024), (1024, 3072)],
        [(5 * 512, 512), (0, 4096), (4095, 1), (77 * 16, 16), (4095, 1)],
    ]
    encoder = Encoder(2)
    encoder.symbols(np.array([0, 1, 1, 0, 1]), np.zeros(5, np.int64), Model(np.array([[1024, 3072]])))
    encoder.bits(np.array([5, 0, 4095, 77, 4095]), np.array([3, 0, 12, 8, 12]))
    assert encoder.finish().hex() == "fff3e638d06c5505ff0f"
    assert reference_encode(calls, 2).hex() == "fff3e638d06c5505ff0f"


@settings(max_examples=40)
@given(lanes=st.sampled_from([1, 2, 5]), sizes=st.lists(st.integers(0, 30), max_size=4), seed=st.integers(0, 2**32 - 1))
def test_bytes_are_those_of_the_reference(lanes, sizes, seed):
    rng = np.random.default_rng(seed)
    encoder, calls, rows, expected = Encoder(lanes), [], [], []
    for size in sizes:
        model = some_model(rng, 3, 12, 3)
        contexts = rng.integers(0, 3, size)
        symbols = draw(rng, model, contexts)
        encoder.symbols(symbols, contexts, model)
        frequencies = model.frequencies.astype(int).tolist()
        known = [(sum(frequencies[c][:s]), frequencies[c][s]) for c, s in zip(contexts, symbols, strict=True)]
        calls.append(known)
        rows.append([frequencies[c] for c in contexts])
        expected.append(symbols.tolist())
    data = encoder.finish()
    assert data == reference_encode(calls, lanes)
    assert reference_decode(data, lanes, rows) == expected


# -- the cost ---------------------------------------------------------------------------------------------------------


def entropy_bits(symbols: np.ndarray, contexts: np.ndarray) -> float:
    """What no code that knows the counts in every context can beat."""
    total = 0.0
    for context in np.unique(contexts):
        counts = np.unique(symbols[contexts == context], return_counts=True)[1]
        total -= (counts * np.log2(counts / counts.sum())).sum()
    return total


DISTRIBUTIONS = {
    "one bit": np.ones(2),
    "flat": np.ones(100),
    "two of three": np.array([0.9, 0.09, 0.01]),
    "nearly certain": np.array([0.995, 0.005]),
    "geometric, steep": 0.5 ** np.arange(10),
    "geometric, flat": 0.95 ** np.arange(64),
    "Zipf": 1 / np.arange(1, 256),
}


@pytest.mark.long
@pytest.mark.parametrize("lanes", [4, 512])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_cost_is_the_entropy_within_a_percent(name, lanes):
    """Besides the states, four bytes for each lane."""
    rng, n = np.random.default_rng(0), 40_000
    contexts = rng.integers(0, 3, n)
    shares = [np.roll(DISTRIBUTIONS[name], context) for context in range(3)]
    shares = [each / each.sum() for each in shares]
    symbols = np.stack([rng.choice(len(each), n, p=each) for each in shares])[contexts, np.arange(n)]
    encoder = Encoder(lanes)
    encoder.symbols(symbols, contexts, Model.of(symbols, contexts, 3, len(shares[0])))
    least = entropy_bits(symbols, contexts)
    assert least - 1 <= 8 * len(encoder.finish()) <= 1.01 * least + 32 * lanes


def test_cost_of_a_given_model():
    """12 - log2 f bits for each symbol, to within a thousandth."""
    rng = np.random.default_rng(0)
    model = some_model(rng, 4, 40, 2)
    contexts = rng.integers(0, 4, 20_000)
    symbols = draw(rng, model, contexts)
    encoder = Encoder(1)
    encoder.symbols(symbols, contexts, model)
    expected = (BITS - np.log2(model.frequencies[contexts, symbols])).sum()
    assert 8 * len(encoder.finish()) == pytest.approx(expected, rel=1e-3)


def test_cost_of_plain_bits():
    rng = np.random.default_rng(0)
    widths = rng.integers(0, BITS + 1, 20_000)
    encoder = Encoder(1)
    encoder.bits(rng.integers(0, 2**widths), widths)
    assert 8 * len(encoder.finish()) == pytest.approx(widths.sum(), rel=1e-3)


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frequencies",
    [
        [[2048, 2047]],
        [[2048, 2049]],
        [[4096, 0], [0, 0]],
        [[5000, -904]],
        [[0]],
        [4096],
        [[[4096]]],
    ],
)
def test_models_that_do_not_add_up_are_refused(frequencies):
    with pytest.raises(ValueError, match="do not add up to 4096 in every context"):
        Model(np.array(frequencies))


def test_sums_of_narrow_integers_do_not_wrap():
    """As they come from a file: 16 · 4096 + 4096 is 4096 in 16 bits."""
    with pytest.raises(ValueError, match="do not add up"):
        Model(np.full((1, 17), 4096, np.uint16))
    assert Model(np.full((1, 16), 256, np.uint16)).certain is None


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(0, 3000), symbols=st.sampled_from([1, 2, 60, 1000]))
def test_every_symbol_that_occurs_has_a_place(seed, size, symbols):
    rng = np.random.default_rng(seed)
    contexts = rng.integers(0, 4, size)  # of five: one does not occur
    found = np.minimum(rng.geometric(rng.uniform(0.002, 1), size) - 1, symbols - 1)
    model = Model.of(found, contexts, 5, symbols)
    assert model.frequencies.shape == (5, symbols)
    assert (model.frequencies.sum(axis=1) == TOTAL).all()
    assert (model.frequencies[contexts, found] > 0).all()
    for context in np.unique(contexts):  # and no other has one
        assert set(np.flatnonzero(model.frequencies[context])) == set(found[contexts == context])
    encoder = Encoder(4)
    encoder.symbols(found, contexts, model)
    decoder = Decoder(encoder.finish(), 4)
    np.testing.assert_array_equal(decoder.symbols(contexts, model), found)
    decoder.finish()


def test_contexts_that_do_not_occur_do_not_spoil_certainty():
    contexts = np.array([2, 2, 0])
    assert Model.of(np.array([3, 3, 3]), contexts, 4, 5).certain == 3
    assert Model.of(np.array([3, 3, 1]), contexts, 4, 5).certain is None
    assert Model.of(contexts[:0], contexts[:0], 4, 5).certain == 0


def test_frequencies_are_coarse_but_for_what_makes_up_the_difference():
    """Four leading bits: what the table of a record batch is compressed from."""
    rng = np.random.default_rng(0)
    symbols = rng.choice(100, 50_000, p=rng.dirichlet(np.ones(100)))
    frequencies = Model.of(symbols, np.zeros(50_000, np.int64), 1, 100).frequencies[0].tolist()
    fine = [f for f in frequencies if f and f % 2 ** max(0, f.bit_length() - 4)]
    assert len(fine) <= 1


def test_more_symbols_than_places_are_refused():
    many = np.arange(TOTAL + 1)
    with pytest.raises(ValueError, match="do not add up"):
        Model.of(many, np.zeros(len(many), np.int64), 1, len(many))
    assert (Model.of(many[:-1], np.zeros(TOTAL, np.int64), 1, TOTAL).frequencies == 1).all()


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 8])
def coded(request, implementation):
    """Lanes, the bytes, and what reads them."""
    lanes, rng = request.param, np.random.default_rng(request.param)
    model = some_model(rng, 3, 20, 2)
    contexts, widths = rng.integers(0, 3, 300), rng.integers(0, BITS + 1, 101)
    encoder = Encoder(lanes)
    encoder.symbols(draw(rng, model, contexts), contexts, model)
    encoder.bits(rng.integers(0, 2**widths), widths)

    def read(data: bytes) -> tuple[np.ndarray, np.ndarray]:
        decoder = Decoder(data, lanes)
        symbols, numbers = decoder.symbols(contexts, model), decoder.bits(widths)
        assert ((0 <= symbols) & (symbols < 20)).all() and ((0 <= numbers) & (numbers < 2**widths)).all()
        decoder.finish()
        return symbols, numbers

    data = encoder.finish()
    read(data)
    return lanes, data, read


def test_cut_short_anywhere(coded):
    _, data, read = coded
    for length in range(len(data)):
        with pytest.raises(ValueError, match="cut short"):
            read(data[:length])


def test_more_than_was_written(coded):
    _, data, read = coded
    with pytest.raises(ValueError, match="do not end where they should"):
        read(data + b"\0\0")
    with pytest.raises(ValueError, match="cut short"):
        read(data + b"\0")


def test_less_read_than_was_written(coded):
    lanes, data, _ = coded
    decoder = Decoder(data, lanes)
    decoder.bits(np.array([3]))
    with pytest.raises(ValueError, match="do not end"):
        decoder.finish()


@pytest.mark.long
def test_random_damage_gives_symbols_or_an_error(coded):
    """It may pass: another number of as many bits leaves the same state behind. What comes out is within bounds."""
    _, data, read = coded
    rng, refused = np.random.default_rng(0), 0
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        try:
            read(bytes(damaged))
        except ValueError as error:
            assert "packed targets" in str(error)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("fill", [0x00, 0xFF])
def test_states_that_no_encoder_leaves(coded, fill):
    """Below 2^16 and next to 2^32: read like any other, and refused in the end."""
    lanes, data, read = coded
    with pytest.raises(ValueError):
        read(bytes([fill]) * (4 * lanes) + data[4 * lanes :])
    with pytest.raises(ValueError):
        read(bytes([fill]) * len(data))
