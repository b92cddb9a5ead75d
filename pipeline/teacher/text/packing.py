"""Documents to rows, the second step of stage one.

    documents ─▶ pieces ─▶ rows

A document longer than a row is cut into windows (`windows.py`), so that every next-token prediction of the text is made
exactly once. Short documents and the ends of long ones share rows, as segments that do not attend to each other.
Everything that is dropped is counted in the report.

Best fit over a bounded number of open rows packs a million documents in a second and keeps neighbours together, so that
reading is nearly sequential. (Ding et al. 2024, https://arxiv.org/abs/2404.10830, sort the corpus by length instead:
slightly fuller rows, random reads.)

Shapes: P pieces, R rows, T tokens and S segments of one row. Index t is the prediction made from position t.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from cache_format import CacheRow
from pipeline.errors import ConfigError, DataError
from pipeline.models.objective import Objective
from pipeline.teacher.text import windows
from pipeline.teacher.text.corpus import Documents, tokenise_documents
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.formats.kept_columns import describe_kept
from pipeline.teacher.text.formats.teacher_prompts import TeacherPrompts, TeacherText, with_length
from pipeline.teacher.text.reading.data_paths import data_name
from pipeline.teacher.text.token_stream import StreamFacts, add_rows_to, load_or_compute
from pipeline.teacher.text.windows import DocumentTokens, Pieces

# Rows that are open for further pieces. On log-normal, uniform and chat-like lengths and rows of 1024 tokens,
# 8 open rows give a fill ratio of 0.918 to 0.9997, 64 give 0.9755 to 0.9997, and 1024 at most 0.0003 more.
_OPEN_ROWS = 64
_TOKENS_PER_BLOCK = 2**20  # read together for the fingerprint


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
    pieces: Pieces,
    *,
    seq_len: int,
    packing: bool,
    kept: np.ndarray | None = None,
    read: tuple[np.ndarray, int] | None = None,
) -> RowPlan:
    """Assign pieces of documents to rows.

    Args:
        lengths: tokens of each document, int [documents].
        pieces: windows of the documents, of at most `seq_len` tokens.
        packing: several pieces per row instead of one.
        kept: which pieces to keep, bool [P]; default: all. The others are counted in the report.
        read: tokens that the teacher reads for each piece, int64 [P], and for a row at most; default: those of the row.
    """
    windows = len(pieces)
    kept = np.ones(windows, bool) if kept is None else kept
    pieces = pieces[kept]
    if packing:
        rows = pack_pieces(pieces.lengths, seq_len, None if read is None else (read[0][kept], read[1]))
    else:
        rows = np.arange(len(pieces))
    order = np.argsort(rows, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows))]).astype(np.int64)
    report = {
        "documents": len(lengths),
        "empty_documents": int(np.count_nonzero(lengths == 0)),
        "single_token_pieces": int(np.count_nonzero(lengths == 1)),
        "documents_cut": int(np.count_nonzero(lengths > seq_len)),
        "windows": windows,
        "windows_without_targets": windows - len(pieces),
        "rows": len(offsets) - 1,
        "tokens": int(pieces.lengths.sum()),
    }
    return RowPlan(pieces[order], offsets, report)


def pack_pieces(lengths: np.ndarray, seq_len: int, read: tuple[np.ndarray, int] | None = None) -> np.ndarray:
    """The row of each piece, int64 [P]: the fullest open row with room for it, or a new one.

    Args:
        read: as in `plan_rows`.
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), ascending
    reads, most = (lengths, seq_len) if read is None else read
    left: list[int] = []  # tokens that the teacher may still read, by row
    for piece, (length, more) in enumerate(zip(lengths.tolist(), reads.tolist(), strict=True)):
        fit = bisect_left(open_rows, (length, 0))
        while fit < len(open_rows) and left[open_rows[fit][1]] < more:
            fit += 1
        if fit < len(open_rows):
            free, row = open_rows.pop(fit)
        else:
            free, row = seq_len, len(left)
            left.append(most)
        rows[piece] = row
        left[row] -= more
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
    teacher: TeacherText | None = None  # what the teacher reads, if that is not the row


