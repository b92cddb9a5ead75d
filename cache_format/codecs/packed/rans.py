"""Entropy coding with known frequencies: range asymmetric numeral systems (rANS), many lanes at a time.

J. Duda, "Asymmetric numeral systems", https://arxiv.org/abs/1311.2540; interleaving: F. Giesen,
https://arxiv.org/abs/1402.3392. A symbol that takes f of 2^12 places costs 12 - log2 f bits, to within a thousandth.

Symbol i belongs to lane i mod L. All lanes share one stream of 16-bit words and do the same at the same time, which is
what numpy is fast at: a step over 512 lanes costs some ten calls. The last symbols are coded first, so the decoder
reads forward. All arithmetic is on integers, so any language gives the same bytes.

In a step, only the state depends on the step before. So the decoder's loop keeps the place that each symbol was read
from, a table of 4 bytes per place says how the state goes on, and everything else is looked up or shifted for all
symbols at once.

Shapes: n symbols, L lanes, C contexts, S different symbols.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cache_format.rows.types import joint_index

BITS = 12
TOTAL = 1 << BITS
KEPT_BITS = 4  # leading bits of a frequency
LOW = 1 << 16  # a state is in [LOW, LOW << 16)

U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]
Ints = NDArray[np.int64]

_BITS, _WORD, _PLACE = np.uint32(BITS), np.uint32(16), np.uint32(TOTAL - 1)


class Model:
    """Frequencies of S symbols in each of C contexts, every row adding up to 2^12."""

    def __init__(self, frequencies: NDArray[np.integer]) -> None:
        """Raises: ValueError if a row does not add up."""
        if frequencies.ndim != 2 or (frequencies < 0).any() or (frequencies.sum(axis=1) != TOTAL).any():
            raise ValueError(f"frequencies of a model do not add up to {TOTAL} in every context")
        self.frequencies = frequencies.astype(np.uint64)  # [C, S]
        self.starts = np.cumsum(self.frequencies, axis=1) - self.frequencies
        # A symbol that is certain in every context is not coded.
        certain = np.flatnonzero((frequencies == TOTAL).all(axis=0))
        self.certain = int(certain[0]) if len(certain) else None

    @cached_property
    def symbols(self) -> NDArray[np.uint16]:
        """[C, 2^12] the symbol at each place."""
        contexts, symbols = self.frequencies.shape
        every = np.tile(np.arange(symbols, dtype=np.uint16), contexts)
        return np.repeat(every, self.frequencies.ravel().astype(np.int64)).reshape(contexts, TOTAL)

    @cached_property
    def steps(self) -> U32:
        """[C·2^12] frequency of the symbol at each place · 2^12, plus the number of earlier places with this symbol."""
        frequencies, starts = self.frequencies.ravel().astype(np.int64), self.starts.ravel().astype(np.int64)
        before = np.arange(frequencies.sum()) % TOTAL - np.repeat(starts, frequencies)
        steps: U32 = (np.repeat(frequencies << BITS, frequencies) + before).astype(np.uint32)
        return steps

    @classmethod
    def of(cls, symbols: Ints, contexts: Ints, num_contexts: int, num_symbols: int) -> Model:
        """Model from occurrences; every symbol that occurs gets a frequency of at least 1."""
        counts = np.bincount(joint_index(contexts, symbols, num_symbols), minlength=num_contexts * num_symbols)
        counts = counts.reshape(num_contexts, num_symbols)
        counts[~counts.any(axis=1), counts.sum(axis=0).argmax()] = 1  # contexts that do not occur
        return cls(np.stack([_normalised(row) for row in counts]))


def _normalised(counts: Ints) -> Ints:
    """Integers proportional to the counts that add up to 2^12, at least 1 where a count is positive."""
    present = counts > 0
    frequencies = np.where(present, np.maximum(1, counts * TOTAL // counts.sum()), 0)
    # Four leading bits suffice: the codes grow by a few thousandths, the table shrinks by half.
    coarse = np.maximum(np.frexp(frequencies)[1] - KEPT_BITS, 0)
    frequencies = frequencies >> coarse << coarse
    # Rounding differences are taken from, or added to, the most frequent symbols.
    order = np.argsort(-frequencies, kind="stable")
    excess = int(frequencies.sum()) - TOTAL
    for symbol in order:
        if excess <= 0:
            break
        taken = min(excess, int(frequencies[symbol]) - 1)
        frequencies[symbol] -= taken
        excess -= taken
    frequencies[order[0]] -= min(excess, 0)
    result: Ints = frequencies
    return result


class Encoder:
    """Collects symbols in the order in which they will be decoded."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self._parts: list[tuple[U64, U64]] = []  # frequencies and starts of consecutive symbols

    def symbols(self, symbols: Ints, contexts: Ints, model: Model) -> None:
        if model.certain is None:
            self._parts.append((model.frequencies[contexts, symbols], model.starts[contexts, symbols]))

    def bits(self, values: Ints, widths: Ints) -> None:
        """Values of `widths` bits each (0 to 12), uncompressed."""
        frequencies = (np.uint64(1) << (np.uint64(BITS) - widths.astype(np.uint64))).astype(np.uint64)
        self._parts.append((frequencies, values.astype(np.uint64) * frequencies))

    def finish(self) -> bytes:
        """The final states of all lanes, then the words."""
        state = np.full(self.lanes, LOW, np.uint64)
        blocks: list[NDArray[np.uint16]] = []
        for frequencies, starts in reversed(self._parts):
            last = (len(frequencies) - 1) // self.lanes * self.lanes
            for start in range(last, -1, -self.lanes):
                f, c = frequencies[start : start + self.lanes], starts[start : start + self.lanes]
                x = state[: len(f)]
                full = x >= f << np.uint64(32 - BITS)
                blocks.append((x[full] & np.uint64(0xFFFF)).astype(np.uint16))
                x = np.where(full, x >> np.uint64(16), x)
                quotient = x // f
                state[: len(f)] = (quotient << np.uint64(BITS)) + (x - quotient * f) + c
        words = np.concatenate([*reversed(blocks), np.zeros(0, np.uint16)])
        return state.astype("<u4").tobytes() + words.astype("<u2").tobytes()


