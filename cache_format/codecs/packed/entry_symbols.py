"""How a group of entries becomes symbols: the turns in which ranks are coded, and the contexts of ranks and codes.

What writing, measuring and `numpy_loops` share; `numba_loops` computes the same on the way. SPEC.md §4, "A group".

Shapes: N positions, n of them with an entry at a turn, E entries, position by position.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cache_format.codecs.packed.loops import I32, LEFT, QUARTERS, RANK, Ints
from cache_format.rows.types import joint_index


def turns(counts: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Yield, turn by turn, [n] places among the E entries and [n] numbers of entries left there, itself included."""
    here = np.flatnonzero(counts)
    place, left = (np.cumsum(counts) - counts)[here], counts[here]
    while len(place):
        yield place, left
        more = left > 1
        place, left = place[more] + 1, left[more] - 1


def before_and_left(counts: Ints, ranks: I32) -> tuple[Ints, Ints]:
    """([E] the rank before each, -1 before the first of a position, [E] number of entries from each to the last)."""
    before = np.concatenate([[-1], ranks[:-1].astype(np.int64)])[: len(ranks)]
    ends = np.cumsum(counts)
    before[(ends - counts)[counts > 0]] = -1
    return before, np.repeat(ends, counts) - np.arange(len(ranks))


def rank_contexts(before: Ints, left: Ints) -> Ints:
    """LEFT · min(⌊log2(before + 1)⌋ + 1, RANK) + min(left, LEFT) - 1, the first of which is 0 for `before` = -1."""
    octave = np.minimum(exponents(before + 1) + (before >= 0), RANK)
    return joint_index(octave, np.minimum(left, LEFT) - 1, LEFT)


def code_contexts(counts: Ints, ranks: I32) -> Ints:
    """[E] the context that a rank behind each would have, less the classes for no entry before."""
    return rank_contexts(np.maximum(ranks, 0).astype(np.int64), np.repeat(counts, counts)) - LEFT


def buckets(values: Ints) -> tuple[Ints, Ints]:
    """Bucket of each number (exponent and the next two bits), and how many bits are below."""
    exponent = exponents(values)
    below = np.maximum(exponent - 2, 0)
    return joint_index(exponent, values >> below & 3, QUARTERS), below


def exponents(values: Ints) -> Ints:
    """floor(log2(value)), from the exponent of the float64; 0 for 0."""
    found: Ints = np.maximum((values.astype(np.float64).view(np.int64) >> 52) - 1023, 0)
    return found
