"""Cuts long documents into windows, and says which tokens are predicted in each.

    document    <s> a b c d e f g h          seq_len 5, overlap 2

    windows     <s> a b c d
                        <s> c d e f
                                <s> e f g h
    predicted         a b c d     e f     g h

The first window is the beginning of the document. Each later one begins with the special tokens that the tokenizer puts
before a text, because many models predict badly without them: they have never seen a text that begins otherwise.
`overlap` tokens follow that earlier windows have predicted, and then tokens that none has. So every token is predicted
exactly once, with at least `overlap` tokens before it, except at the beginning of the document. Cost: `seq_len` /
(`seq_len` - `overlap` - special tokens) times the teacher's work for long documents.

Shapes: P pieces, T tokens of one piece. Index t is the prediction made from position t.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import datasets
import numpy as np

_LONG_PIECE = 256  # tokens; from this mean length on, copying piece by piece is faster


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents, each of which becomes one segment: special tokens, then tokens [start, stop) of a document.

    The tokens [start, start + context) are not predicted: other pieces do, or nothing does.
    """

    document: np.ndarray  # int64 [P]
    start: np.ndarray  # int64 [P]
    stop: np.ndarray  # int64 [P]
    context: np.ndarray  # int64 [P]
    special: np.ndarray  # int64 [P], number of special tokens put before; 0 in first windows, whose text has them

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, which: np.ndarray | slice) -> Pieces:
        return Pieces(*(getattr(self, each.name)[which] for each in fields(self)))

    @property
    def lengths(self) -> np.ndarray:
        return self.special + self.stop - self.start


