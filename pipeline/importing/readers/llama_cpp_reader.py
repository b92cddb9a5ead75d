"""Base files of llama-perplexity's KL divergence: log-probabilities of the whole vocabulary, 16 bits each.

    "_logits_", int32 n_ctx, n_vocab, n_chunk, int32 tokens [n_chunk · n_ctx], then n_ctx − 1 − n_ctx/2 rows per chunk:
    float32 scale, float32 min_logprob, uint16 [V], one more if V is odd       log p = scale · value + min_logprob

Row j of a chunk is the prediction from position n_ctx/2 + j: the first half is context only. Values more than 16 below
the largest are clipped to it. Only the most likely are read out of each row; the others are the tail mass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import DataError
from pipeline.importing.readers.foreign_rows import BadRow, ForeignRow
from pipeline.importing.readers.format_reader import Reader
from pipeline.importing.readers.source_files import Record

MAGIC = b"_logits_"
HEADER = len(MAGIC) + 3 * 4


@dataclass(frozen=True)
class _Base:
    """One file. Rows are uint16 in pairs for the two floats, then V values, padded to an even number."""

    path: Path
    n_ctx: int
    n_vocab: int
    n_chunk: int

    @classmethod
    def open(cls, path: Path) -> _Base:
        with path.open("rb") as stream:
            start = stream.read(HEADER)
        if len(start) < HEADER or start[: len(MAGIC)] != MAGIC:
            raise DataError(
                f"{path}: it does not begin with _logits_, as files of llama-perplexity do. Check `format`."
            )
        base = cls(path, *(int(each) for each in np.frombuffer(start, "<i4", offset=len(MAGIC))))
        if base.n_ctx < 4 or base.n_vocab < 2 or base.n_chunk < 1:
            numbers = f"n_ctx {base.n_ctx}, n_vocab {base.n_vocab}, n_chunk {base.n_chunk}"
            raise DataError(f"{path}: {numbers}, expected a context of at least 4. The header is damaged.")
        return base

    @property
    def first(self) -> int:
        """The first position with a prediction."""
        return self.n_ctx // 2

    @property
    def rows(self) -> int:
        """Predictions of a chunk."""
        return self.n_ctx - 1 - self.first

    @property
    def width(self) -> int:
        """uint16 numbers of a row."""
        return 2 * ((self.n_vocab + 1) // 2) + 4

    @property
    def rows_at(self) -> int:
        return HEADER + 4 * self.n_ctx * self.n_chunk

    def tokens(self, chunk: int) -> np.ndarray:
        return np.fromfile(self.path, "<i4", self.n_ctx, offset=HEADER + 4 * self.n_ctx * chunk)

    def values(self, chunk: int) -> np.ndarray:
        """[rows, width], fewer rows if the file is cut off."""
        place = self.rows_at + 2 * self.width * self.rows * chunk
        data = np.fromfile(self.path, "<u2", self.rows * self.width, offset=place)
        return data[: len(data) // self.width * self.width].reshape(-1, self.width)


@dataclass(frozen=True, kw_only=True)
class LlamaCppReader(Reader):
    """Args: top_k: entries to read of each row."""

    top_k: int

    @property
    def total(self) -> int | None:
        return sum(_Base.open(path).n_chunk for path in self.files)

    def records(self) -> Iterator[Record]:
        for path in self.files:
            base = _Base.open(path)
            for chunk in range(base.n_chunk):
                yield Record(f"{path}, chunk {chunk}", (base, chunk))

    def decode(self, record: Record) -> ForeignRow:
        base, chunk = record.data
        tokens, rows = base.tokens(chunk), base.values(chunk)
        if len(tokens) != base.n_ctx or len(rows) != base.rows:
            raise BadRow(f"{len(rows)} of {base.rows} predictions: the file is cut off")
        scale, least = (np.ascontiguousarray(rows[:, at : at + 2]).view("<f4") for at in (0, 2))
        values = rows[:, 4 : 4 + base.n_vocab]
        top_k = min(self.top_k, base.n_vocab)
        ids = np.argpartition(values, base.n_vocab - top_k, axis=1)[:, base.n_vocab - top_k :]
        logprobs = np.take_along_axis(values, ids, axis=1).astype(np.float64) * scale + least
        counts = np.zeros(base.n_ctx, np.int64)
        counts[base.first : base.first + base.rows] = top_k
        return ForeignRow(
            input_ids=tokens.astype(np.int64),
            counts=counts,
            ids=ids.astype(np.int64).ravel(),
            values=logprobs.ravel(),
            shift=self.shift,
            position_mask=counts > 0,
        )