class TokenCorpus:
    """The rows of a corpus as a sequence, each assembled from memory-mapped documents on access.

    Attributes:
        num_tokens: tokens of all rows.
        num_loss_tokens: loss tokens of all rows.
        longest_read: tokens that the teacher reads for a row, at most.
        objective: the objective of the models that these rows are for.
        report: counts by name of what was cut, dropped and packed.
        description: the source of the text and all options that shaped it, for the cache's metadata.
        warnings: what the user should see but need not act on.
        documents_file: contents of documents.arrow; None without `keep_columns`.
    """

    objective: Objective = "causal"

    def __init__(self, documents: Documents, config: DataConfig) -> None:
        self._documents, self._config = documents, config
        most = config.seq_len - len(documents.prefix) - 1
        if config.overlap > most:
            raise ConfigError(
                f"`overlap` {config.overlap}: expected at most {most} with `seq_len` {config.seq_len}, because a later "
                f"window of a long document holds {len(documents.prefix)} special tokens and at least one new token "
                "besides. Use a larger `seq_len`, or a smaller `overlap`."
            )
        self._tokens = DocumentTokens(documents.tokens, documents.prefix)
        self._teacher: TeacherPrompts | None = None
        self.longest_read = config.teacher_seq_len or config.seq_len
        lengths = self._tokens.lengths
        if documents.columns.teacher is not None:
            self._teacher = TeacherPrompts(documents.tokens, self.longest_read)
            lengths = self._teacher.fitting(lengths)
        pieces = self._tokens.cut(lengths, config.seq_len, config.overlap)
        plan = plan_rows(
            lengths,
            pieces,
            seq_len=config.seq_len,
            packing=config.packing is not False,
            kept=self._tokens.count_targets(pieces) > 0,
            read=None if self._teacher is None else (self._teacher.read_lengths(pieces), self.longest_read),
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
            **documents.findings,
        }
        kept = documents.kept
        self.documents_file = None if kept is None else kept.file(plan.pieces.document, np.diff(plan.offsets))
        self.description = {**describe(documents, config), **describe_kept(config.keep_columns, self.documents_file)}
        if plan.pieces.special.any():
            self.description["window_prefix"] = list(documents.prefix)
        self.warnings = documents.warnings
        if self._teacher is not None:
            self._add_facts_of_teacher(np.flatnonzero(lengths < self._tokens.lengths))

    def _add_facts_of_teacher(self, cut: np.ndarray) -> None:
        """Args: cut: documents that the teacher does not read to the end."""
        assert self._teacher is not None
        self.description["teacher_stream_sha256"] = self._teacher.sha256
        if not len(cut):
            return
        self.report["documents_cut_for_teacher"] = len(cut)
        first, name = int(cut[0]), data_name(self._config.data)
        needed = self._teacher.lengths[first] + self._tokens.lengths[first] - self._teacher.starts[first]
        self.warnings += (
            f"{name}: {len(cut):,} document{'s are' if len(cut) > 1 else ' is'} cut, because the teacher's prompt and "
            f"the completion are longer than `teacher_seq_len` {self.longest_read:,}: the first is document {first} "
            f"with {needed:,} tokens. What comes after the cut is left out.",
        )

    @property
    def has_teacher_prompts(self) -> bool:
        """Whether the teacher reads other prompts than the student."""
        return self._teacher is not None

    def __len__(self) -> int:
        return self._plan.num_rows

    def __getitem__(self, row: int) -> TokenRow:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        pieces = self._plan.pieces[slice(self._plan.offsets[row], self._plan.offsets[row + 1])]
        ids, masks = zip(*self._tokens.read_predictions(pieces), strict=True)
        teacher = None if self._teacher is None else self._teacher.read(pieces, self._tokens)
        return TokenRow(np.concatenate(ids), np.concatenate(masks), pieces.lengths.astype(np.int32), teacher=teacher)

    def __iter__(self) -> Iterator[TokenRow]:
        return (self[row] for row in range(len(self)))

    def first_token_beyond(self, limit: int) -> tuple[int, int] | None:
        """As `Documents.first_token_beyond`."""
        return self._documents.first_token_beyond(limit)

    def continues(self, row: int) -> np.ndarray:
        """bool [S]: segments of a row that are later windows of their documents."""
        return self._plan.pieces.start[self._plan.offsets[row] : self._plan.offsets[row + 1]] > 0

    @cached_property
    def token_stream_sha256(self) -> str:
        """sha256 of all rows: T and S as little-endian int64, then ids int32, loss mask uint8, segments int32."""
        options = {
            "window_length": self._config.seq_len,
            "overlap": self._config.overlap,
            "prefix": list(self._documents.prefix),
            "packing": self._config.packing is not False,
            **({} if self._teacher is None else {"teacher_window_length": self.longest_read}),
        }
        code = (__file__, windows.__file__)
        return load_or_compute(self._documents.tokens, options, code, self._fingerprint).sha256

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
        "columns": list(documents.columns.all_names),
        **config.to_json(),
        **documents.options,
        "loss_on": documents.loss_on,
    }


def build_corpus(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, positions: int | None = None
) -> TokenCorpus:
    """Text to rows for a causal model.

    Args:
        positions: the longest text that the teacher can read, if there is a limit.

    Raises:
        DataError, ModelError, ConfigError: as `tokenise_documents`, or no loss tokens.
    """
    documents = tokenise_documents(config, tokenizer)
    config = replace(
        with_length(config, documents.columns, positions),
        packing=config.packing is not False,
        append_eos=config.append_eos is not False and not documents.columns.is_ids,
    )
    return TokenCorpus(documents, config)


def format_counts(report: Mapping[str, int | float]) -> str:
    """The counts as text, for an error message."""
    return ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in report.items())
