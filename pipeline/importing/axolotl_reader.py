"""Conversations with the log-probabilities of their completion, as axolotl's first format for distillation has them:
for each position a list of `{"logprob": …, "token": "token_id:123"}`.

The lists are about the last tokens of the text, each about its own token, as servers return them. The text is
`input_ids`, or `messages` through the tokenizer's chat template.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.importing.foreign_rows import BadRow, ForeignRow, Ints, Values
from pipeline.importing.nested_values import integers, plain
from pipeline.importing.source_files import Record, count_records, records
from pipeline.importing.token_names import token_of

LISTS = ("logprobs", "llm_text_generation_vllm_logprobs", "target_logprobs")


@dataclass(frozen=True)
class AxolotlReader:
    files: Sequence[Path]
    tokenizer: PreTrainedTokenizerBase
    column: str
    shift: int = 1
    values: Values = field(default="logprobs", init=False)
    renormalised: bool = field(default=False, init=False)

    @property
    def total(self) -> int | None:
        return count_records(self.files)

    @property
    def description(self) -> Mapping[str, Any]:
        return {"column": self.column}

    def records(self) -> Iterator[Record]:
        return records(self.files)

    def decode(self, record: Record) -> ForeignRow:
        input_ids = self._text(record)
        positions = plain(record.column(self.column))
        if not isinstance(positions, list) or len(positions) > len(input_ids):
            raise BadRow(f"column {self.column!r}: {len(positions)} positions for {len(input_ids)} tokens of text")
        before = len(input_ids) - len(positions)
        return ForeignRow(input_ids=input_ids, shift=self.shift, **joined([[]] * before + positions))

    def _text(self, record: Record) -> Ints:
        if record.get("input_ids") is not None:
            return integers(record.column("input_ids"), "input_ids")
        messages = plain(record.column("messages"))
        return chat_tokens(self.tokenizer, messages, add_generation_prompt=False)


def chat_tokens(tokenizer: PreTrainedTokenizerBase, messages: Any, *, add_generation_prompt: bool) -> Ints:
    """[T] tokens of a conversation. Raises: BadRow if the chat template refuses it."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
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
