"""The loops of packed targets (`loops.Loops`) in numpy: a step over 512 lanes costs some ten calls.

In a step, only the state depends on the step before. So the loop over steps keeps the place that each symbol was read
from, a table says how the state goes on, and everything else is looked up or shifted for all symbols at once.
"""

from __future__ import annotations

import numpy as np

from cache_format.codecs.packed.entry_symbols import code_contexts, rank_contexts, turns
from cache_format.codecs.packed.loops import (
    BITS,
    ENDED,
    HIGHEST,
    I32,
    LOW,
    QUARTERS,
    TOTAL,
    U8,
    U16,
    U32,
    Ints,
    Tables,
)

_BITS, _WORD, _PLACE = np.uint32(BITS), np.uint32(16), np.uint32(TOTAL - 1)


def tables(frequencies: Ints) -> Tables:
    contexts, size = frequencies.shape
    each, starts = frequencies.ravel(), (np.cumsum(frequencies, axis=1) - frequencies).ravel()
    symbols = np.repeat(np.tile(np.arange(size, dtype=np.uint16), contexts), each)
    before = np.arange(len(symbols)) % TOTAL - np.repeat(starts, each)  # earlier places with this symbol
    return symbols, (np.repeat(each << BITS, each) + before).astype(np.uint32)


def symbols(state: U32, words: U16, at: int, contexts: Ints, tables: Tables, found: Ints) -> int:
    symbols, steps = tables
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


def ranks(state: U32, words: U16, at: int, counts: Ints, tables: Tables, found: I32) -> int:
    before = np.full(np.count_nonzero(counts), -1)
    for place, left in turns(counts):
        distance = np.empty(len(place), np.int64)
        at = _numbers(state, words, at, rank_contexts(before, left), tables, distance)
        if at == ENDED:
            break
        found[place] = np.minimum(before + distance, HIGHEST)
        before = found[place[left > 1]].astype(np.int64)
    return at


def codes(state: U32, words: U16, at: int, counts: Ints, ranks: I32, tables: Tables, found: U8) -> int:
    read = np.empty(len(ranks), np.int64)
    at = symbols(state, words, at, code_contexts(counts, ranks), tables, read)
    found[:] = read
    return at


def write(state: U32, words: U16, at: int, frequencies: Ints, starts: Ints) -> int:
    each, firsts = frequencies.astype(np.uint64), starts.astype(np.uint64)
    last = (len(each) - 1) // len(state) * len(state)
    for start in range(last, -1, -len(state)):
        f, first = each[start : start + len(state)], firsts[start : start + len(state)]
        x = state[: len(f)].astype(np.uint64)
        full = x >= f << np.uint64(32 - BITS)
        block = x[full]
        words[at - len(block) : at] = block & np.uint64(0xFFFF)
        at -= len(block)
        x = np.where(full, x >> np.uint64(16), x)
        quotient = x // f
        state[: len(f)] = (quotient << np.uint64(BITS)) + (x - quotient * f) + first
    return at


def sums(counts: Ints, codes: U8, shares: Ints) -> Ints:
    before, ends = np.concatenate([[0], np.cumsum(shares[codes])]), np.cumsum(counts)
    found: Ints = before[ends] - before[ends - counts]
    return found


def ids(tokens: Ints, counts: Ints, ranks: I32, starts: Ints, ranked: U32, found: U32) -> bool:
    lists, first = np.diff(starts)[tokens], starts[tokens]
    listed = ranks < np.repeat(lists, counts)
    place = ranks + np.where(listed, np.repeat(first, counts), np.repeat(starts[-1] - lists, counts))
    if place.max(initial=0) >= len(ranked) or ranks.min(initial=0) < 0:
        return False
    found[:] = ranked[place]
    return True


def arranged(keys: U32, counts: Ints) -> U32:
    groups, n = counts.shape
    place = np.arange(n) * groups + np.arange(groups)[:, None]  # of each group of entries among all of them
    placed = np.repeat(place.ravel() << 32, counts.ravel())
    placed |= keys
    placed.sort()  # several times faster than sorting indices
    return placed.astype(np.uint32)


def _numbers(state: U32, words: U16, at: int, contexts: Ints, tables: Tables, found: Ints) -> int:
    """Read numbers ≥ 1: the bucket of each (exponent and the next two bits), then the low bits of all."""
    if (at := symbols(state, words, at, contexts, tables, found)) == ENDED:
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
