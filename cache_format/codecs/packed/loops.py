"""The loops over symbols and entries in which packed targets spend their time, in two implementations.

    numpy_loops     numpy: a call for each step over all lanes
    numba_loops     one pass over the symbols, compiled by numba (the extra `fast`): several times faster

Both compute with integers and give the same arrays and errors. Arrays named `found` are filled by the call; they and
the contexts are as long as the symbols to be read. `words` has one word more than there are to read, and `at` is the
next one; a reading function returns the next `at`, or `ENDED` if there were too few words; writing goes backwards.
Each implementation takes the `tables` that it made.

Shapes: n symbols, L lanes, C contexts, S different symbols, N positions, E entries, G groups of entries, V vocabulary,
P candidates.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

BITS = 12
TOTAL = 1 << BITS
LOW = 1 << 16  # a state is in [LOW, LOW << 16)
ENDED = -1
# Number of context classes of: entries left, exponent of a rank.
LEFT, RANK = 4, 16
HIGHEST = 1 << 30  # rank that reading finds; no token has it
QUARTERS = 4  # buckets of a number in each octave: the two bits after the leading one

U16 = NDArray[np.uint16]
U32 = NDArray[np.uint32]
Ints = NDArray[np.int64]
I32 = NDArray[np.int32]
U8 = NDArray[np.uint8]
Tables: TypeAlias = "tuple[U16, U32]"


class Loops(Protocol):
    def tables(self, frequencies: Ints, /) -> Tables:
        """What reading looks up in a model of [C, S] frequencies, of which each row adds up to 2^12.

        The first array is [C·2^12], the symbol at each place; the second says how the state goes on.
        """
        ...

    def symbols(self, state: U32, words: U16, at: int, contexts: Ints, tables: Tables, found: Ints, /) -> int:
        """Read one symbol for each context. Raises: IndexError for a context that the tables do not have."""
        ...

    def bits(self, state: U32, words: U16, at: int, widths: Ints, found: Ints, /) -> int:
        """Read a number of each width, at most 12 bits; 0 bits are the number 0."""
        ...

    def ranks(self, state: U32, words: U16, at: int, counts: Ints, tables: Tables, found: I32, /) -> int:
        """Read the ranks of a group, turn by turn.

        Args:
            counts: [N] entries of each position, together as many as `found` has.
            found: [E] position by position, ascending in each; `HIGHEST` for higher ones.
        """
        ...

    def codes(self, state: U32, words: U16, at: int, counts: Ints, ranks: I32, tables: Tables, found: U8, /) -> int:
        """Read the codes of a group whose `counts` [N] and `ranks` [E] are known."""
        ...

    def write(self, state: U32, words: U16, at: int, frequencies: Ints, starts: Ints, /) -> int:
        """Code symbols, the last one first; returns where the words now begin that end at `at`.

        Args:
            words: at least as many up to `at` as there are symbols.
            frequencies: [n] of each symbol, from 1 to 2^12.
            starts: [n] the first place of each.
        """
        ...

    def sums(self, counts: Ints, codes: U8, shares: Ints, /) -> Ints:
        """[N] the sum over the entries of each position of shares[code]."""
        ...

    def ids(self, tokens: Ints, counts: Ints, ranks: I32, starts: Ints, ranked: U32, found: U32, /) -> bool:
        """Look up the token of each rank; False if there is a rank that no token has.

        Args:
            tokens, counts: [N] input tokens, and the number of ranks after each; together as many as there are ranks.
            ranks: [E] position by position.
            starts: [V + 1] place of each input token's candidates in `ranked`.
            ranked: [P + V] candidates of all tokens, then all tokens in order.
        """
        ...

    def arranged(self, keys: U32, counts: Ints, /) -> U32:
        """[E] the keys of entries ordered by position, group and key.

        Args:
            keys: [E] by group and position.
            counts: [G, N] number of keys of each group at each position.
        """
        ...


@cache
def loops() -> Loops:
    """The compiled loops if numba can be imported and is not switched off (`NUMBA_DISABLE_JIT=1`), else numpy's.

    Compiling takes some seconds, once for each user and version; loading what was compiled takes half a second.
    """
    from cache_format.codecs.packed import numpy_loops

    try:
        import numba

        if getattr(numba.config, "DISABLE_JIT", 0):  # set when numba reads its environment
            return numpy_loops
        from cache_format.codecs.packed import numba_loops
    except ImportError as error:
        if error.name != "numba":  # installed, but not for this numpy
            warnings.warn(f"numba cannot be used, so packed targets are decoded more slowly: {error}", stacklevel=2)
        return numpy_loops
    return numba_loops
