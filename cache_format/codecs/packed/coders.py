"""A block's streams of symbols: written with frequencies that are known at the end, and read back.

    header, compressed frequencies of each model, states and words of the entropy coder

What the symbols mean, and in which contexts they are coded, is decided in `block`.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from typing import Protocol, TypeAlias

import numpy as np
import zstandard
from numpy.typing import NDArray

from cache_format.codecs.packed.entry_symbols import before_and_left, buckets, code_contexts, rank_contexts, turns
from cache_format.codecs.packed.loops import BITS, I32, U8, Ints
from cache_format.codecs.packed.rans import Decoder, Encoder, Model
from cache_format.codecs.packed.streams import PackedStreams
from cache_format.rows.types import IntArray

HEADER = struct.Struct("<IHI")  # entries, lanes, bytes of the compressed frequencies
LEVEL = 19

Alphabets: TypeAlias = "Mapping[str, tuple[int, int]]"
"""Numbers of contexts and of symbols of each model, in the order in which their frequencies are stored."""


class Coder(Protocol):
    """Encoder or decoder. A writer is given symbols and values, a reader None; both return them."""

    def symbols(self, name: str, contexts: Ints, symbols: Ints | None) -> Ints: ...
    def ranks(self, name: str, counts: Ints, ranks: I32 | None) -> I32: ...
    def codes(self, name: str, counts: Ints, ranks: I32, codes: U8 | None) -> U8: ...


class BlockWriter:
    """Collects the symbols; their frequencies are known at the end."""

    def __init__(self, alphabets: Alphabets, lanes: int) -> None:
        self._alphabets, self._lanes = alphabets, lanes
        self._parts: list[tuple[str, Ints, Ints]] = []  # model or "", contexts or widths, symbols or values

    def symbols(self, name: str, contexts: Ints, symbols: Ints | None) -> Ints:
        assert symbols is not None
        self._parts.append((name, contexts, symbols))
        return symbols

    def ranks(self, name: str, counts: Ints, ranks: I32 | None) -> I32:
        assert ranks is not None
        before, _ = before_and_left(counts, ranks)
        for place, left in turns(counts):
            distance = ranks[place].astype(np.int64) - before[place]
            of_symbols, below = buckets(distance)
            self.symbols(name, rank_contexts(before[place], left), of_symbols)
            rest = distance & ((1 << below) - 1)
            while below.any():
                width = np.minimum(below, BITS)
                self._parts.append(("", width, rest & ((1 << width) - 1)))
                rest, below = rest >> width, below - width
        return ranks

    def codes(self, name: str, counts: Ints, ranks: I32, codes: U8 | None) -> U8:
        assert codes is not None
        self.symbols(name, code_contexts(counts, ranks), codes.astype(np.int64))
        return codes

    def finish(self, entries: int) -> bytes:
        models, tables = {}, []
        for model, size in self._alphabets.items():
            used = [(contexts, symbols) for name, contexts, symbols in self._parts if name == model]
            nothing = np.zeros(0, np.int64)
            contexts = np.concatenate([*(part for part, _ in used), nothing])
            symbols = np.concatenate([*(part for _, part in used), nothing])
            models[model] = Model.of(symbols, contexts, *size)
            tables.append(models[model].frequencies.astype("<u2").tobytes())
        encoder = Encoder(self._lanes)
        for name, contexts, symbols in self._parts:
            if name:
                encoder.symbols(symbols, contexts, models[name])
            else:
                encoder.bits(symbols, contexts)
        frequencies = zstandard.ZstdCompressor(level=LEVEL).compress(b"".join(tables))
        return HEADER.pack(entries, self._lanes, len(frequencies)) + frequencies + encoder.finish()


class BlockReader:
    """Returns the symbols. Raises: ValueError, from every method, for bytes that no writer wrote."""

    def __init__(self, data: memoryview, alphabets: Alphabets, most_entries: int, *, measured: bool = False) -> None:
        if len(data) < HEADER.size:
            raise ValueError("packed targets are cut short")
        self._left, lanes, length = HEADER.unpack_from(data)
        if self._left > most_entries or not 1 <= lanes <= 2**12:
            raise ValueError(f"packed targets announce {self._left} entries in {lanes} lanes")
        expected = 2 * sum(contexts * symbols for contexts, symbols in alphabets.values())
        tables = _decompress(data[HEADER.size : HEADER.size + length], expected)
        self._models, start = {}, 0
        for name, (contexts, symbols) in alphabets.items():
            self._models[name] = Model(tables[start : start + contexts * symbols].reshape(contexts, symbols))
            start += contexts * symbols
        self._decoder = Decoder(data[HEADER.size + length :], lanes)
        self._table_bytes = length
        self._counts = {name: np.zeros(size, np.int64) for name, size in alphabets.items()} if measured else {}
        self._low_bits: Counter[str] = Counter()

    def symbols(self, name: str, contexts: Ints, symbols: Ints | None) -> Ints:
        found = self._decoder.symbols(contexts, self._models[name])
        self._count(name, contexts, found)
        return found

    def ranks(self, name: str, counts: Ints, ranks: I32 | None) -> I32:
        total = int(counts.sum())
        self._left -= total
        if self._left < 0:
            raise ValueError("packed targets hold more entries than they announce")
        found = self._decoder.ranks(counts, total, self._models[name])
        if self._counts:
            before, left = before_and_left(counts, found)
            of_symbols, below = buckets(found - before)
            self._count(name, rank_contexts(before, left), of_symbols)
            self._low_bits[name] += int(below.sum())
        return found

    def codes(self, name: str, counts: Ints, ranks: I32, codes: U8 | None) -> U8:
        found = self._decoder.codes(counts, ranks, self._models[name])
        if self._counts:
            self._count(name, code_contexts(counts, ranks), found)
        return found

    def finish(self) -> None:
        if self._left:
            raise ValueError("packed targets hold fewer entries than they announce")
        self._decoder.finish()

    def _count(self, name: str, contexts: Ints, symbols: IntArray) -> None:
        if self._counts:
            np.add.at(self._counts[name], (contexts, symbols), 1)

    def add_to(self, streams: PackedStreams) -> None:
        """Add the sizes of a block that was read to its end with `measured`."""
        streams.add_block(self._counts, self._models, self._low_bits, self._table_bytes)


def _decompress(data: memoryview, expected: int) -> NDArray[np.uint16]:
    """Decompress to exactly `expected` bytes. Raises: ValueError."""
    try:
        # Checked first: the announced size is allocated, whatever max_output_size says.
        if (announced := zstandard.frame_content_size(data)) not in (expected, -1):
            raise ValueError(f"the frequencies of packed targets announce {announced} bytes, expected {expected}")
        tables = zstandard.ZstdDecompressor().decompress(data, max_output_size=expected)
        if len(tables) != expected:
            raise ValueError(f"the frequencies of packed targets have {len(tables)} bytes, expected {expected}")
    except zstandard.ZstdError as error:
        raise ValueError(f"the frequencies of packed targets are damaged: {error}") from error
    return np.frombuffer(tables, "<u2")
