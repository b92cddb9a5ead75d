"""One row of a dataset as text, and the character spans in it that the student is to learn.

Formats are told apart by their columns:

    messages                    a list of {role, content}: rendered with the teacher's chat template
    prompt-completion           two strings, joined
    prompt-completion-messages  the same two columns holding lists of messages
    text                        a string

Of prompts that the teacher is to answer (`find_prompt`, `read_prompt`) the same columns are taken, without what follows
the question: of `messages` a last answer is dropped, and a `completion` is never shown.
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
    """What the rows hold, and in which one or two columns."""

    format: Literal["text", "messages", "prompt-completion", "prompt-completion-messages", "prompt", "prompt-messages"]
    names: tuple[str, ...]

    @property
    def is_chat(self) -> bool:
        return self.format.endswith("messages")

    @property
    def loss_choices(self) -> tuple[str, ...]:
        """What the loss can be on; the first is the natural choice."""
        return {
            "text": ("all",),
            "messages": ("assistant", "all"),
            "prompt-completion": ("completion", "all"),
            "prompt-completion-messages": ("completion", "assistant", "all"),
        }[self.format]


@dataclass(frozen=True)
class Example:
    text: str
    spans: list[chat.Span] | None = None  # characters [start, stop) to learn; None: all


def find_columns(rows: datasets.Dataset, text_column: str | None, data: str) -> Columns:
    """An explicit column wins; then `messages`; then `prompt` with `completion`; then `text`; then
    the only column of strings."""
    names = rows.column_names
    if text_column is not None and text_column not in names:
        raise DataError(
            f"{data}: no column {text_column!r}, found {', '.join(names)}. Choose one of them as the text column."
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
        f"{data}: found columns {', '.join(names)}, expected `text`, `messages`, `prompt` with "
        "`completion`, or one column of strings. Name the one with the text (--text-column)."
    )


def read_example(
    row: Mapping[str, Any],
    where: str,
    *,
    columns: Columns,
    loss_on: str,
    tokenizer: PreTrainedTokenizerBase,
) -> Example:
    """Render and locate; DataError naming `where`, the column and, in a chat, the message."""
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
    """Where the prompts are: `messages`, else `prompt` (text or messages), else as in `find_columns`."""
    names = rows.column_names
    if text_column is None and "messages" not in names and "prompt" in names:
        return Columns("prompt-messages" if _is_list(rows, "prompt") else "prompt", ("prompt",))
    return find_columns(rows, text_column, data)


def read_prompt(row: Mapping[str, Any], where: str, *, columns: Columns, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the teacher is to go on from; DataError naming `where`, the column and, in a chat, the message."""
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
            "Correct the row, or name another column as the text."
        )
    return value


def _is_list(rows: datasets.Dataset, name: str) -> bool:
    """By value: `datasets` has several types for lists of objects, by how uniform they are."""
    values = (row[name] for row in rows.select_columns(name))
    return isinstance(next((value for value in values if value is not None), None), list)
