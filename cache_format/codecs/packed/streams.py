"""Size of each stream of packed targets, measured while they are decoded, for `distill stats`.

All streams of a block share one sequence of words, so sizes follow from the frequencies: a symbol of frequency f costs
12 - log2 f bits, to within a thousandth (`rans`). For comparison, `entropy_bits` is a lower bound for any coder with
the same contexts: Σ n_s·log2(n / n_s) over contexts and symbols s of each record batch, with free frequencies.
The frequencies are a stream of their own here. Low bits of ranks are stored as they are and have no entropy estimate.

Shapes: C contexts, S different symbols.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from cache_format.codecs.packed.loops import BITS, Ints
from cache_format.codecs.packed.rans import Model

FREQUENCIES = "frequencies"
LOW_BITS = "_low_bits"  # suffix of the name of a model


class PackedStreams:
    """Sums over blocks: bits of each stream, and the entropy of the streams that are coded symbols."""

    def __init__(self) -> None:
        self.bits: defaultdict[str, float] = defaultdict(float)
        self.entropy_bits: defaultdict[str, float] = defaultdict(float)

    def add_block(
        self, counts: Mapping[str, Ints], models: Mapping[str, Model], low_bits: Mapping[str, int], table_bytes: int
    ) -> None:
        """Add the streams of one block.

        Args:
            counts: stream -> [C, S] occurrences of each symbol in each context; empty streams are left out.
            models: stream -> frequencies of the block.
            low_bits: stream -> number of bits stored as they are.
            table_bytes: compressed bytes of the frequencies.
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
