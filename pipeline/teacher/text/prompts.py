"""Prompts for a teacher to answer: rows of any source to token ids, a few at a time.

    messages    the conversation without a last answer, followed by the opening of the assistant's turn
    prompt      text or messages; other columns such as `completion` are not used
    text        a text to continue

All prompts are read once at the start, so that a row that cannot be used is reported before the first answer is
written. Only their lengths are kept. A row may hold another prompt for the teacher, which answers that one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError
from pipeline.models.objective import Objective
from pipeline.teacher.text import encoding
from pipeline.teacher.text.chat import arguments
from pipeline.teacher.text.chat.arguments import read_arguments
from pipeline.teacher.text.chat.template import ChatTemplate
from pipeline.teacher.text.corpus import WITH_SPECIAL_TOKENS
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.encoding import Affixes, Tokens
from pipeline.teacher.text.formats.examples import (
    Example,
    read_messages,
    read_prompt,
    read_teacher_messages,
    read_teacher_prompt,
)
from pipeline.teacher.text.formats.kept_columns import KeptValues, check_kept, kept_texts
from pipeline.teacher.text.formats.row_format import Columns, check_chat_options, find_prompt
from pipeline.teacher.text.formats.teacher_prompts import TeacherText, behind_prompts, with_length
from pipeline.teacher.text.reading.data_paths import data_name
from pipeline.teacher.text.reading.records import reading
from pipeline.teacher.text.reading.sources import Source, load_source

_PROMPTS_PER_BATCH = 64


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts, in the order of the source."""

    config: DataConfig
    rows: datasets.Dataset
    columns: Columns
    source: Source
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None  # of chats

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def has_teacher_prompts(self) -> bool:
        """Whether the teacher reads other prompts than the student."""
        return self.columns.teacher is not None

    @property
    def longest_read(self) -> int:
        """Tokens that the teacher reads, at most: its prompt and the answer."""
        return self.config.teacher_seq_len or self.config.seq_len

    def for_writer(self) -> Prompts:
        """The prompts as a writer other than the teacher reads them: without those of the teacher."""
        return replace(
            self,
            config=replace(self.config, teacher_seq_len=None),
            columns=replace(self.columns, teacher=None),
        )

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each prompt, int64 [prompts].

        Raises:
            DataError: a row cannot be used.
        """
        return self._read[0]

    @property
    def findings(self) -> dict[str, int]:
        """Name -> number of prompts, where there are any."""
        brought = self._read[2]
        return {WITH_SPECIAL_TOKENS: brought} if brought else {}

    @cached_property
    def _read(self) -> tuple[np.ndarray, np.ndarray, int, str]:
        """Number of tokens of each prompt, and of what the teacher reads of it; number of prompts that brought special
        tokens; sha256 of the teacher's prompts: the tokens of each as little-endian int64, then the ids int32."""
        lengths, read, brought, digest = [], [], 0, hashlib.sha256()
        for start in range(0, len(self), _PROMPTS_PER_BATCH):
            for prompt in self.read(range(start, start + _PROMPTS_PER_BATCH)):
                ids = prompt.ids if prompt.teacher_prompt is None else prompt.teacher_prompt
                lengths.append(len(prompt.ids))
                read.append(len(ids))
                brought += prompt.had_affixes
                digest.update(np.array([len(ids)], "<i8").tobytes())
                digest.update(ids.astype("<i4").tobytes())
        return np.array(lengths), np.array(read), brought, digest.hexdigest()

    def teacher_text(self, document: int, ids: np.ndarray, prompt_tokens: int) -> TeacherText | None:
        """What the teacher reads for the row of an answer; None: the row itself.

        Args:
            ids: of the row, the first `prompt_tokens` of them being the prompt.
        """
        (prompt,) = self.read(range(document, document + 1))
        if prompt.teacher_prompt is None:
            return None
        own, answer = np.split(ids, [prompt_tokens])
        return behind_prompts(own, prompt.teacher_prompt, answer.tolist())

    @property
    def empty(self) -> np.ndarray:
        """bool [prompts]: there is nothing to continue."""
        return (self.lengths == 0) | (self._read[1] == 0)

    @property
    def too_long(self) -> np.ndarray:
        """bool [prompts]: the prompt, or the teacher's, leaves no room for an answer."""
        return (self.lengths >= self.config.seq_len) | (self._read[1] >= self.longest_read)

    @cached_property
    def answerable(self) -> np.ndarray:
        """bool [prompts]: the prompt is not empty and leaves room for an answer."""
        return ~self.empty & ~self.too_long

    def example(self, document: int) -> dict[str, Any]:
        """A row of the source with all its columns."""
        return self.source.reader.row(self.rows, document)

    def read(self, documents: range) -> list[Tokens]:
        """The prompts, with those of the teacher where they differ; an empty prompt has no tokens.

        Raises: DataError naming a row that cannot be used.
        """
        data, reader = data_name(self.config.data), self.source.reader
        with reading(data, documents):
            batch = self.rows[documents.start : documents.stop]
        rows = reader.read(batch, self.columns.to_read(reader.names))
        places = [f"{data}, row {index}" for index in range(documents.start, documents.start + len(rows))]
        how: dict[str, Any] = {"columns": self.columns, "template": self.template}
        texts = [read_prompt(row, where, **how) for row, where in zip(rows, places, strict=True)]
        prompts = encoding.encode([Example(text) for text in texts], self.tokenizer, self._affixes)
        theirs = [read_teacher_prompt(row, where, **how) for row, where in zip(rows, places, strict=True)]
        read = encoding.encode([Example(text or "") for text in theirs], self.tokenizer, self._affixes)
        return [
            prompt if text is None else replace(prompt, teacher_prompt=teacher.ids)
            for prompt, text, teacher in zip(prompts, theirs, read, strict=True)
        ]

    def messages(self, document: int) -> Sequence[Mapping[str, Any]]:
        """What the teacher reads, before the chat template renders it, for a server that does so itself.

        Raises: DataError if it is not a chat, or if the template gets more than the messages.
        """
        where = f"{data_name(self.config.data)}, row {document}"
        if self.template is None:
            raise DataError(
                f"{where}: found a text, expected messages, because a hosted API puts what it is sent into its chat "
                'template. Write it as {"messages": [{"role": "user", "content": "…"}]}.'
            )
        row, column = self.example(document), self.columns.teacher
        if more := sorted({*self.template.arguments, *read_arguments(row, where)}):
            raise DataError(
                f"{where}: found {', '.join(map(repr, more))} for the chat template, which a hosted API does not take. "
                "Leave it out, or use a server that takes token ids."
            )
        if column is not None and row[column] is not None:
            return read_teacher_messages(row, where, column)
        return read_messages(row, where, self.columns)

    def check_messages(self) -> None:
        """Raises: DataError for the first prompt that `messages` cannot give."""
        for document in np.flatnonzero(self.answerable).tolist():
            self.messages(document)

    @cached_property
    def kept(self) -> KeptValues | None:
        """The values of the columns that the cache keeps. Raises: DataError."""
        names, data, reader = self.config.keep_columns, data_name(self.config.data), self.source.reader
        if not names:
            return None
        texts: dict[str, list[str]] = {name: [] for name in names}
        for start in range(0, len(self), _PROMPTS_PER_BATCH):
            rows = reader.read(self.rows[start : start + _PROMPTS_PER_BATCH], names)
            places = [f"{data}, row {row}" for row in range(start, start + len(rows))]
            for name, found in kept_texts(rows, places, names).items():
                texts[name] += found
        return KeptValues.of(texts, data)

    @cached_property
    def _affixes(self) -> Affixes:
        # No suffix, because the answer continues the prompt.
        prefix, _ = encoding.special_affixes(self.tokenizer)
        return Affixes(tuple(prefix), placement="rendered" if self.columns.is_chat else "added")

    def first_token_beyond(self, limit: int) -> tuple[int, int] | None:
        """(row of the source, id) of the first token with an id of `limit` or more; tokenises up to there."""
        for start in range(0, len(self), _PROMPTS_PER_BATCH):
            for row, prompt in enumerate(self.read(range(start, start + _PROMPTS_PER_BATCH)), start):
                for ids in (prompt.ids, prompt.teacher_prompt):
                    if ids is not None and (beyond := ids >= limit).any():
                        return row, int(ids[beyond.argmax()])
        return None

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What the user should see but need not act on."""
        if self.template is None:
            return ()
        found = arguments.find_unused(self.config, self.template, self.source, self.columns.names)
        return tuple(f"{data_name(self.config.data)}: {each}" for each in found)

    @property
    def objective(self) -> Objective:
        return "causal"

    @cached_property
    def description(self) -> dict[str, Any]:
        """The source of the prompts and all options that shaped them, for the cache's metadata."""
        config = self.config
        return {
            "source": data_name(config.data),
            "files": self.source.describe_files(),
            "format": self.columns.format,
            "columns": list(self.columns.all_names),
            "data_config": config.data_config,
            "split": config.split,
            "text_column": config.text_column,
            "sample_by": config.sample_by,
            "max_documents": config.max_documents,
            **({} if self.template is None else arguments.describe_options(config, self.template)),
            "loss_on": "answer",
            "packing": False,
            **(
                {"teacher_window_length": self.longest_read, "teacher_stream_sha256": self._read[3]}
                if self.has_teacher_prompts
                else {}
            ),
        }