class Decoder:
    """Returns the symbols in the order in which they were given. Raises: ValueError if the bytes end too early."""

    def __init__(self, data: bytes | memoryview, lanes: int) -> None:
        if len(data) < 4 * lanes or len(data) % 2:
            raise ValueError("packed targets are cut short")
        self.lanes = lanes
        self._state = np.frombuffer(data, "<u4", lanes).astype(np.uint32)
        if (self._state < LOW).any():
            raise ValueError(f"packed targets begin with a state below {LOW}")
        self._words = np.frombuffer(data, "<u2", offset=4 * lanes).astype(np.uint32)
        self._next = 0

    def symbols(self, contexts: Ints, model: Model) -> Ints:
        """One symbol for each context."""
        if model.certain is not None:
            return np.full(len(contexts), model.certain, np.int64)
        places = contexts << BITS  # in the tables of the model; the loop adds the place in the context
        for start in range(0, len(places), self.lanes):
            here = places[start : start + self.lanes]
            x = self._state[: len(here)]
            here += x & _PLACE
            step = model.steps[here]
            self._advance(x, step >> _BITS, step & _PLACE)
        found: Ints = model.symbols.ravel()[places].astype(np.int64)
        return found

    def bits(self, widths: Ints) -> Ints:
        """Values of `widths` bits each."""
        places = np.zeros(len(widths), np.uint32)
        shifts = _BITS - widths.astype(np.uint32)
        frequencies = np.uint32(1) << shifts
        starts = np.arange(0, len(widths), self.lanes)
        for start in starts[np.maximum.reduceat(widths, starts) > 0]:  # widths of 0 change no state
            here = slice(start, start + self.lanes)
            f = frequencies[here]
            x = self._state[: len(f)]
            place = places[here] = x & _PLACE
            self._advance(x, f, place & (f - np.uint32(1)))
        found: Ints = (places >> shifts).astype(np.int64)
        return found

    def finish(self) -> None:
        """Raises: ValueError unless all words were read and every state is back at its start."""
        if self._next != len(self._words) or (self._state != LOW).any():
            raise ValueError("packed targets do not end where they should")

    def _advance(self, x: U32, frequency: U32, before: U32) -> None:
        """The next states in place of x. They fit: frequency ≤ 2^12 and x < 2^32."""
        x >>= _BITS
        x *= frequency
        x += before
        (empty,) = (x < LOW).nonzero()
        words = self._words[self._next : self._next + len(empty)]
        if len(words) < len(empty):
            raise ValueError("packed targets are cut short")
        self._next += len(empty)
        x[empty] = x[empty] << _WORD | words
