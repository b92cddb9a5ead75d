"""One row of a dataset as text, and the character spans of it that are in the loss.

The columns decide the format:

    messages                    a list of {role, content}: rendered with the teacher's chat template
    prompt-completion           two strings, joined
    prompt-completion-messages  the same two columns holding lists of messages
    text                        a string

Prompts for the teacher to answer (`find_prompt`, `read_prompt`) come from the same columns without the answer: the last
message is dropped if it is the assistant's, and `completion` is not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import datasets
from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError
from pipeline.teacher.text import chat


@dataclass(frozen=True)
class Columns:
    """The format of the rows, and the one or two columns that hold it."""

    format: Literal["text", "messages", "prompt-completion", "prompt-completion-messages", "prompt", "prompt-messages"]
    names: tuple[str, ...]

    @property
    def is_chat(self) -> bool:
        return self.format.endswith("messages")

    @property
    def loss_choices(self) -> tuple[str, ...]:
        """Values of `loss_on` that this format allows; the first is the default."""
        return {
            "text": ("all",),
            "messages": ("assistant", "all"),
            "prompt-completion": ("completion", "all"),
            "prompt-completion-messages": ("completion", "assistant", "all"),
        }[self.format]


@dataclass(frozen=True)
class Example:
    text: str
    spans: list[chat.Span] | None = None  # characters [start, stop) in the loss; None: all


def find_columns(rows: datasets.Dataset, text_column: str | None, data: str) -> Columns:
    """The columns with the text: `text_column`, else `messages`, else `prompt` and `completion`, else `text`, else the
    only column of strings.

    Raises:
        DataError: no such column, or none of these.
    """
    names = rows.column_names
    if text_column is not None and text_column not in names:
        raise DataError(
            f"{data}: no column {text_column!r}, found {', '.join(names)}. Choose one of them as `text_column`."
        )
    if text_column is not None:
        return Columns("messages" if _is_list(rows, text_column) else "text", (text_column,))
    if "messages" in names:
        return Columns("messages", ("messages",))
    if "prompt" in names and "completion" in names:
        pair = ("prompt", "completion")
        lists = _is_list(rows, "prompt")
        return Columns("prompt-completion-messages" if lists else "prompt-completion", pair)
    if "text" in names:
        return Columns("text", ("text",))
    string_types = (datasets.Value("string"), datasets.Value("large_string"))
    strings = [name for name, kind in rows.features.items() if kind in string_types]
    if len(strings) == 1:
        return Columns("text", (strings[0],))
    raise DataError(
        f"{data}: found columns {', '.join(names)}, expected 'text', 'messages', 'prompt' with 'completion', or one "
        "column of strings. Name the column with the text as `text_column`."
    )


def read_example(
    row: Mapping[str, Any],
    where: str,
    *,
    columns: Columns,
    loss_on: str,
    tokenizer: PreTrainedTokenizerBase,
) -> Example:
    """The text of a row and its spans in the loss.

    Raises:
        DataError: the row does not have the format; names `where`, the column and, in a chat, the message.
    """
    if columns.format == "text":
        return Example(_string(row, columns.names[0], where, null_is_empty=True))
    if columns.format == "prompt-completion":
        prompt, completion = (_string(row, name, where) for name in columns.names)
        text = prompt + completion
        return Example(text, None if loss_on == "all" else [(len(prompt), len(text))])

    parts = [chat.check_messages(row[name], f"{where}, column {name!r}") for name in columns.names]
    messages = [message for part in parts for message in part]
    if not messages:
        return Example("")
    if loss_on == "all":
        return Example(chat.render(tokenizer, messages, where))
    first = len(parts[0]) if loss_on == "completion" else 0
    return Example(*chat.assistant_spans(tokenizer, messages, where, first=first))


def find_prompt(rows: datasets.Dataset, text_column: str | None, data: str) -> Columns:
    """The column with the prompts: `messages`, else `prompt` (text or messages), else as in `find_columns`."""
    names = rows.column_names
    if text_column is None and "messages" not in names and "prompt" in names:
        return Columns("prompt-messages" if _is_list(rows, "prompt") else "prompt", ("prompt",))
    return find_columns(rows, text_column, data)


def read_prompt(row: Mapping[str, Any], where: str, *, columns: Columns, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the teacher is to continue.

    Raises:
        DataError: as `read_example`.
    """
    (name,) = columns.names
    if not columns.is_chat:
        return _string(row, name, where, null_is_empty=True)
    messages = chat.check_messages(row[name], f"{where}, column {name!r}")
    if columns.format == "messages" and messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return chat.render_prompt(tokenizer, messages, where) if messages else ""


def _string(row: Mapping[str, Any], name: str, where: str, *, null_is_empty: bool = False) -> str:
    value = row[name]
    if value is None and null_is_empty:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{where}, column {name!r}: {chat.wrong_type(value, 'a string')}. "
            "Correct the row, or choose another `text_column`."
        )
    return value


def _is_list(rows: datasets.Dataset, name: str) -> bool:
    """Decided by the first value: `datasets` has several types for lists of objects."""
    values = (row[name] for row in rows.select_columns(name))
    return isinstance(next((value for value in values if value is not None), None), list)