def open_prompts(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, positions: int | None = None) -> Prompts:
    """Load the prompts of `config.data`.

    Args:
        positions: the longest text that the teacher can read, if there is a limit.

    Raises:
        DataError: they cannot be read, or none can be answered.
        ModelError: the tokenizer has no chat template, and the prompts are conversations.
    """
    source = load_source(config)
    rows = source.rows
    name = data_name(config.data)
    columns = find_prompt(source, config.text_column, name)
    check_chat_options(config, columns, name)
    check_kept(config.keep_columns, source, name)
    template = arguments.open_template(config, tokenizer) if columns.is_chat else None
    prompts = Prompts(with_length(config, columns, positions), rows, columns, source, tokenizer, template)
    _ = prompts.kept  # raises for a value that cannot be kept
    if not prompts.answerable.any():
        empty, long = np.count_nonzero(prompts.empty), np.count_nonzero(prompts.too_long)
        for_teacher = f" (for the teacher {prompts.longest_read:,})" if prompts.has_teacher_prompts else ""
        raise DataError(
            f"{data_name(config.data)}: no prompt to answer: {empty:,} are empty, {long:,} have "
            f"{config.seq_len:,} tokens or more{for_teacher} and leave no room. Check `text_column`, or use a larger "
            f"`seq_len`{' or `teacher_seq_len`' if for_teacher else ''}."
        )
    return prompts
