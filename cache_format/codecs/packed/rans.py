"""Entropy coding with known frequencies: range asymmetric numeral systems (rANS), many lanes at a time.

J. Duda, "Asymmetric numeral systems", https://arxiv.org/abs/1311.2540; interleaving: F. Giesen,
https://arxiv.org/abs/1402.3392. A symbol that takes f of 2^12 places costs 12 - log2 f bits, to within a thousandth.

Symbol i belongs to lane i mod L. All lanes share one stream of 16-bit words and do the same at the same time, which is
what numpy is fast at. The last symbols are coded first, so the decoder reads forward. The loops are in `loops`. All
arithmetic is on integers, so any language gives the same bytes.

Shapes: n symbols, L lanes, C contexts, S different symbols.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cache_format.codecs.packed.loops import BITS, ENDED, I32, LOW, TOTAL, U8, Ints, Tables, loops
from cache_format.rows.types import joint_index

KEPT_BITS = 4  # leading bits of a frequency


class Model:
    """Frequencies of S symbols in each of C contexts, every row adding up to 2^12."""

    def __init__(self, frequencies: NDArray[np.integer]) -> None:
        """Raises: ValueError if a row does not add up."""
        counts = frequencies.astype(np.int64)
        if counts.ndim != 2 or (counts < 0).any() or (counts.sum(axis=1) != TOTAL).any():
            raise ValueError(f"frequencies of a model do not add up to {TOTAL} in every context")
        self.frequencies = counts  # [C, S]
        # A symbol that is certain in every context is not coded.
        certain = np.flatnonzero(counts.min(axis=0, initial=TOTAL) == TOTAL)
        self.certain = int(certain[0]) if len(certain) else None

    @cached_property
    def starts(self) -> Ints:
        """[C, S] the first place of each symbol."""
        starts: Ints = np.cumsum(self.frequencies, axis=1) - self.frequencies
        return starts

    @cached_property
    def tables(self) -> Tables:
        return loops().tables(self.frequencies)

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
        self._parts: list[tuple[Ints, Ints]] = []  # frequencies and starts of consecutive symbols

    def symbols(self, symbols: Ints, contexts: Ints, model: Model) -> None:
        if model.certain is None:
            places = joint_index(contexts, symbols, model.frequencies.shape[1])
            self._parts.append((model.frequencies.take(places), model.starts.take(places)))

    def bits(self, values: Ints, widths: Ints) -> None:
        """Values of `widths` bits each (0 to 12), uncompressed."""
        frequencies = 1 << (BITS - widths.astype(np.int64))
        self._parts.append((frequencies, values.astype(np.int64) * frequencies))

    def finish(self) -> bytes:
        """The final states of all lanes, then the words."""
        state = np.full(self.lanes, LOW, np.uint32)
        words = np.empty(sum(len(frequencies) for frequencies, _ in self._parts), np.uint16)
        at = len(words)
        for frequencies, starts in reversed(self._parts):
            at = loops().write(state, words, at, frequencies, starts)
        return state.astype("<u4").tobytes() + words[at:].astype("<u2").tobytes()


class Decoder:
    """Returns the symbols in the order in which they were given. Raises: ValueError if the bytes end too early."""

    def __init__(self, data: bytes | memoryview, lanes: int) -> None:
        if len(data) < 4 * lanes or len(data) % 2:
            raise ValueError("packed targets are cut short")
        self._state = np.frombuffer(data, "<u4", lanes).astype(np.uint32)
        if (self._state < LOW).any():
            raise ValueError(f"packed targets begin with a state below {LOW}")
        # One more than there are, so that a loop may look at the next word before it knows that it needs one.
        words = np.frombuffer(data, "<u2", offset=4 * lanes)
        self._words = np.zeros(len(words) + 1, np.uint16)
        self._words[:-1] = words
        self._next = 0

    def symbols(self, contexts: Ints, model: Model) -> Ints:
        """One symbol for each context."""
        if model.certain is not None:
            return np.full(len(contexts), model.certain, np.int64)
        found = np.empty(len(contexts), np.int64)
        self._go_to(loops().symbols(self._state, self._words, self._next, contexts, model.tables, found))
        return found

    def ranks(self, counts: Ints, entries: int, model: Model) -> I32:
        """[E] the ranks of a group of `entries` entries, position by position."""
        # Nothing is special about a model with a certain symbol: reading it changes no state.
        found = np.empty(entries, np.int32)
        self._go_to(loops().ranks(self._state, self._words, self._next, counts, model.tables, found))
        return found

    def codes(self, counts: Ints, ranks: I32, model: Model) -> U8:
        """[E] the codes of a group."""
        found = np.empty(len(ranks), np.uint8)
        self._go_to(loops().codes(self._state, self._words, self._next, counts, ranks, model.tables, found))
        return found

    def bits(self, widths: Ints) -> Ints:
        """Values of `widths` bits each (0 to 12)."""
        found = np.empty(len(widths), np.int64)
        self._go_to(loops().bits(self._state, self._words, self._next, widths, found))
        return found

    def finish(self) -> None:
        """Raises: ValueError unless all words were read and every state is back at its start."""
        if self._next != len(self._words) - 1 or (self._state != LOW).any():
            raise ValueError("packed targets do not end where they should")

    def _go_to(self, word: int) -> None:
        if word == ENDED:
            raise ValueError("packed targets are cut short")
        self._next = word
