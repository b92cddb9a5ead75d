"""Documents to rows, the second step of stage one.

    lengths ─▶ pieces (document, start, stop) ─▶ rows

A document longer than a row is cut into windows that overlap by one token, so that every next-token prediction of the
text is made exactly once. Short documents and the ends of long ones share rows, as segments that do not attend to each
other. Everything that is dropped is counted in the report.

Best fit over a bounded number of open rows packs a million documents in a second and keeps neighbours together, so that
reading is nearly sequential. (Ding et al. 2024, https://arxiv.org/abs/2404.10830, sort the corpus by length instead:
slightly fuller rows, random reads.)

Shapes: P pieces, R rows, T tokens and S segments of one row. Index t is the prediction made from position t.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from cache_format import CacheRow
from pipeline.errors import DataError
from pipeline.models.objective import Objective
from pipeline.teacher.cache_config import DataConfig
from pipeline.teacher.text.corpus import Documents, tokenise_documents
from pipeline.teacher.text.data_paths import data_name
from pipeline.teacher.text.token_stream import StreamFacts, add_rows_to, load_or_compute

# Rows that are open for further pieces. On log-normal, uniform and chat-like lengths and rows of 1024 tokens,
# 8 open rows give a fill ratio of 0.918 to 0.9997, 64 give 0.9755 to 0.9997, and 1024 at most 0.0003 more.
_OPEN_ROWS = 64
_TOKENS_PER_BLOCK = 2**20  # read together for the fingerprint
_LONG_PIECE = 256  # tokens; from this mean length on, copying piece by piece is faster


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents, each of which becomes one segment: tokens [start, stop) of a document."""

    document: np.ndarray  # int64 [P]
    start: np.ndarray  # int64 [P]
    stop: np.ndarray  # int64 [P]

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, which: np.ndarray | slice) -> Pieces:
        return Pieces(self.document[which], self.start[which], self.stop[which])

    @property
    def lengths(self) -> np.ndarray:
        return self.stop - self.start


@dataclass(frozen=True)
class RowPlan:
    """Row r consists of pieces[offsets[r] : offsets[r + 1]]."""

    pieces: Pieces
    offsets: np.ndarray  # int64 [R + 1]
    report: dict[str, int]

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1


def plan_rows(
    lengths: np.ndarray,
    *,
    seq_len: int,
    packing: bool,
    keep: Callable[[Pieces], np.ndarray] | None = None,
) -> RowPlan:
    """Assign pieces of documents to rows.

    Args:
        lengths: tokens of each document, int [documents].
        seq_len: maximum number of tokens in a row, at least 2.
        packing: several pieces per row instead of one.
        keep: which pieces to keep, bool [P]; default: all. The others are counted in the report.
    """
    pieces = cut_documents(lengths, seq_len)
    kept = pieces[keep(pieces)] if keep is not None else pieces
    rows = pack_pieces(kept.lengths, seq_len) if packing else np.arange(len(kept))
    order = np.argsort(rows, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows))]).astype(np.int64)
    report = {
        "documents": len(lengths),
        "empty_documents": int(np.count_nonzero(lengths == 0)),
        "single_token_pieces": int(np.count_nonzero(lengths == 1)),
        "documents_cut": int(np.count_nonzero(lengths > seq_len)),
        "windows": len(pieces),
        "windows_without_targets": len(pieces) - len(kept),
        "rows": len(offsets) - 1,
        "tokens": int(kept.lengths.sum()),
    }
    return RowPlan(kept[order], offsets, report)


