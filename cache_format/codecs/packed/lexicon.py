"""Which tokens a teacher is likely to expect after each token: learned from the first shard, stored once.

A target id of 16 or 17 bits says little that is new: after most tokens the teacher considers the same few dozens, and
everywhere the frequent words. So the packed encoding names a target by its **rank**: first the candidates of the input
token, most frequent first, then all tokens of the vocabulary by their frequency among all targets. A rank stands for
exactly one token, and every token has one.

The table pays for itself: a candidate is kept if it occurred often enough in the sample that naming it by its place in
the list saves more over the whole cache than its own bytes.

Shapes: V vocabulary, P candidates of all tokens, E entries.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cache_format.cache_errors import FormatError
from cache_format.codecs.ipc import MAGIC_BYTES, check_expansion, message_buffers

# What pyarrow and our own parser of messages raise for bytes of something else.
UNREADABLE = (pa.ArrowException, ValueError, OSError, LookupError, AttributeError, struct.error, StopIteration)
MOST_CANDIDATES = 256  # of one token
COST, SAVING = 14, 4  # bits of a candidate in the table, and by which it shortens an entry: rough, and not critical

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Lexicon:
    """`order` [V]: all tokens, frequent ones first. Token c's candidates: `candidates[starts[c] : starts[c + 1]]`."""

    order: Ints  # [V]
    starts: Ints  # [V + 1]
    candidates: Ints  # [P]

    @property
    def vocab_size(self) -> int:
        return len(self.order)

    @classmethod
    def learn(cls, contexts: Ints, ids: Ints, vocab_size: int, weight: float) -> Lexicon:
        """From entries: target `ids` [E], each with the input token from which it is predicted.

        Args:
            weight: how many times as many entries the whole cache has.
        """
        order = np.argsort(-np.bincount(ids, minlength=vocab_size), kind="stable")
        pairs, counts = np.unique(contexts * vocab_size + ids, return_counts=True)
        often = counts >= max(2, COST / SAVING / weight)
        pairs, counts = pairs[often], counts[often]
        pairs = pairs[np.lexsort((-counts, pairs // vocab_size))]
        first = np.searchsorted(pairs // vocab_size, np.arange(vocab_size))
        pairs = pairs[np.arange(len(pairs)) - first[pairs // vocab_size] < MOST_CANDIDATES]
        starts = np.searchsorted(pairs // vocab_size, np.arange(vocab_size + 1))
        return cls(order, starts, pairs % vocab_size)

    def ranks(self, contexts: Ints, ids: Ints) -> Ints:
        """[E] the rank of each id after its input token."""
        pairs, places = self._by_pair
        lists = np.diff(self.starts)[contexts]
        ranks = lists + self._place_in_order[ids]
        if len(pairs):
            wanted = contexts * self.vocab_size + ids
            found = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
            ranks = np.where(pairs[found] == wanted, places[found], ranks)
        return ranks

    def ids(self, contexts: Ints, ranks: Ints) -> Ints:
        """Inverse of `ranks`. Raises: ValueError for a rank that stands for nothing."""
        in_order = ranks - np.diff(self.starts)[contexts]
        if (in_order >= self.vocab_size).any() or (ranks < 0).any():
            raise ValueError("packed targets hold a rank that no token has")
        if not len(self.candidates):
            return self.order[in_order]
        place = np.minimum(self.starts[contexts] + ranks, len(self.candidates) - 1)
        return np.where(in_order < 0, self.candidates[place], self.order[np.maximum(in_order, 0)])

    @cached_property
    def _place_in_order(self) -> Ints:
        places = np.empty(self.vocab_size, np.int64)
        places[self.order] = np.arange(self.vocab_size)
        return places

    @cached_property
    def _by_pair(self) -> tuple[Ints, Ints]:
        """Pairs of input token and candidate as one ascending number, and the place of each in its list."""
        lists = np.diff(self.starts)
        pairs = np.repeat(np.arange(self.vocab_size), lists) * self.vocab_size + self.candidates
        places = np.arange(len(pairs)) - np.repeat(self.starts[:-1], lists)
        by_pair = np.argsort(pairs)
        return pairs[by_pair], places[by_pair]

    def to_bytes(self) -> bytes:
        """An Arrow IPC file of one row: tokens in order, candidates per token, candidates of all tokens."""
        narrow = pa.uint16() if self.vocab_size <= 2**16 else pa.uint32()
        # Tokens that no target names stand at the end, ascending: nothing has to be said of them.
        ends = np.flatnonzero(np.diff(self.order) < 0)
        named = self.order[: ends[-1] + 2] if len(ends) else self.order[:0]
        lists = {"order": named, "candidate_counts": np.diff(self.starts), "candidates": self.candidates}
        types = {"order": narrow, "candidate_counts": pa.uint16(), "candidates": narrow}
        row = pa.record_batch({name: pa.array([values], pa.list_(types[name])) for name, values in lists.items()})
        sink = io.BytesIO()
        options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=19))
        with pa.ipc.new_file(sink, row.schema, options=options) as file:
            file.write_batch(row)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, vocab_size: int, where: str) -> Lexicon:
        """Raises: FormatError, naming `where`."""
        try:
            if pa.ipc.open_file(pa.py_buffer(data)).num_record_batches != 1:
                raise ValueError("expected one record batch")
            # Read as a stream, so that what was measured is what is read, wherever the footer may point.
            stream = pa.py_buffer(data).slice(MAGIC_BYTES)
            check_expansion(sum(sum(m.uncompressed) for m in message_buffers(stream, with_end=True)), len(data))
            batch = pa.ipc.open_stream(stream).read_next_batch()
            batch.validate(full=True)
            named, counts, candidates = (
                batch.column(name).values.to_numpy().astype(np.int64)
                for name in ("order", "candidate_counts", "candidates")
            )
        except UNREADABLE as error:
            reason = " ".join(str(error).split())
            raise FormatError(f"{where}: not a lexicon ({reason}). Restore it from a copy.") from error
        tokens = np.concatenate([named, candidates])
        known = len(counts) == vocab_size and 0 <= tokens.min(initial=0) <= tokens.max(initial=0) < vocab_size
        others = np.setdiff1d(np.arange(vocab_size if known else 0), named, assume_unique=True)
        lexicon = cls(np.concatenate([named, others]), np.concatenate([[0], np.cumsum(counts)]), candidates)
        if not known or lexicon.vocab_size != vocab_size:
            raise FormatError(
                f"{where}: found a lexicon of other tokens, expected the {vocab_size:,} of the manifest. "
                "Restore it from a copy."
            )
        if lexicon.starts[-1] != len(candidates) or counts.min() < 0:
            raise FormatError(
                f"{where}: found {len(candidates)} candidates, its counts add up to {lexicon.starts[-1]}. "
                "Restore it from a copy."
            )
        return lexicon
