"""Conversations with the log-probabilities of their completion, as axolotl takes them before it prepares a data set.

    first form     for each token a list of {"logprob": …, "token": "token_id:123"}
    second form    `target_token_ids` [L][K] and `target_logprobs` [L][K]

The L lists are about the last L tokens of the text, each about its own token, as servers return them. The text is
`input_ids`, or `messages` through the tokenizer's chat template, with `tools`, `documents` and `chat_template_kwargs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.importing.readers.foreign_rows import BadRow, ForeignRow, Ints
from pipeline.importing.readers.format_reader import Reader
from pipeline.importing.readers.nested_values import integers, lists, numbers, plain
from pipeline.importing.readers.numbered_tokens import token_of
from pipeline.importing.readers.source_files import Record
from pipeline.teacher.text.chat.arguments import COLUMNS, read_arguments

LISTS = ("logprobs", "llm_text_generation_vllm_logprobs")
IDS, LOGPROBS = "target_token_ids", "target_logprobs"


@dataclass(frozen=True, kw_only=True)
class AxolotlReader(Reader):
    """Args: column: that of the first form; None for the second."""

    tokenizer: PreTrainedTokenizerBase
    column: str | None
    shift: int = 1

    @property
    def description(self) -> Mapping[str, Any]:
        return {"column": self.column}

    def decode(self, record: Record) -> ForeignRow:
        input_ids = self._text(record)
        entries = self._two_columns(record) if self.column is None else self._one_column(record)
        before = len(input_ids) - len(entries["counts"])
        if before < 0:
            raise BadRow(f"{len(entries['counts'])} lists of entries for {len(input_ids)} tokens of text")
        entries["counts"] = np.concatenate([np.zeros(before, np.int64), entries["counts"]])
        return ForeignRow(input_ids=input_ids, shift=self.shift, **entries)

    def _one_column(self, record: Record) -> dict[str, Any]:
        assert self.column is not None
        positions = plain(record.column(self.column))
        if not isinstance(positions, list):
            raise BadRow(f"column {self.column!r}: {type(positions).__name__}, expected a list of lists")
        return joined(positions)

    def _two_columns(self, record: Record) -> dict[str, Any]:
        counts, ids = lists(record.column(IDS), IDS)
        value_counts, values = lists(record.column(LOGPROBS), LOGPROBS)
        if counts.tolist() != value_counts.tolist():
            raise BadRow(f"columns {IDS!r} and {LOGPROBS!r} have lists of different lengths")
        return {"counts": counts, "ids": integers(ids, IDS), "values": numbers(values, LOGPROBS)}

    def _text(self, record: Record) -> Ints:
        if record.get("input_ids") is not None:
            return integers(record.column("input_ids"), "input_ids")
        messages = plain(record.column("messages"))
        arguments = read_arguments({name: plain(record.get(name)) for name in COLUMNS}, record.where)
        return np.asarray(chat_tokens(self.tokenizer, messages, arguments, add_generation_prompt=False), np.int64)


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Any, arguments: Mapping[str, Any], *, add_generation_prompt: bool
) -> list[int]:
    """Tokens of a conversation.

    Args: arguments: of the chat template, besides the messages.
    Raises: BadRow if the chat template refuses it.
    """
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **arguments
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        raise BadRow(f"the tokenizer's chat template does not take the messages: {error}") from error


def joined(positions: Sequence[Any]) -> dict[str, Any]:
    """`counts`, `ids` and `values` of a ForeignRow from lists of {"token": "token_id:123", "logprob": …}.

    Raises: BadRow.
    """
    counts, ids, values = [], [], []
    for p, entries in enumerate(positions):
        entries = entries or []
        counts.append(len(entries))
        for entry in entries:
            try:
                token, value = entry["token"], float(entry["logprob"])
            except (TypeError, KeyError, ValueError) as error:
                raise BadRow(f"position {p}: found {entry!r}, expected a token and its logprob") from error
            ids.append(token_of(token, p))
            values.append(value)
    return {"counts": np.array(counts, np.int64), "ids": np.array(ids, np.int64), "values": np.array(values)}
