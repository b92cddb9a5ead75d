"""The documents of a row in the student's tokens; documents that are too long for the student are split into pieces.

The student reads each piece as a document. It starts with BOS if the document does, and ends where a token of the
teacher ends. Nothing predicts its first token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cache_format import CacheRow
from pipeline.student.data.retokenise import Retokeniser, Token

# Reasons why text is not learned that the loss mask includes, as `CrossTokenizerDataset.describe` prints them.
LOST = {
    "special": "special tokens without a counterpart",
    "bytes": "bytes that are not UTF-8",
    "piece": "first tokens of the pieces of long documents",
    "part": "tokens that are only partly in the loss",
}


@dataclass(frozen=True)
class Piece:
    """Tokens of a document that the student reads together.

    Attributes:
        counted: whether the prediction made from each token is in the loss.
        teachers: [n] the teacher's position in the row that ends at the same place, at loss tokens; else -1.
    """

    tokens: list[Token]
    counted: list[bool]
    teachers: np.ndarray


@dataclass(frozen=True)
class Document:
    """A document of a row.

    Attributes:
        ids: the teacher's tokens.
        ends: atoms (see `retokenise.py`) up to the end of each token.
        learned: [atoms] bool, whether the loss mask includes the token of an atom.
        pieces: what the student reads.
    """

    ids: Sequence[int] | np.ndarray
    ends: list[int]
    learned: np.ndarray
    pieces: list[Piece]

    def lost(self, special: set[int]) -> dict[str, int]:
        """Reason -> number of atoms that are to be learned and are not."""
        said, counted, first = np.zeros((3, len(self.learned)), bool)
        for i, piece in enumerate(self.pieces):
            for token, learn in zip(piece.tokens, [False, *piece.counted], strict=False):
                said[token.start : token.end] = True
                counted[token.start : token.end] |= learn
            if i:
                for token in [t for t in piece.tokens if t.end > t.start][:1]:  # behind BOS
                    first[token.start : token.end] = True
        in_special = np.repeat([int(i) in special for i in self.ids], np.diff([0, *self.ends]))
        left = self.learned & ~counted
        found = {
            "special": left & ~said & in_special,
            "bytes": left & ~said & ~in_special,
            "piece": left & said & first,
            "part": left & said & ~first,
        }
        return {why: int(atoms.sum()) for why, atoms in found.items()}


def documents_of(row: CacheRow, retokeniser: Retokeniser, max_length: int | None) -> Iterator[Document]:
    """The documents of a row; pieces of at most `max_length` tokens."""
    ends = np.cumsum(row.segment_lengths)
    for start, stop in zip(ends - row.segment_lengths, ends, strict=True):
        ids = row.input_ids[start:stop]
        found = retokeniser.document(ids)
        learned = _learned_atoms(found.ends, row.loss_mask[start:stop])
        teachers = np.full(len(found.tokens), -1)
        for s, t in found.aligned():
            teachers[s] = start + t
        bos = retokeniser.student.tokenizer.bos_token_id
        begin = [replace(t, end=t.start) for t in found.tokens[:1] if t.id == bos]
        pieces = []
        for first, last in [] if not found.tokens else _bounds(teachers >= 0, max_length, len(begin)):
            again = begin if first else []
            tokens = [*again, *found.tokens[first:last]]
            # Whether the next token is to be learned; none follows the last one, and the first one is not predicted.
            here = [b.end > b.start and bool(learned[b.start : b.end].all()) for b in tokens[1:]] + [False]
            if again:
                here[0] = False
            theirs = np.concatenate([np.full(len(again), -1), teachers[first:last]])
            theirs[~np.asarray(here)] = -1
            pieces.append(Piece(tokens, here, theirs))
        yield Document(ids, found.ends, learned, pieces)


def _bounds(aligned: np.ndarray, longest: int | None, begin: int) -> Iterator[tuple[int, int]]:
    """Pieces [first, last) of at most `longest` tokens of a document, `begin` fewer from the second piece on.

    Each ends where tokens of both sides end, unless it would then be less than half as long as allowed. Pieces of a
    single token, of which nothing can be learned, are avoided if possible.
    """
    first = 0
    while longest is not None and len(aligned) - first > (room := max(1, longest - (begin if first else 0))):
        room = max(1, min(room, len(aligned) - first - 2))
        ends = np.flatnonzero(aligned[first : first + room])
        at = ends[-1] if len(ends) and ends[-1] >= room // 2 else room - 1
        yield first, first + int(at) + 1
        first += int(at) + 1
    yield first, len(aligned)


def _learned_atoms(ends: Sequence[int], loss_mask: np.ndarray) -> np.ndarray:
    """[atoms] whether the prediction of an atom's token is in the teacher's loss mask."""
    sizes = np.diff([0, *ends])
    learned = np.concatenate([[False], loss_mask[:-1]])  # the prediction of token t + 1 is made from t
    return np.repeat(learned, sizes)
