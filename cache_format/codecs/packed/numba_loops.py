"""The loops of packed targets (`loops.Loops`), compiled by numba: one pass over the symbols, some nanoseconds for each.

Compiled code checks no index. Every index here is checked, or follows from the length of an array; `Decoder`, `Model`
and `Lexicon` pass arrays of the lengths that `Loops` states. All arithmetic is on int64: no value reaches 2^63. An
index is written `uintp(i)`, because numba would otherwise also look whether it counts from the end.

Signatures are given, so everything is compiled when this module is imported. No call compiles later, so a process that
is forked while a thread decodes never waits for a lock of the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numba import uintp

from cache_format.codecs.packed.loops import (
    BITS,
    ENDED,
    HIGHEST,
    I32,
    LEFT,
    LOW,
    QUARTERS,
    RANK,
    TOTAL,
    U8,
    U16,
    U32,
    Ints,
    Tables,
)

Function = TypeVar("Function", bound=Callable[..., object])
UNUSABLE = (OSError, RuntimeError, EOFError)  # a cache of compiled code without a writable place, or cut short

_PLACE = TOTAL - 1
_START = 16  # bits of a range that hold its start; its frequency is above them
_BIT_LENGTH = np.array([i.bit_length() for i in range(1 << RANK)], np.uint8)
_MOST_BUCKETS = QUARTERS * 29  # numbers up to 2^29, so that sums of one and `HIGHEST` are far from 2^63
_CODE_CONTEXTS, _RANK_CONTEXTS = RANK * LEFT, (1 + RANK) * LEFT
_SHORT = 8  # lists up to this length are sorted one by one
# Types, as numba reads them.
_STATE = _KEYS = "uint32[::1]"
_WORDS, _INTS, _RANKS, _CODES = "uint16[::1]", "int64[::1]", "int32[::1]", "uint8[::1]"
_TABLES, _MATRIX = "Tuple((uint16[::1], uint32[::1]))", "uint32[:, ::1]"


def _compiled(returned: str, *arguments: str) -> Callable[[Function], Function]:
    signature: Any = f"{returned}({', '.join(arguments)})"

    def compiled(function: Function) -> Function:
        try:
            fast: Function = numba.njit(signature, nogil=True, cache=True)(function)
        except UNUSABLE:
            fast = numba.njit(signature, nogil=True)(function)
        return fast

    return compiled


@_compiled(_TABLES, "int64[:, ::1]")
def tables(frequencies: Ints) -> Tables:
    """The second table is [C·S], the frequency and the first place of each symbol: it stays in the nearest cache."""
    contexts, size = frequencies.shape
    symbols, ranges = np.zeros(contexts << BITS, np.uint16), np.empty(contexts * size, np.uint32)
    for context in range(contexts):
        start = 0
        for symbol in range(size):
            frequency = min(max(frequencies[context, symbol], 0), TOTAL - start)
            ranges[context * size + symbol] = (frequency << _START) + start
            first = (context << BITS) + start
            symbols[first : first + frequency] = symbol
            start += frequency
    return symbols, ranges


@_compiled("UniTuple(int64, 2)", "int64", _WORDS, "int64")
def _refilled(x: int, words: U16, at: int) -> tuple[int, int]:
    """The state, with the next word in it if it is below `LOW`, and the next `at`, which may then be too large."""
    word = np.int64(words[uintp(at)])  # read whether or not it is needed: a branch would often be mispredicted
    return (x << 16 | word, at + 1) if x < LOW else (x, at)


@_compiled("int64", "int64", _TABLES)
def _size(contexts: int, tables: Tables) -> int:
    """S, number of symbols of a model with at least `contexts` contexts. Raises: IndexError for fewer."""
    known = len(tables[0]) >> BITS
    if known < contexts:
        raise IndexError("a context that the model does not have")
    return len(tables[1]) // max(known, 1)


@_compiled("UniTuple(int64, 3)", "int64", "int64", _TABLES, "int64", _WORDS, "int64")
def _read(x: int, context: int, tables: Tables, size: int, words: U16, at: int) -> tuple[int, int, int]:
    """The symbol in state x, the next state, and the next `at`."""
    place = x & _PLACE
    symbol = np.int64(tables[0][uintp((context << BITS) + place)])
    range_ = np.int64(tables[1][uintp(context * size + symbol)])
    x, at = _refilled((x >> BITS) * (range_ >> _START) + place - (range_ & ((1 << _START) - 1)), words, at)
    return symbol, x, at


@_compiled("int64", _STATE, _WORDS, "int64", _INTS, _TABLES, _INTS)
def symbols(state: U32, words: U16, at: int, contexts: Ints, tables: Tables, found: Ints) -> int:
    lane, end, known, size = 0, len(words) - 1, len(tables[0]) >> BITS, _size(0, tables)
    for i in range(len(contexts)):
        if contexts[i] < 0 or contexts[i] >= known:
            raise IndexError("a context that the model does not have")
        found[i], x, at = _read(np.int64(state[uintp(lane)]), contexts[i], tables, size, words, at)
        if at > end:
            return ENDED
        state[uintp(lane)] = x
        lane = lane + 1 if lane + 1 < len(state) else 0
    return at


@_compiled("int64", _STATE, _WORDS, "int64", _INTS, "int64", _INTS)
def _add_bits(state: U32, words: U16, at: int, widths: Ints, shift: int, found: Ints) -> int:
    """Read the bits of each width from bit `shift` on, at most 12, and add them to what was found."""
    lane, end = 0, len(words) - 1
    for i in range(len(widths)):
        width = min(max(widths[i] - shift, 0), BITS)
        x = np.int64(state[uintp(lane)])
        place, free = x & _PLACE, BITS - width
        found[i] += place >> free << shift
        x, at = _refilled((x >> BITS << free) + (place & ((1 << free) - 1)), words, at)
        if at > end:
            return ENDED
        state[uintp(lane)] = x
        lane = lane + 1 if lane + 1 < len(state) else 0
    return at


@_compiled("int64", _STATE, _WORDS, "int64", _INTS, _INTS)
def bits(state: U32, words: U16, at: int, widths: Ints, found: Ints) -> int:
    found[:] = 0
    return _add_bits(state, words, at, widths, 0, found)


@_compiled("int64", "int64", "int64")
def _context(before: int, left: int) -> int:
    """See `entry_symbols.rank_contexts`; `before` is at least -1."""
    octave: int = np.int64(_BIT_LENGTH[uintp(min(before + 1, len(_BIT_LENGTH) - 1))])
    return octave * LEFT + min(left, LEFT) - 1


@_compiled("void", _INTS, "int64")
def _check_counts(counts: Ints, entries: int) -> None:
    """Raises: IndexError unless the counts add up to the number of entries."""
    for i in range(len(counts)):
        if counts[i] < 0 or counts[i] > entries:
            raise IndexError("a number of entries that does not fit")
        entries -= counts[i]
    if entries:
        raise IndexError("more entries than the counts of all positions")


@_compiled("int64", _STATE, _WORDS, "int64", _INTS, _TABLES, _RANKS)
def ranks(state: U32, words: U16, at: int, counts: Ints, tables: Tables, found: I32) -> int:
    _check_counts(counts, len(found))
    size, end, n, entry = _size(_RANK_CONTEXTS, tables), len(words) - 1, 0, 0
    if size > _MOST_BUCKETS:
        raise IndexError("more buckets than there are numbers")
    place, left = np.empty_like(counts), np.empty_like(counts)
    before, widths = np.empty_like(counts), np.empty_like(counts)
    for i in range(len(counts)):
        if counts[i]:
            place[n], left[n], before[n] = entry, counts[i], -1
            n += 1
        entry += counts[i]
    while n:
        lane, widest = 0, 0
        for i in range(n):
            x, context = np.int64(state[uintp(lane)]), _context(before[i], left[i])
            bucket, x, at = _read(x, context, tables, size, words, at)
            if at > end:
                return ENDED
            state[uintp(lane)] = x
            lane = lane + 1 if lane + 1 < len(state) else 0
            exponent, leading = bucket // QUARTERS, bucket % QUARTERS
            below = max(exponent - 2, 0)
            widths[i], widest = below, max(widest, below)
            before[i] += (4 | leading) << below if exponent >= 2 else leading if exponent == 1 else 1
        for shift in range(0, widest, BITS):
            at = _add_bits(state, words, at, widths[:n], shift, before)
            if at == ENDED:
                return at
        going_on = 0
        for i in range(n):
            before[i] = min(before[i], HIGHEST)
            found[uintp(place[i])] = before[i]
            if left[i] > 1:
                place[going_on], left[going_on], before[going_on] = place[i] + 1, left[i] - 1, before[i]
                going_on += 1
        n = going_on
    return at


@_compiled("int64", _STATE, _WORDS, "int64", _INTS, _RANKS, _TABLES, _CODES)
def codes(state: U32, words: U16, at: int, counts: Ints, ranks: I32, tables: Tables, found: U8) -> int:
    _check_counts(counts, min(len(found), len(ranks)))
    size, end, lane, entry = _size(_CODE_CONTEXTS, tables), len(words) - 1, 0, 0
    for i in range(len(counts)):
        for _ in range(counts[i]):
            context = _context(max(ranks[uintp(entry)], 0), counts[i]) - LEFT
            code, x, at = _read(np.int64(state[uintp(lane)]), context, tables, size, words, at)
            if at > end:
                return ENDED
            state[uintp(lane)] = x
            lane = lane + 1 if lane + 1 < len(state) else 0
            found[uintp(entry)] = code
            entry += 1
    return at


@_compiled("int64", _STATE, _WORDS, "int64", _INTS, _INTS)
def write(state: U32, words: U16, at: int, frequencies: Ints, starts: Ints) -> int:
    if len(starts) != len(frequencies) or at < len(frequencies) or at > len(words):
        raise IndexError("symbols, their places and words do not go together")
    for i in range(len(frequencies) - 1, -1, -1):
        lane, frequency = i % len(state), frequencies[i]
        x = np.int64(state[uintp(lane)])
        if x >= frequency << (32 - BITS):
            at -= 1
            words[uintp(at)] = x & 0xFFFF
            x >>= 16
        quotient = x // frequency
        state[uintp(lane)] = (quotient << BITS) + x - quotient * frequency + starts[i]
    return at


@_compiled(_INTS, _INTS, _CODES, _INTS)
def sums(counts: Ints, codes: U8, shares: Ints) -> Ints:
    _check_counts(counts, len(codes))
    found, entry = np.zeros(len(counts), np.int64), 0
    for i in range(len(counts)):
        for _ in range(counts[i]):
            code = np.int64(codes[uintp(entry)])
            if code >= len(shares):
                raise IndexError("a code that the codebook does not have")
            found[i] += shares[uintp(code)]
            entry += 1
    return found


@_compiled("boolean", _INTS, _INTS, _RANKS, _INTS, _KEYS, _KEYS)
def ids(tokens: Ints, counts: Ints, ranks: I32, starts: Ints, ranked: U32, found: U32) -> bool:
    _check_counts(counts, min(len(found), len(ranks)))
    vocab_size, entry = len(starts) - 1, 0
    for i in range(len(counts)):
        token = tokens[i] if i < len(tokens) else -1
        if token < 0 or token >= vocab_size:
            raise IndexError("no input token, or one outside the vocabulary")
        first, listed = starts[token], starts[token + 1] - starts[token]
        rest = starts[vocab_size] - listed
        for _ in range(counts[i]):
            rank = np.int64(ranks[uintp(entry)])
            if rank < 0 or rank >= listed + vocab_size:
                return False
            found[uintp(entry)] = ranked[uintp((first if rank < listed else rest) + rank)]
            entry += 1
    return True


def arranged(keys: U32, counts: Ints) -> U32:
    """Longer lists are sorted as the rows of matrices, in which numpy sorts several keys with one instruction."""
    groups, n = counts.shape
    lengths, by_position = counts.ravel(), counts.T.ravel()
    _check_counts(lengths, len(keys))
    places = (np.cumsum(by_position) - by_position).reshape(n, groups).T.ravel()
    found = np.empty(len(keys), np.uint32)
    _place(keys, lengths, places, found)
    longest, width = lengths.max(initial=0), 2 * _SHORT
    while width < 2 * longest:
        here = np.flatnonzero((lengths > width // 2) & (lengths <= width))
        matrix = np.empty((len(here), width), np.uint32)
        _gather(found, places[here], lengths[here], matrix)
        matrix.sort(axis=1)
        _scatter(matrix, places[here], lengths[here], found)
        width *= 2
    return found


@_compiled("void", _KEYS, _INTS, _INTS, _KEYS)
def _place(keys: U32, lengths: Ints, places: Ints, found: U32) -> None:
    """Put each list at its place, and sort the short ones."""
    source = 0
    for each in range(len(lengths)):
        place, length = places[each], lengths[each]
        for i in range(length):
            key, at = keys[uintp(source + i)], place + i
            while length <= _SHORT and at > place and found[uintp(at - 1)] > key:
                found[uintp(at)] = found[uintp(at - 1)]
                at -= 1
            found[uintp(at)] = key
        source += length


@_compiled("void", _KEYS, _INTS, _INTS, _MATRIX)
def _gather(keys: U32, places: Ints, lengths: Ints, matrix: U32) -> None:
    """Fill each row with a list, and the rest of it with what is sorted behind."""
    width = matrix.shape[1]
    for row in range(len(matrix)):
        place, length = places[row], lengths[row]
        for i in range(length):
            matrix[row, i] = keys[uintp(place + i)]
        for i in range(length, width):
            matrix[row, i] = 2**32 - 1


@_compiled("void", _MATRIX, _INTS, _INTS, _KEYS)
def _scatter(matrix: U32, places: Ints, lengths: Ints, keys: U32) -> None:
    for row in range(len(matrix)):
        place, length = places[row], lengths[row]
        for i in range(length):
            keys[uintp(place + i)] = matrix[row, i]
