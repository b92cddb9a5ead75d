"""The loops of decoding (`loops.Loops`), compiled by numba: one pass over the symbols, a few nanoseconds for each.

Compiled code checks no index. Every index here is checked, or follows from the length of an array; `Decoder`, `Model`
and `Lexicon` pass arrays of the lengths that `Loops` states. All arithmetic is on int64: no value reaches 2^63.

Signatures are given, so everything is compiled when this module is imported. No call compiles later, so a process that
is forked while a thread decodes never waits for a lock of the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numba import boolean, int64, uint16, uint32, void

from cache_format.codecs.packed.loops import BITS, ENDED, LEFT, LOW, QUARTERS, RANK, TOTAL, U16, U32, Ints

Function = TypeVar("Function", bound=Callable[..., object])
UNUSABLE = (OSError, RuntimeError, EOFError)  # a cache of compiled code without a writable place, or cut short

_PLACE = TOTAL - 1
_BIT_LENGTH = np.array([i.bit_length() for i in range(256)])
_STATE, _WORDS, _INTS, _SYMBOLS, _STEPS = uint32[::1], uint16[::1], int64[::1], uint16[::1], uint32[::1]
_READ_SYMBOLS = int64(_STATE, _WORDS, int64, _INTS, _SYMBOLS, _STEPS, _INTS)


def _compiled(signature: Any) -> Callable[[Function], Function]:
    def compiled(function: Function) -> Function:
        try:
            fast: Function = numba.njit(signature, nogil=True, cache=True)(function)
        except UNUSABLE:
            fast = numba.njit(signature, nogil=True)(function)
        return fast

    return compiled


@_compiled(void(int64[:, ::1], _SYMBOLS, _STEPS))
def tables(frequencies: Ints, symbols: U16, steps: U32) -> None:
    contexts, size = frequencies.shape
    for context in range(contexts):
        place, end = context << BITS, (context + 1) << BITS
        for symbol in range(size):
            frequency = frequencies[context, symbol]
            for before in range(min(frequency, end - place)):
                symbols[place + before] = symbol
                steps[place + before] = (frequency << BITS) + before
            place += frequency


@_compiled("UniTuple(int64, 2)(int64, uint16[::1], int64)")
def _refilled(x: int, words: U16, at: int) -> tuple[int, int]:
    """The state, with the next word in it if it is below `LOW`, and the next `at`, which may then be too large."""
    word = np.int64(words[at])  # read whether or not it is needed: a branch would often be mispredicted
    return (x << 16 | word, at + 1) if x < LOW else (x, at)


@_compiled(_READ_SYMBOLS)
def symbols(state: U32, words: U16, at: int, contexts: Ints, symbols: U16, steps: U32, found: Ints) -> int:
    lanes, end, known = len(state), len(words) - 1, len(steps) >> BITS
    for start in range(0, len(contexts), lanes):
        for lane in range(min(lanes, len(contexts) - start)):
            context = contexts[start + lane]
            if context < 0 or context >= known:
                raise IndexError("a context that the model does not have")
            x = np.int64(state[lane])
            place = (context << BITS) + (x & _PLACE)
            found[start + lane] = symbols[place]
            step = np.int64(steps[place])
            x = (x >> BITS) * (step >> BITS) + (step & _PLACE)
            x, at = _refilled(x, words, at)
            if at > end:
                return ENDED
            state[lane] = x
    return at


@_compiled(int64(_STATE, _WORDS, int64, _INTS, int64, _INTS))
def _add_bits(state: U32, words: U16, at: int, widths: Ints, shift: int, found: Ints) -> int:
    """Read the bits of each width from bit `shift` on, at most 12, and add them to what was found."""
    lanes, end = len(state), len(words) - 1
    for start in range(0, len(widths), lanes):
        for lane in range(min(lanes, len(widths) - start)):
            width = min(max(widths[start + lane] - shift, 0), BITS)
            x = np.int64(state[lane])
            place, free = x & _PLACE, BITS - width
            found[start + lane] += place >> free << shift
            x = (x >> BITS << free) + (place & ((1 << free) - 1))
            x, at = _refilled(x, words, at)
            if at > end:
                return ENDED
            state[lane] = x
    return at


@_compiled(int64(_STATE, _WORDS, int64, _INTS, _INTS))
def bits(state: U32, words: U16, at: int, widths: Ints, found: Ints) -> int:
    found[:] = 0
    return _add_bits(state, words, at, widths, 0, found)


@_compiled(_READ_SYMBOLS)
def numbers(state: U32, words: U16, at: int, contexts: Ints, table: U16, steps: U32, found: Ints) -> int:
    at = symbols(state, words, at, contexts, table, steps, found)
    if at == ENDED:  # the rest of `found` is whatever was in memory
        return at
    widths, widest = np.empty(len(found), np.int64), 0
    for i in range(len(found)):
        exponent, leading = found[i] // QUARTERS, found[i] % QUARTERS
        below = max(exponent - 2, 0)
        widths[i], widest = below, max(widest, below)
        found[i] = (4 | leading) << below if exponent >= 2 else leading if exponent == 1 else 1
    for shift in range(0, widest, BITS):
        at = _add_bits(state, words, at, widths, shift, found)
        if at == ENDED:
            break
    return at


@_compiled(void(_INTS, _INTS, _INTS))
def rank_contexts(before: Ints, left: Ints, found: Ints) -> None:
    for i in range(len(found)):
        bits = min(max(before[i] + 1, 0), (1 << RANK) - 1)
        octave = 8 + _BIT_LENGTH[bits >> 8] if bits >> 8 else _BIT_LENGTH[bits & 255]
        found[i] = octave * LEFT + min(left[i], LEFT) - 1


@_compiled(boolean(_INTS, _INTS, _INTS, _INTS, uint32[::1], uint32[::1]))
def ids(tokens: Ints, counts: Ints, ranks: Ints, starts: Ints, ranked: U32, found: U32) -> bool:
    vocab_size, place = len(starts) - 1, 0
    for i in range(len(tokens)):
        token = tokens[i]
        if token < 0 or token >= vocab_size or counts[i] > len(ranks) - place:
            raise IndexError("an input token outside the vocabulary, or more entries than ranks")
        first, listed = starts[token], starts[token + 1] - starts[token]
        for entry in range(place, place + counts[i]):
            rank = ranks[entry]
            if rank < 0 or rank >= listed + vocab_size:
                return False
            found[entry] = ranked[first + rank if rank < listed else starts[vocab_size] - listed + rank]
        place += max(counts[i], 0)
    return True
