"""The loops of decoding (`loops.Loops`) in numpy: a step over 512 lanes costs some ten calls.

In a step, only the state depends on the step before. So the loop over steps keeps the place that each symbol was read
from, a table says how the state goes on, and everything else is looked up or shifted for all symbols at once.
"""

from __future__ import annotations

import numpy as np

from cache_format.codecs.packed.loops import BITS, ENDED, LEFT, LOW, QUARTERS, RANK, TOTAL, U16, U32, Ints

_BITS, _WORD, _PLACE = np.uint32(BITS), np.uint32(16), np.uint32(TOTAL - 1)


def tables(frequencies: Ints, symbols: U16, steps: U32) -> None:
    contexts, size = frequencies.shape
    each, starts = frequencies.ravel(), (np.cumsum(frequencies, axis=1) - frequencies).ravel()
    symbols[:] = np.repeat(np.tile(np.arange(size, dtype=np.uint16), contexts), each)
    before = np.arange(len(steps)) % TOTAL - np.repeat(starts, each)
    steps[:] = np.repeat(each << BITS, each) + before


def symbols(state: U32, words: U16, at: int, contexts: Ints, symbols: U16, steps: U32, found: Ints) -> int:
    places = contexts << BITS  # in the tables of the model; the loop adds the place in the context
    for start in range(0, len(places), len(state)):
        here = places[start : start + len(state)]
        x = state[: len(here)]
        here += x & _PLACE
        step = steps[here]
        if (at := _advance(x, step >> _BITS, step & _PLACE, words, at)) == ENDED:
            return at
    found[:] = symbols[places]
    return at


def bits(state: U32, words: U16, at: int, widths: Ints, found: Ints) -> int:
    places = np.zeros(len(widths), np.uint32)
    shifts = _BITS - widths.astype(np.uint32)
    frequencies = np.uint32(1) << shifts
    starts = np.arange(0, len(widths), len(state))
    for start in starts[np.maximum.reduceat(widths, starts) > 0]:  # widths of 0 change no state
        here = slice(start, start + len(state))
        f = frequencies[here]
        x = state[: len(f)]
        place = places[here] = x & _PLACE
        if (at := _advance(x, f, place & (f - np.uint32(1)), words, at)) == ENDED:
            return at
    found[:] = places >> shifts
    return at


def numbers(state: U32, words: U16, at: int, contexts: Ints, table: U16, steps: U32, found: Ints) -> int:
    if (at := symbols(state, words, at, contexts, table, steps, found)) == ENDED:
        return at
    exponent, leading = np.divmod(np.arange(found.max(initial=0) + 1), QUARTERS)
    below = np.maximum(exponent - 2, 0)
    first = np.where(exponent >= 2, (4 | leading) << below, np.where(exponent == 1, leading, 1))
    below = below[found]
    found[:] = first[found]
    shift, low = np.zeros_like(below), np.empty_like(below)
    while below.any():
        width = np.minimum(below, BITS)
        if (at := bits(state, words, at, width, low)) == ENDED:
            return at
        found += low << shift
        shift, below = shift + width, below - width
    return at


def rank_contexts(before: Ints, left: Ints, found: Ints) -> None:
    octave = np.minimum(exponents(before + 1) + (before >= 0), RANK)  # 0: no entry before
    found[:] = octave * LEFT + np.minimum(left, LEFT) - 1


def ids(tokens: Ints, counts: Ints, ranks: Ints, starts: Ints, ranked: U32, found: U32) -> bool:
    lists, first = np.diff(starts)[tokens], starts[tokens]
    listed = ranks < np.repeat(lists, counts)
    place = ranks + np.where(listed, np.repeat(first, counts), np.repeat(starts[-1] - lists, counts))
    if place.max(initial=0) >= len(ranked) or ranks.min(initial=0) < 0:
        return False
    found[:] = ranked[place]
    return True


def exponents(values: Ints) -> Ints:
    """floor(log2(value)), from the exponent of the float64; 0 for 0."""
    found: Ints = np.maximum((values.astype(np.float64).view(np.int64) >> 52) - 1023, 0)
    return found


def _advance(x: U32, frequency: U32, before: U32, words: U16, at: int) -> int:
    """Put the next states in place of x; the next `at`. They fit: frequency ≤ 2^12 and x < 2^32."""
    x >>= _BITS
    x *= frequency
    x += before
    (empty,) = (x < LOW).nonzero()
    if at + len(empty) >= len(words):
        return ENDED
    x[empty] = x[empty] << _WORD | words[at : at + len(empty)]
    return at + len(empty)
