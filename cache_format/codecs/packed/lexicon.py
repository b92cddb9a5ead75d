"""Ranks of target tokens, from statistics of the first shard, stored once for the whole cache.

A target id takes 16 or 17 bits, but after most tokens a teacher considers the same few dozen tokens, and frequent words
everywhere. So the packed encoding names a target by its **rank**: first the candidates of the input token, most
frequent first, then all tokens of the vocabulary by their frequency among all targets. Every rank below the length of
both lists names one token, and every token has a rank. A candidate is kept only if naming it by its place in the list
is expected to save more bits over the whole cache than its entry in the lexicon costs.

Shapes: V vocabulary, P candidates of all tokens, E entries.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from cache_format.cache_errors import FormatError
from cache_format.codecs.ipc import MAGIC_BYTES, UNREADABLE, check_expansion, message_buffers
from cache_format.codecs.packed.loops import I32, U32, Ints, loops
from cache_format.rows.types import joint_index

MOST_CANDIDATES = 256  # of one token
COST, SAVING = 14, 4  # bits that a candidate takes in the lexicon and saves per entry; estimates, not critical


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
        """Learn from entries: target `ids` [E] and the input token `contexts` [E] from which each is predicted.

        Args:
            weight: entries of the whole cache divided by E.
        """
        order = np.argsort(-np.bincount(ids, minlength=vocab_size), kind="stable")
        pairs, counts = np.unique(joint_index(contexts, ids, vocab_size), return_counts=True)
        often = counts >= max(2, COST / SAVING / weight)
        pairs, counts = pairs[often], counts[often]
        context, candidate = np.divmod(pairs, vocab_size)
        order_of_pairs = np.lexsort((-counts, context))
        context, candidate = context[order_of_pairs], candidate[order_of_pairs]
        first = np.searchsorted(context, np.arange(vocab_size))
        kept = np.arange(len(context)) - first[context] < MOST_CANDIDATES
        context, candidate = context[kept], candidate[kept]
        return cls(order, np.searchsorted(context, np.arange(vocab_size + 1)), candidate)

    def ranks(self, contexts: Ints, ids: Ints) -> Ints:
        """[E] the rank of each id after its input token."""
        pairs, places = self._by_pair
        lists = np.diff(self.starts)[contexts]
        ranks = lists + self._place_in_order[ids]
        if len(pairs):
            wanted = joint_index(contexts, ids, self.vocab_size)
            found = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
            ranks = np.where(pairs[found] == wanted, places[found], ranks)
        return ranks

    def ids(self, contexts: Ints, ranks: I32, counts: Ints) -> U32:
        """[E] inverse of `ranks`.

        Args:
            contexts: [N] input tokens.
            ranks: [E] those after the first input token, then those after the next.
            counts: [N] number of ranks after each.

        Raises: ValueError for a rank that no token has.
        """
        found = np.empty(len(ranks), np.uint32)
        if not loops().ids(contexts, counts, ranks, self.starts, self._ranked, found):
            raise ValueError("packed targets hold a rank that no token has")
        return found

    @cached_property
    def _ranked(self) -> U32:
        """[P + V] what a rank names: the candidates of all tokens, then all tokens in order."""
        return np.concatenate([self.candidates, self.order]).astype(np.uint32)

    @cached_property
    def _place_in_order(self) -> Ints:
        places = np.empty(self.vocab_size, np.int64)
        places[self.order] = np.arange(self.vocab_size)
        return places

    @cached_property
    def _by_pair(self) -> tuple[Ints, Ints]:
        """Pairs of input token and candidate as one ascending number, and the place of each in its list."""
        lists = np.diff(self.starts)
        pairs = joint_index(np.repeat(np.arange(self.vocab_size), lists), self.candidates, self.vocab_size)
        places = np.arange(len(pairs)) - np.repeat(self.starts[:-1], lists)
        by_pair = np.argsort(pairs)
        return pairs[by_pair], places[by_pair]

    def to_bytes(self) -> bytes:
        """An Arrow IPC file of one row: tokens in order, candidates per token, candidates of all tokens."""
        narrow = pa.uint16() if self.vocab_size <= 2**16 else pa.uint32()
        # Tokens that are not targets come last, in ascending order, and need not be stored.
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
            # Read as a stream: a footer could point at buffers whose size was not checked.
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
                f"{where}: found a lexicon of another vocabulary, expected {vocab_size:,} tokens as in the manifest. "
                "Restore it from a copy."
            )
        if lexicon.starts[-1] != len(candidates) or counts.min() < 0:
            raise FormatError(
                f"{where}: found {len(candidates)} candidates, its counts add up to {lexicon.starts[-1]}. "
                "Restore it from a copy."
            )
        return lexicon