def cut_documents(lengths: np.ndarray, seq_len: int, *, overlap: int = 1, special: np.ndarray | int = 0) -> Pieces:
    """Windows of at most `seq_len` tokens in which every token but a document's first is predicted once; none for
    documents of fewer than two tokens.

    Args:
        lengths: tokens of each document, int [documents].
        overlap: tokens of context at the beginning of each later window, at least 1.
        special: number of special tokens before each later window, by document; `seq_len` is greater than both
            together.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    step = seq_len - overlap - np.broadcast_to(special, lengths.shape)  # tokens that a later window predicts
    later = -(-np.maximum(lengths - seq_len, 0) // step)
    windows = (lengths > 1) + later
    document = np.repeat(np.arange(len(lengths)), windows)
    number = np.arange(len(document)) - (np.cumsum(windows) - windows)[document]  # in its document
    is_later, step = number > 0, step[document]
    new = np.where(is_later, seq_len + (number - 1) * step, 1)  # first token to predict
    context = np.where(is_later, overlap, 1)
    stop = np.minimum(np.where(is_later, new + step, seq_len), lengths[document])
    special = np.where(is_later, np.broadcast_to(special, lengths.shape)[document], 0)
    return Pieces(document, new - context, stop, context, special)


class DocumentTokens:
    """The tokens of all documents, as numpy views of the memory-mapped record batches.

    Args:
        prefix: special tokens that later windows begin with if their document does.
    """

    def __init__(self, tokens: datasets.Dataset, prefix: Sequence[int] = ()) -> None:
        batches = tokens.data.to_batches()
        self._ids = [batch.column("input_ids") for batch in batches]
        self._targets = [batch.column("is_target") for batch in batches]
        self._offsets = [column.offsets.to_numpy() for column in self._ids]
        sizes = [len(column) for column in self._ids]
        self._first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._prefix = np.asarray(prefix, dtype=np.int32)
        self.lengths = np.concatenate([np.diff(offsets) for offsets in self._offsets])

    def cut(self, lengths: np.ndarray, seq_len: int, overlap: int) -> Pieces:
        """Windows of the first `lengths` tokens, int64 [documents], of all documents."""
        return cut_documents(lengths, seq_len, overlap=overlap, special=self._special(lengths > seq_len))

    def _special(self, which: np.ndarray) -> np.ndarray:
        """int64 [documents]: the length of the prefix where a document begins with it, else 0.

        Args:
            which: bool [documents], those that are asked, which are longer than the prefix.
        """
        size = len(self._prefix)
        special = np.zeros(len(self.lengths), dtype=np.int64)
        for first, ids, offsets in zip(self._first[:-1], self._ids, self._offsets, strict=True):
            here = np.flatnonzero(which[first : first + len(ids)])
            tokens = ids.values.to_numpy()[offsets[here][:, None] + np.arange(size)]
            special[first + here[(tokens == self._prefix).all(axis=1)]] = size
        return special

    def read_predictions(self, pieces: Pieces) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Token ids int32 [T] and the loss mask bool [T] of a causal model, for each piece."""
        for (ids, targets), context, special in zip(self.read(pieces), pieces.context, pieces.special, strict=True):
            mask = np.zeros(special + len(ids), dtype=bool)
            # Position t predicts token t + 1; the last position of a segment predicts nothing.
            mask[special + context - 1 : -1] = targets[context:]
            yield np.concatenate([self._prefix[:special], ids]), mask

    def read(self, pieces: Pieces) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Token ids int32, and bool whether they are in the loss, of the document's own tokens of each piece."""
        batches = np.searchsorted(self._first, pieces.document, side="right") - 1
        places = pieces.document - self._first[batches]
        for batch, place, start, stop in zip(batches, places, pieces.start, pieces.stop, strict=True):
            base = self._offsets[batch][place]
            length = stop - start
            ids = self._ids[batch].values.slice(base + start, length).to_numpy()
            yield ids, _bools(self._targets[batch], base + start, length)

    def gather_predictions(self, pieces: Pieces) -> tuple[np.ndarray, np.ndarray]:
        """`read_predictions` of many pieces, concatenated: int32 and bool [tokens of all pieces]."""
        ends = np.cumsum(pieces.lengths)
        begins, own = ends - pieces.lengths, pieces.stop - pieces.start
        ids, targets = np.empty(pieces.lengths.sum(), np.int32), np.empty(pieces.lengths.sum(), bool)
        batches = np.searchsorted(self._first, pieces.document, side="right") - 1
        for batch in np.unique(batches):
            here = np.flatnonzero(batches == batch)
            base = self._offsets[batch][pieces.document[here] - self._first[batch]]
            start, stop, to = base + pieces.start[here], base + pieces.stop[here], ends[here] - own[here]
            first, length = int(start.min()), own[here]
            start, stop = start - first, stop - first
            block_ids = (
                self._ids[batch].values.slice(first, stop.max()).to_numpy()
            )  # a view; the bits below are unpacked
            block_targets = _bools(self._targets[batch], first, stop.max())
            if length.mean() >= _LONG_PIECE:
                for a, b, c in zip(start.tolist(), stop.tolist(), to.tolist(), strict=True):
                    ids[c : c + b - a], targets[c : c + b - a] = block_ids[a:b], block_targets[a:b]
                continue
            source, place = _ranges(start, length), _ranges(to, length)
            ids[place], targets[place] = block_ids[source], block_targets[source]
        with_prefix = begins[pieces.special > 0]
        ids[with_prefix[:, None] + np.arange(len(self._prefix))] = self._prefix
        targets[_ranges(begins, pieces.special + pieces.context)] = False
        masks = np.zeros(len(ids), bool)
        masks[:-1] = targets[1:]
        return ids, masks

    def count_targets(self, pieces: Pieces) -> np.ndarray:
        """Number of predictions in the loss for each piece, int64 [P]."""
        counts = np.empty(len(pieces), dtype=np.int64)
        batches = np.searchsorted(self._first, pieces.document, side="right") - 1
        order = np.argsort(batches, kind="stable")
        bounds = np.searchsorted(batches[order], np.arange(len(self._ids) + 1))
        for batch, (lo, hi) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            offsets = self._offsets[batch]
            targets = _bools(self._targets[batch], offsets[0], offsets[-1] - offsets[0])
            before = np.concatenate([[0], np.cumsum(targets)])  # targets before each token
            here = order[lo:hi]
            base = offsets[pieces.document[here] - self._first[batch]] - offsets[0]
            counts[here] = before[base + pieces.stop[here]] - before[base + (pieces.start + pieces.context)[here]]
        return counts


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """All of [start, start + length) one after the other."""
    inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(starts, lengths) + inside


def _bools(column: Any, start: int, length: int) -> np.ndarray:
    return column.values.slice(start, length).to_numpy(zero_copy_only=False)
