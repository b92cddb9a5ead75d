"""Documents to rows for a masked model: one window of one document per row, as such a model was trained to see it.

    document ─▶ windows, side by side ─▶ [CLS] window [SEP] ─▶ masked copies

Each window gets the special tokens that the tokenizer puts around a text. Windows do not overlap: a token is asked for
where it stands, so every one of them has its place in just one window. There is no packing: transformers keeps packed
documents apart for causal models only, and a masked one would read its neighbours.

With several copies, row r is window r modulo the number of windows: first all windows with one pattern, then all of
them with another, so that an epoch over the cache sees each text several times and far apart.
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
from pipeline.teacher.cache_config import DataConfig, MaskRule
from pipeline.teacher.text import encoding, masking, packing
from pipeline.teacher.text.corpus import Documents, tokenise_documents
from pipeline.teacher.text.masking import Masker
from pipeline.teacher.text.packing import DocumentTokens, Pieces, TokenRow, add_row_to, describe, readable
from pipeline.teacher.text.token_stream import StreamFacts, remembered


def cut_windows(lengths: np.ndarray, most: int) -> Pieces:
    """Documents of `lengths` tokens as windows of at most `most`, side by side; of empty ones none."""
    lengths = np.asarray(lengths, dtype=np.int64)
    windows = -(-lengths // most)
    document = np.repeat(np.arange(len(lengths)), windows)
    first = np.cumsum(windows) - windows
    start = (np.arange(len(document)) - first[document]) * most
    return Pieces(document, start, np.minimum(start + most, lengths[document]))


class MaskedCorpus:
    """The rows of a corpus as a sequence, each put together and masked on demand; as `packing.TokenCorpus`.

    Attributes:
        num_tokens, num_counted_tokens: over all rows; counted: tokens that are to be found.
        objective: of the models that these rows are for.
        report: what was cut and dropped, counts by name.
        description: where the text comes from and how it was treated, masks included.
    """

    objective: Objective = "masked"

    def __init__(
        self, documents: Documents, config: DataConfig, masker: Masker, around: tuple[list[int], list[int]]
    ) -> None:
        self._masker, self._around = masker, around
        self._tokens = DocumentTokens(documents.tokens)
        most = config.window_length - sum(map(len, around))
        if most < 1:
            raise ConfigError(
                f"window_length: found {config.window_length}, expected more than the {sum(map(len, around))} special "
                "tokens around each window."
            )
        windows = cut_windows(self._tokens.lengths, most)
        asked = np.array([self._allowed(ids, targets).any() for ids, targets in self._tokens.read(windows)], bool)
        self._windows = windows[asked]
        self.report: dict[str, int | float] = {
            "documents": len(self._tokens.lengths),
            "empty_documents": int(np.count_nonzero(self._tokens.lengths == 0)),
            "documents_cut": int(np.count_nonzero(self._tokens.lengths > most)),
            "windows": len(windows),
            "windows_without_targets": len(windows) - len(self._windows),
            "rows": len(self),
        }
        if not len(self):
            raise DataError(
                f"{config.data}: nothing to learn in it ({readable(self.report)}), expected text with tokens that may "
                f"be masked, loss on {documents.loss_on}. Check the column, and what the loss is on."
            )
        decides = {"window_length": config.window_length, "around": around, "masker": masker.fingerprint()}
        stream = remembered(
            documents.tokens, decides, (__file__, masking.__file__, packing.__file__), self._fingerprint
        )
        self.token_stream_sha256 = stream.sha256
        self.num_tokens, self.num_counted_tokens = stream.tokens, stream.counted_tokens
        self.report |= {
            "tokens": self.num_tokens,
            "counted_tokens": self.num_counted_tokens,
            "fill_ratio": self.num_tokens / (len(self) * config.window_length),
            "ignored_files": documents.source.ignored_files,
        }
        self.description: dict[str, Any] = {**describe(documents, config), "masking": masker.describe()}

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
    """Text to masked rows. Raises DataError, ModelError, ConfigError, each with the next step."""
    if config.packing:
        raise ConfigError(
            "--packing: a masked language model sees both sides of a token, and so every document in its row. Leave it "
            "out: such a row holds one window of one document."
        )
    if config.append_eos:
        raise ConfigError(
            "--append-eos: a masked language model gets the special tokens that its tokenizer puts around a text, and "
            "no other. Leave it out."
        )
    config = replace(config, packing=False, append_eos=False)
    masker = Masker(rule, tokenizer)
    documents = tokenise_documents(config, tokenizer, special_tokens=False)
    return MaskedCorpus(documents, config, masker, encoding.special_affixes(tokenizer))
