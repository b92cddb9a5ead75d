"""What each stream of packed targets takes: measured while they are decoded, for `distill stats`.

All streams of a block share one sequence of words, so a stream has no bytes of its own; what it takes follows from the
frequencies: a symbol of f in 2^12 takes 12 - log2 f bits, to within a thousandth (`rans`).

Beside it stands the least that any coder could take with the same contexts: the entropy of the symbols that occur in
each, Σ n_s·log2(n / n_s) over contexts and symbols s, record batch by record batch, as if the frequencies were known.
In truth they are in the block as well, and are a stream here. The low bits of ranks are written as they are; no entropy
is told of them, since there are too few of each value to know one.

Shapes: C contexts, S different symbols.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from cache_format.codecs.packed.rans import BITS, Ints, Model

FREQUENCIES = "frequencies"
LOW_BITS = "_low_bits"  # behind the name of a model


class PackedStreams:
    """Sums over blocks: bits of each stream, and the entropy of those that are symbols in contexts."""

    def __init__(self) -> None:
        self.bits: defaultdict[str, float] = defaultdict(float)
        self.entropy_bits: defaultdict[str, float] = defaultdict(float)

    def add_block(
        self, counts: Mapping[str, Ints], models: Mapping[str, Model], low_bits: Mapping[str, int], table_bytes: int
    ) -> None:
        """What one block holds.

        Args:
            counts: of each stream [C, S], how often each symbol occurred in each context; empty streams are left out.
            models: the frequencies that it was coded with.
            low_bits: number of bits below the symbols, by stream.
            table_bytes: of the frequencies, compressed.
        """
        for name, count in counts.items():
            if not (here := count > 0).any():
                continue
            n = count[here]
            of_context = np.broadcast_to(count.sum(axis=1, keepdims=True), count.shape)[here]
            frequencies = models[name].frequencies[here].astype(np.float64)
            self.bits[name] += float((n * (BITS - np.log2(frequencies))).sum())
            self.entropy_bits[name] += float((n * np.log2(of_context / n)).sum())
        for name, width in low_bits.items():
            self.bits[name + LOW_BITS] += width
        self.bits[FREQUENCIES] += 8 * table_bytes
