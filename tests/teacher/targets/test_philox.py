"""The counter-based generator: its published test vectors, and what a draw depends on."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.teacher.targets.philox import philox, uniforms

# kat_vectors of Random123 (https://github.com/DEShawResearch/random123/blob/main/tests/kat_vectors), philox4x32 10:
# counter, key, result.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], np.uint64)


@pytest.mark.parametrize("counter, key, expected", VECTORS)
def test_published_vectors(counter: str, key: str, expected: str) -> None:
    assert np.array_equal(philox(words(counter), words(key)), words(expected))


def test_many_counters_at_once_are_each_alone() -> None:
    counters = np.array([words(counter) for counter, _, _ in VECTORS])[None].repeat(5, axis=0)  # [5, 3, 4]
    key = words(VECTORS[2][1])
    found = philox(counters, key)
    assert found.shape == (5, 3, 4) and found.max() < 2**32
    assert np.array_equal(found[3, 2], words(VECTORS[2][2]))
    assert np.array_equal(found[4, 1], philox(words(VECTORS[1][0]), key))


def test_numbers_are_the_bits_of_the_block_that_seed_row_and_position_name() -> None:
    # Counter: block, position, low and high word of the row; key: low and high word of the seed. Two words: 53 bits.
    seed, row, position = 0x0123456789ABCDEF, 0xFEDCBA9876543210, 77
    expected = []
    for block in range(3):
        w = [int(x) for x in philox(words(f"{block:x} {position:x} 76543210 fedcba98"), words("89abcdef 01234567"))]
        expected += [((w[0] << 32) + w[1] >> 11) / 2**53, ((w[2] << 32) + w[3] >> 11) / 2**53]
    found = uniforms(seed, np.array([row], np.uint64), np.array([position]), 6)
    assert found.dtype == np.float64 and found.tolist() == [expected]


@pytest.mark.parametrize("draws", [0, 1, 2, 3, 50, 51])
def test_a_draw_does_not_depend_on_how_many_are_asked_for(draws: int) -> None:
    rows, positions = np.array([0, 5, 2**40]), np.array([3, 0, 1])
    found = uniforms(9, rows, positions, draws)
    assert found.shape == (3, draws)
    assert np.array_equal(found, uniforms(9, rows, positions, 64)[:, :draws])


def test_nor_on_what_else_is_asked_for() -> None:
    rows, positions = np.arange(20).repeat(10), np.tile(np.arange(10), 20)
    everything = uniforms(1, rows, positions, 5)
    order = np.random.default_rng(0).permutation(200)[:77]
    assert np.array_equal(uniforms(1, rows[order], positions[order], 5), everything[order])
    assert np.array_equal(uniforms(1, rows[8:9], positions[8:9], 5)[0], everything[8])
    assert uniforms(1, rows[:0], positions[:0], 5).shape == (0, 5)


def test_every_bit_of_seed_row_and_position_counts() -> None:
    places = [(0, 0, 0)]
    places += [(1 << bit, 0, 0) for bit in range(64)]
    places += [(0, 1 << bit, 0) for bit in range(64)]
    places += [(0, 0, 1 << bit) for bit in range(31)]
    found = [uniforms(s, np.array([r], np.uint64), np.array([p]), 2)[0] for s, r, p in places]
    assert len(np.unique(found)) == 2 * len(places)


def test_seed_row_and_position_are_not_added_up() -> None:
    """A place is not another one's under the next seed, nor row r's position t row t's position r."""
    places = np.array([(s, r, p) for s in range(6) for r in range(6) for p in range(6)])
    found = np.array([uniforms(int(s), np.array([r]), np.array([p]), 4)[0] for s, r, p in places])
    assert len(np.unique(found)) == found.size


def test_uniform_and_independent() -> None:
    """200,000 numbers in [0, 1): bins, bits and neighbours.

    Each bound is Hoeffding's for a false alarm below 1e-9 (numbers in [0, 1], log(2e9) = 21.4): some 100 of them.
    """
    found = uniforms(2024, np.arange(500).repeat(40), np.tile(np.arange(40), 500), 10)
    assert (found >= 0).all() and (found < 1).all()
    assert len(np.unique(found)) == found.size
    flat = found.ravel()

    def bound(count: int) -> float:
        return float(np.sqrt(21.4 / (2 * count)))

    shares = np.bincount((flat * 16).astype(int), minlength=16) / len(flat)
    assert np.abs(shares - 1 / 16).max() < bound(len(flat))
    bits = (flat * 2.0**53).astype(np.uint64)
    for bit in range(53):
        assert abs(((bits >> np.uint64(bit)) & np.uint64(1)).mean() - 0.5) < bound(len(flat))
    # Products of independent neighbours (draw, position, row) have mean 1/4; those that share a number, half the count.
    cube = found.reshape(500, 40, 10)
    for axis in range(3):
        a, b = np.moveaxis(cube, axis, 0)[:-1], np.moveaxis(cube, axis, 0)[1:]
        assert abs((a[::2] * b[::2]).mean() - 0.25) < bound(a[::2].size)
