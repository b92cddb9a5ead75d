"""Documents to rows for a masked model: one window of one document per row, the form it was trained on.

    document ─▶ windows without overlap ─▶ [CLS] window [SEP] ─▶ masked copies

Each window gets the special tokens that the tokenizer puts around a text. Windows do not overlap, because a token is
predicted at its own position, so each is needed in one window only. Documents are not packed: transformers keeps packed
documents apart for causal models only, and a masked model would attend to its neighbours.

With several copies, row r is window r modulo the number of windows: first all windows with one mask, then all with
another, so that an epoch over the cache sees the copies of a text far apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.errors import ConfigError, DataError
from pipeline.models.objective import Objective
from pipeline.teacher.text import encoding, packing, windows
from pipeline.teacher.text.corpus import Documents, tokenise_documents
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.formats.kept_columns import describe_kept
from pipeline.teacher.text.masked import masking
from pipeline.teacher.text.masked.mask_rule import MaskRule
from pipeline.teacher.text.masked.masking import Masker
from pipeline.teacher.text.packing import TokenRow, add_row_to, describe, format_counts
from pipeline.teacher.text.reading.data_paths import data_name
from pipeline.teacher.text.token_stream import StreamFacts, load_or_compute
from pipeline.teacher.text.windows import DocumentTokens, Pieces


def cut_windows(lengths: np.ndarray, most: int) -> Pieces:
    """Documents of `lengths` tokens as windows of at most `most` tokens without overlap; none for an empty document."""
    lengths = np.asarray(lengths, dtype=np.int64)
    windows = -(-lengths // most)
    document = np.repeat(np.arange(len(lengths)), windows)
    first = np.cumsum(windows) - windows
    start = (np.arange(len(document)) - first[document]) * most
    none = np.zeros_like(start)  # no context: a token is predicted at its own position
    return Pieces(document, start, np.minimum(start + most, lengths[document]), none, none)


class MaskedCorpus:
    """The rows of a corpus as a sequence, each assembled and masked on access, like `packing.TokenCorpus`.

    Attributes:
        num_tokens: tokens of all rows.
        num_loss_tokens: loss tokens of all rows, which are the masked ones.
        longest_read: tokens of a row, at most.
        objective: the objective of the models that these rows are for.
        report: counts by name of what was cut and dropped.
        description: the source of the text and all options that shaped it, for the cache's metadata.
        warnings: what the user should see but need not act on.
        documents_file: contents of documents.arrow; None without `keep_columns`.
    """

    objective: Objective = "masked"
    has_teacher_prompts = False

    def __init__(
        self, documents: Documents, config: DataConfig, masker: Masker, around: tuple[list[int], list[int]]
    ) -> None:
        self._documents, self._masker, self._around = documents, masker, around
        self.longest_read = config.seq_len
        self._tokens = DocumentTokens(documents.tokens)
        most = config.seq_len - sum(map(len, around))
        if most < 1:
            raise ConfigError(
                f"`seq_len` {config.seq_len}: expected more than the {sum(map(len, around))} special tokens "
                "around each window."
            )
        pieces = cut_windows(self._tokens.lengths, most)
        asked = np.array([self._allowed(ids, targets).any() for ids, targets in self._tokens.read(pieces)], bool)
        self._windows = pieces[asked]
        self.report: dict[str, int | float] = {
            "documents": len(self._tokens.lengths),
            "empty_documents": int(np.count_nonzero(self._tokens.lengths == 0)),
            "documents_cut": int(np.count_nonzero(self._tokens.lengths > most)),
            "windows": len(pieces),
            "windows_without_targets": len(pieces) - len(self._windows),
            "rows": len(self),
        }
        if not len(self):
            raise DataError(
                f"{data_name(config.data)}: no loss tokens in it ({format_counts(self.report)}), expected text with "
                f"tokens that may be masked, with `loss_on` {documents.loss_on}. Check `text_column` and `loss_on`."
            )
        options = {"window_length": config.seq_len, "around": around, "masker": masker.fingerprint()}
        stream = load_or_compute(
            documents.tokens,
            options,
            (__file__, masking.__file__, packing.__file__, windows.__file__),
            self._fingerprint,
        )
        self.token_stream_sha256 = stream.sha256
        self.num_tokens, self.num_loss_tokens = stream.tokens, stream.loss_tokens
        self.report |= {
            "tokens": self.num_tokens,
            "counted_tokens": self.num_loss_tokens,
            "fill_ratio": self.num_tokens / (len(self) * config.seq_len),
            "ignored_files": documents.source.ignored_files,
            **documents.findings,
        }
        origin = np.tile(self._windows.document, masker.rule.copies)
        self.documents_file = None if documents.kept is None else documents.kept.file(origin, np.ones_like(origin))
        kept = describe_kept(config.keep_columns, self.documents_file)
        self.description: dict[str, Any] = {**describe(documents, config), **kept, "masking": masker.describe()}
        self.warnings = documents.warnings

    def __len__(self) -> int:
        return len(self._windows) * self._masker.rule.copies

    def __getitem__(self, row: int) -> TokenRow:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        window = row % len(self._windows)
        (ids, targets), (prefix, suffix) = next(self._tokens.read(self._windows[window : window + 1])), self._around
        text = np.concatenate([prefix, ids, suffix]).astype(np.int32)
        allowed = np.zeros(len(text), bool)
        allowed[len(prefix) : len(prefix) + len(ids)] = self._allowed(ids, targets)
        masked, chosen = self._masker.mask(row, text, allowed)
        labels = np.where(chosen, text, -100).astype(np.int32)
        return TokenRow(masked, chosen, np.array([len(text)], np.int32), labels)

    def __iter__(self) -> Iterator[TokenRow]:
        return (self[row] for row in range(len(self)))

    def first_token_beyond(self, limit: int) -> tuple[int, int] | None:
        """(row of the source, id) of the first token with an id of `limit` or more, before or after masking."""
        for index, row in enumerate(self):
            ids = np.maximum(row.input_ids, -1 if row.labels is None else row.labels)
            if (beyond := ids >= limit).any():
                document = int(self._windows.document[index % len(self._windows)])
                return self._documents.row_of(document), int(ids[beyond.argmax()])
        return None

    def _fingerprint(self) -> StreamFacts:
        digest, tokens, counted = hashlib.sha256(), 0, 0
        for row in self:
            add_row_to(digest, row)
            tokens += len(row.input_ids)
            counted += int(row.loss_mask.sum())
        return StreamFacts(digest.hexdigest(), tokens, counted)

    def _allowed(self, ids: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return targets & self._masker.may_be_masked(ids)


def build_masked_corpus(config: DataConfig, tokenizer: PreTrainedTokenizerBase, rule: MaskRule) -> MaskedCorpus:
    """Text to masked rows.

    Raises:
        ConfigError: an option that does not go with a masked model.
        DataError, ModelError: as `tokenise_documents`, or no loss tokens, or a tokenizer without a mask token.
    """
    if config.packing:
        raise ConfigError(
            "`packing=True`: a masked language model attends to both sides of a token, and so to every document in its "
            "row. Leave it out: each row holds one window of one document."
        )
    if config.append_eos:
        raise ConfigError(
            "`append_eos=True`: a masked language model only gets the special tokens that its tokenizer puts around a "
            "text. Leave it out."
        )
    if config.overlap != 1:
        raise ConfigError(
            f"`overlap` {config.overlap}: windows of a masked language model do not overlap, because each token is "
            "predicted at its own position. Leave it out."
        )
    if config.teacher_seq_len is not None:
        raise ConfigError(
            f"`teacher_seq_len` {config.teacher_seq_len}: only for causal teachers, which may read prompts of "
            "their own. Leave it out."
        )
    config = replace(config, packing=False, append_eos=False)
    masker = Masker(rule, tokenizer)
    documents = tokenise_documents(config, tokenizer, special_tokens=False)
    return MaskedCorpus(documents, config, masker, encoding.special_affixes(tokenizer))