def cut_documents(lengths: np.ndarray, seq_len: int) -> Pieces:
    """Windows that overlap by one token; none for documents of fewer than two tokens."""
    step = seq_len - 1  # predictions per window
    transitions = np.maximum(np.asarray(lengths, dtype=np.int64) - 1, 0)
    windows = -(-transitions // step)
    document = np.repeat(np.arange(len(lengths)), windows)
    first_window = np.cumsum(windows) - windows
    start = (np.arange(len(document)) - first_window[document]) * step
    stop = np.minimum(start + seq_len, transitions[document] + 1)
    return Pieces(document, start, stop)


def pack_pieces(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """The row of each piece, int64 [P]: the fullest open row with room for it, or a new one."""
    rows = np.empty(len(lengths), dtype=np.int64)
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), ascending
    next_row = 0
    for piece, length in enumerate(lengths.tolist()):
        fit = bisect_left(open_rows, (length, 0))
        if fit < len(open_rows):
            free, row = open_rows.pop(fit)
        else:
            free, row = seq_len, next_row
            next_row += 1
        rows[piece] = row
        insort(open_rows, (free - length, row))
        if len(open_rows) > _OPEN_ROWS:
            del open_rows[0]  # the fullest
    return rows


@dataclass(frozen=True)
class TokenRow:
    """One row of the corpus: S segments with T tokens in total."""

    input_ids: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # bool [T]; at t: whether the prediction made from t, of token t + 1, is in the loss
    segment_lengths: np.ndarray  # int32 [S], sum T
    labels: np.ndarray | None = None  # int32 [T]; masked rows only: the true token at t, -100 outside the loss mask


class TokenCorpus:
    """The rows of a corpus as a sequence, each assembled from memory-mapped documents on access.

    Attributes:
        num_tokens: tokens of all rows.
        num_loss_tokens: loss tokens of all rows.
        objective: the objective of the models that these rows are for.
        report: counts by name of what was cut, dropped and packed.
        description: the source of the text and all options that shaped it, for the cache's metadata.
        warnings: what the user should see but need not act on.
    """

    objective: Objective = "causal"

    def __init__(self, documents: Documents, config: DataConfig) -> None:
        self._documents, self._config = documents, config
        self._tokens = DocumentTokens(documents.tokens)
        plan = plan_rows(
            self._tokens.lengths,
            seq_len=config.seq_len,
            packing=config.packing is not False,
            keep=lambda pieces: self._tokens.count_targets(pieces) > 0,
        )
        if plan.num_rows == 0:
            raise DataError(
                f"{data_name(config.data)}: no loss tokens in it ({format_counts(plan.report)}), expected texts of two "
                f"tokens or more, with `loss_on` {documents.loss_on}. Check `text_column` and `loss_on`."
            )
        self._plan = plan
        self.num_tokens = plan.report["tokens"]
        self.num_loss_tokens = int(self._tokens.count_targets(plan.pieces).sum())
        self.report: dict[str, int | float] = {
            **plan.report,
            "counted_tokens": self.num_loss_tokens,
            "fill_ratio": self.num_tokens / (plan.num_rows * config.seq_len),
            "ignored_files": documents.source.ignored_files,
        }
        self.description = describe(documents, config)
        self.warnings = documents.warnings

    def __len__(self) -> int:
        return self._plan.num_rows

    def __getitem__(self, row: int) -> TokenRow:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        pieces = self._plan.pieces[slice(self._plan.offsets[row], self._plan.offsets[row + 1])]
        ids, masks = zip(*self._tokens.read_predictions(pieces), strict=True)
        return TokenRow(np.concatenate(ids), np.concatenate(masks), pieces.lengths.astype(np.int32))

    def __iter__(self) -> Iterator[TokenRow]:
        return (self[row] for row in range(len(self)))

    @cached_property
    def token_stream_sha256(self) -> str:
        """sha256 of all rows: T and S as little-endian int64, then ids int32, loss mask uint8, segments int32."""
        options = {"window_length": self._config.seq_len, "packing": self._config.packing is not False}
        return load_or_compute(self._documents.tokens, options, (__file__,), self._fingerprint).sha256

    def _fingerprint(self) -> StreamFacts:
        digest, pieces, offsets = hashlib.sha256(), self._plan.pieces, self._plan.offsets
        lengths = pieces.lengths
        ends = np.concatenate([[0], np.cumsum(lengths)])[offsets]  # tokens before each row
        row = 0
        while row < len(self):
            stop = max(row + 1, int(np.searchsorted(ends, ends[row] + _TOKENS_PER_BLOCK, side="right")) - 1)
            here = slice(offsets[row], offsets[stop])
            ids, masks = self._tokens.gather_predictions(pieces[here])
            tokens, counts = np.diff(ends[row : stop + 1]), np.diff(offsets[row : stop + 1])
            add_rows_to(digest, ids, masks, lengths[here].astype(np.int32), tokens, counts)
            row = stop
        return StreamFacts(digest.hexdigest(), self.num_tokens, self.num_loss_tokens)


def add_row_to(digest: Any, row: TokenRow | CacheRow) -> None:
    """Add a row to the digest: T and S as little-endian int64, ids int32, mask uint8, segments and any labels int32."""
    digest.update(struct.pack("<qq", len(row.input_ids), len(row.segment_lengths)))
    for array, dtype in (
        (row.input_ids, "<i4"),
        (row.loss_mask, "u1"),
        (row.segment_lengths, "<i4"),
        (row.labels, "<i4"),
    ):
        if array is not None:
            digest.update(array.astype(dtype, copy=False))


def describe(documents: Documents, config: DataConfig) -> dict[str, Any]:
    """The source of the text and all options that shaped it, for the cache's metadata."""
    return {
        "source": data_name(config.data),
        "files": documents.source.describe_files(),
        "format": documents.columns.format,
        "columns": list(documents.columns.names),
        **config.to_json(),
        **documents.options,
        "loss_on": documents.loss_on,
    }


class DocumentTokens:
    """The tokens of all documents, as numpy views of the memory-mapped record batches."""

    def __init__(self, tokens: datasets.Dataset) -> None:
        batches = tokens.data.to_batches()
        self._ids = [batch.column("input_ids") for batch in batches]
        self._targets = [batch.column("is_target") for batch in batches]
        self._offsets = [column.offsets.to_numpy() for column in self._ids]
        sizes = [len(column) for column in self._ids]
        self._first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.lengths = np.concatenate([np.diff(offsets) for offsets in self._offsets])

    def read_predictions(self, pieces: Pieces) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Token ids int32 [T] and the loss mask bool [T] of a causal model, for each piece."""
        for ids, targets in self.read(pieces):
            mask = np.zeros(len(ids), dtype=bool)
            # Position t predicts token t + 1; the last position of a segment predicts nothing.
            mask[:-1] = targets[1:]
            yield ids, mask

    def read(self, pieces: Pieces) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Token ids int32 [T], and bool [T] whether they are in the loss, for each piece."""
        batches = np.searchsorted(self._first, pieces.document, side="right") - 1
        places = pieces.document - self._first[batches]
        for batch, place, start, stop in zip(batches, places, pieces.start, pieces.stop, strict=True):
            base = self._offsets[batch][place]
            length = stop - start
            ids = self._ids[batch].values.slice(base + start, length).to_numpy()
            yield ids, _bools(self._targets[batch], base + start, length)

    def gather_predictions(self, pieces: Pieces) -> tuple[np.ndarray, np.ndarray]:
        """`read_predictions` of many pieces, concatenated: int32 and bool [tokens of all pieces]."""
        lengths = pieces.lengths
        ends = np.cumsum(lengths)
        ids, targets = np.empty(lengths.sum(), np.int32), np.empty(lengths.sum(), bool)
        batches = np.searchsorted(self._first, pieces.document, side="right") - 1
        for batch in np.unique(batches):
            here = np.flatnonzero(batches == batch)
            base = self._offsets[batch][pieces.document[here] - self._first[batch]]
            start, stop, to = base + pieces.start[here], base + pieces.stop[here], ends[here] - lengths[here]
            first, length = int(start.min()), lengths[here]
            start, stop = start - first, stop - first
            block_ids = (
                self._ids[batch].values.slice(first, stop.max()).to_numpy()
            )  # a view; the bits below are unpacked
            block_targets = _bools(self._targets[batch], first, stop.max())
            if length.mean() >= _LONG_PIECE:
                for a, b, c in zip(start.tolist(), stop.tolist(), to.tolist(), strict=True):
                    ids[c : c + b - a], targets[c : c + b - a] = block_ids[a:b], block_targets[a:b]
                continue
            inside = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
            source, place = np.repeat(start, length) + inside, np.repeat(to, length) + inside
            ids[place], targets[place] = block_ids[source], block_targets[source]
        masks = np.zeros(len(ids), bool)
        masks[:-1] = targets[1:]
        masks[ends - 1] = False
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
            counts[here] = before[base + pieces.stop[here]] - before[base + pieces.start[here] + 1]
        return counts


def build_corpus(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> TokenCorpus:
    """Text to rows for a causal model.

    Raises:
        DataError, ModelError, ConfigError: as `tokenise_documents`, or no loss tokens.
    """
    config = replace(config, packing=config.packing is not False, append_eos=config.append_eos is not False)
    return TokenCorpus(tokenise_documents(config, tokenizer), config)


def _bools(column: Any, start: int, length: int) -> np.ndarray:
    return column.values.slice(start, length).to_numpy(zero_copy_only=False)


def format_counts(report: Mapping[str, int | float]) -> str:
    """The counts as text, for an error message."""
    return ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in report.items())
