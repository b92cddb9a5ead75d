"""Reads character vectors of an installed R package, without R.

A package stores its data in a lazy-load database: `Rdata.rdx` (gzip) holds the place of each variable in `Rdata.rdb`,
where a variable is a length (4 bytes, big-endian) followed by zlib data. Both hold R's serialisation in XDR form ("R
Internals", section 1.8), of which this reads the parts that such an index and a character vector need.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

SYMBOL, PAIRLIST, CHARS, LOGICALS, INTEGERS, STRINGS, LIST, REFERENCE, NOTHING = 1, 2, 9, 10, 13, 16, 19, 255, 254
HAS_ATTRIBUTES, HAS_TAG = 1 << 9, 1 << 10


def read_strings(directory: Path) -> dict[str, list[str]]:
    """Variable -> its strings, for the `data` directory of an R package. Raises: ValueError for other kinds of data."""
    index = _Reader(zlib.decompress((directory / "Rdata.rdx").read_bytes(), wbits=47)).document()
    database = (directory / "Rdata.rdb").read_bytes()
    found = {}
    for name, (start, length) in index["variables"].items():
        found[name] = _Reader(zlib.decompress(database[start + 4 : start + length])).document()
    return found


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def document(self) -> Any:
        if self.data[:2] != b"X\n":
            raise ValueError("not R's serialisation in XDR form")
        self.at = 2
        version, _, _ = (self.integer() for _ in range(3))
        if version == 3:  # the name of the native encoding
            self.take(self.integer())
        return self.item()

    def item(self) -> Any:
        flags = self.integer()
        kind = flags & 255
        if kind == NOTHING:
            return None
        if kind == REFERENCE:  # to a symbol, of which the names of attributes are made
            return "names"
        if kind == SYMBOL:
            return self.item()
        if kind == CHARS:
            length = self.integer()
            return None if length == -1 else self.take(length).decode("utf-8", "replace")
        if kind == PAIRLIST:
            tag = self.item() if flags & HAS_TAG else None
            value = self.item()
            return {tag: value, **(self.item() or {})}
        if kind not in (STRINGS, LIST, INTEGERS, LOGICALS):
            raise ValueError(f"R data of type {kind}, expected character vectors")
        length = self.integer()
        values = [self.item() if kind in (STRINGS, LIST) else self.integer() for _ in range(length)]
        names = (self.item() or {}).get("names") if flags & HAS_ATTRIBUTES else None
        return values if names is None else dict(zip(names, values, strict=True))

    def integer(self) -> int:
        return struct.unpack(">i", self.take(4))[0]

    def take(self, length: int) -> bytes:
        self.at += length
        return self.data[self.at - length : self.at]
