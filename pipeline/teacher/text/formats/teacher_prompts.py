"""A teacher that reads another prompt than the student: longer instructions, a document, a hint, a proof.

    student    <s> Question:                           Four. </s>
    teacher    <s> A long document … Question:         Four. </s>
                                             └ targets ─────┘ stored at the same tokens of the student's row

The student learns to answer as if it had seen what only the teacher has (context distillation: Askell et al. 2021,
https://arxiv.org/abs/2112.00861; Snell et al. 2022, https://arxiv.org/abs/2209.15189). Both sides have the same tokens
from the first one in the loss on, the completion. Where the student's row holds a later window of it, the teacher reads
its prompt and the whole completion up to there.

This module is the only one that maps positions of a row to those of what the teacher reads.

Shapes: P pieces, T tokens and S segments of a row, R tokens that the teacher reads for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import datasets
import numpy as np

from cache_format.wording import quantity
from pipeline.errors import ConfigError, DataError
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.encoding import Tokens
from pipeline.teacher.text.formats.row_format import Columns
from pipeline.teacher.text.windows import DocumentTokens, Pieces

SEQ_LENS = 4
"""`teacher_seq_len` by default, as a multiple of `seq_len`."""

FEATURES = {"teacher_prompt": datasets.Sequence(datasets.Value("int32")), "completion_start": datasets.Value("int32")}


@dataclass(frozen=True, eq=False)
class TeacherText:
    """What the teacher reads for a row.

    Attributes:
        input_ids: int32 [R].
        segment_lengths: int32 [S], sum R; one for each segment of the row.
        positions: int64 [T], where the teacher makes the prediction that the row makes at t; -1: nowhere.
    """

    input_ids: np.ndarray
    segment_lengths: np.ndarray
    positions: np.ndarray


def with_length(config: DataConfig, columns: Columns, positions: int | None) -> DataConfig:
    """The options with the length of what the teacher reads, if it has prompts of its own.

    Args:
        positions: the longest text that the teacher can read, if there is a limit.

    Raises:
        ConfigError: a length for data without such prompts.
    """
    if columns.teacher is None:
        if config.teacher_seq_len is not None:
            raise ConfigError(
                f"`teacher_seq_len` {config.teacher_seq_len}: only for data with a prompt for the teacher, such as a "
                "column 'teacher_prompt'. Leave it out."
            )
        return config
    default = SEQ_LENS * config.seq_len if positions is None else min(SEQ_LENS * config.seq_len, positions)
    return replace(config, teacher_seq_len=config.teacher_seq_len or default)


def with_teacher_prompt(student: Tokens, teacher: Tokens, where: str) -> Tokens:
    """The student's tokens with the prompt that precedes the same completion in the teacher's.

    Raises:
        DataError: the completions are not the same tokens, or nothing precedes the teacher's.
    """
    ours, theirs = _completion(student), _completion(teacher)
    if not np.array_equal(student.ids[ours], teacher.ids[theirs]) or not np.array_equal(
        student.targets[ours], teacher.targets[theirs]
    ):
        raise DataError(
            f"{where}: the completion has {quantity(ours.stop - ours.start, 'token')} after the student's prompt, and "
            f"{quantity(theirs.stop - theirs.start, 'token')}, not the same ones, after the teacher's. Expected the "
            "same tokens, because the teacher's targets are stored at them. End both prompts in the same way, or "
            "remove the row."
        )
    return with_prompt(student, teacher.ids[: theirs.start], where)


def with_prompt(student: Tokens, prompt: np.ndarray, where: str) -> Tokens:
    """Raises: DataError for a completion whose first token the teacher could not predict."""
    if not len(prompt) and student.targets.any():
        raise DataError(
            f"{where}: found an empty prompt of the teacher, expected at least one token, from which the first "
            "token of the completion is predicted. Correct the row; if it is null, the teacher reads the student's."
        )
    return replace(student, teacher_prompt=prompt)


def columns_of(documents: Sequence[Tokens]) -> dict[str, list[Any]]:
    """The values of `FEATURES`."""
    starts = [_completion(each).start for each in documents]
    prompts = [
        each.ids[:start] if each.teacher_prompt is None else each.teacher_prompt
        for each, start in zip(documents, starts, strict=True)
    ]
    return dict(zip(FEATURES, (prompts, starts), strict=True))


def behind_prompts(prompt: np.ndarray, teacher_prompt: np.ndarray, answer: Sequence[int]) -> TeacherText:
    """What the teacher reads for the row of an answer. Args: prompt, teacher_prompt: token ids, of row and teacher."""
    ids = np.concatenate([teacher_prompt, answer]).astype(np.int32)
    ahead = len(teacher_prompt) - len(prompt)
    return TeacherText(ids, np.array([len(ids)], np.int32), _positions(len(ids) - ahead, len(prompt) - 1, ahead))


def _positions(length: int, first: int, ahead: int) -> np.ndarray:
    """int64 [length]: each place plus `ahead` from place `first` on; -1 before."""
    places = np.arange(length, dtype=np.int64)
    return np.where(places >= first, places + ahead, -1)


def _completion(document: Tokens) -> slice:
    """From the first token in the loss to the last."""
    learned = np.flatnonzero(document.targets)
    return slice(int(learned[0]), int(learned[-1]) + 1) if len(learned) else slice(len(document.ids), len(document.ids))


class TeacherPrompts:
    """The teacher's prompts of all documents, as numpy views of the memory-mapped record batches.

    Args:
        tokens: the tokenised text, with the columns of `FEATURES`.
        limit: tokens that the teacher reads for a document, at most.

    Attributes:
        lengths: tokens of the teacher's prompt of each document, int64 [documents].
        starts: where the completion of each document begins, int64 [documents].
    """

    def __init__(self, tokens: datasets.Dataset, limit: int) -> None:
        batches = tokens.data.to_batches()
        prompts = [batch.column("teacher_prompt") for batch in batches]
        self.limit = limit
        self._values = [column.flatten().to_numpy() for column in prompts]
        offsets = [column.offsets.to_numpy().astype(np.int64) for column in prompts]
        self._begins = np.concatenate([each[:-1] - each[0] for each in offsets])
        self._batches = np.repeat(np.arange(len(batches)), [len(column) for column in prompts])
        self.lengths = np.concatenate([np.diff(each) for each in offsets])
        starts = [batch.column("completion_start").to_numpy() for batch in batches]
        self.starts = np.concatenate(starts).astype(np.int64)

    def fitting(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens of each document, int64 [documents], up to where the teacher has read `limit` tokens."""
        return np.minimum(lengths, self.starts + np.maximum(self.limit - self.lengths, 0))

    def read_lengths(self, pieces: Pieces) -> np.ndarray:
        """Tokens that the teacher reads for each piece, int64 [P]."""
        return self.lengths[pieces.document] + np.maximum(pieces.stop - self.starts[pieces.document], 0)

    def read(self, pieces: Pieces, tokens: DocumentTokens) -> TeacherText:
        """What the teacher reads for a row of these pieces, each with a token of the completion."""
        starts, prompts = self.starts[pieces.document], self.lengths[pieces.document]
        whole = replace(pieces, start=starts, context=np.zeros_like(starts), special=np.zeros_like(starts))
        # Places of a piece that predict its part of the completion, and how far ahead the teacher is there.
        firsts = np.maximum(starts, pieces.start + 1) - 1 - pieces.start + pieces.special
        ahead = prompts - starts + pieces.start - pieces.special
        ids, positions = [], []
        before = 0
        for piece, (completion, _) in enumerate(tokens.read(whole)):
            ids += [self._prompt(int(pieces.document[piece])), completion]
            positions.append(_positions(pieces.lengths[piece], firsts[piece], before + ahead[piece]))
            before += prompts[piece] + len(completion)
        return TeacherText(
            np.concatenate(ids).astype(np.int32),
            self.read_lengths(pieces).astype(np.int32),
            np.concatenate(positions),
        )

    def _prompt(self, document: int) -> np.ndarray:
        begin = self._begins[document]
        return self._values[self._batches[document]][begin : begin + self.lengths[document]]

    @cached_property
    def sha256(self) -> str:
        """Of all prompts: number of tokens and start of the completion as little-endian int64, then the ids int32."""
        digest = hashlib.sha256(np.stack([self.lengths, self.starts], axis=1).astype("<i8").tobytes())
        for values in self._values:
            digest.update(values.astype("<i4", copy=False))
        return digest.hexdigest()
