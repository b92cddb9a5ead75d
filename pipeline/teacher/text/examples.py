"""One row of a dataset as text, and the character spans of it that are in the loss.

The columns decide the format:

    messages                    a list of {role, content}: rendered with the teacher's chat template
    prompt-completion           two strings, joined
    prompt-completion-messages  the same two columns holding lists of messages
    text                        a string

Beside messages, the columns `tools`, `documents` and `chat_template_kwargs` are passed to the template. A conversation
whose template drops earlier thoughts becomes several texts, one for each answer (see `chat.turns`).

Prompts for the teacher to answer (`find_prompt`, `read_prompt`) come from the same columns without the answer: the last
message is dropped if it is the assistant's, and `completion` is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import ConfigError, DataError
from pipeline.teacher.cache_config import DataConfig
from pipeline.teacher.text.chat import arguments
from pipeline.teacher.text.chat.arguments import read_arguments
from pipeline.teacher.text.chat.messages import check_messages, read_conversation, wrong_type
from pipeline.teacher.text.chat.template import ChatTemplate, Span
from pipeline.teacher.text.chat.turns import render_turns
from pipeline.teacher.text.sources import Source


@dataclass(frozen=True)
class Columns:
    """The format of the rows, and the one or two columns that hold it."""

    format: Literal["text", "messages", "prompt-completion", "prompt-completion-messages", "prompt", "prompt-messages"]
    names: tuple[str, ...]

    def to_read(self, existing: Sequence[str]) -> list[str]:
        """These columns and, of a chat, the existing ones that its template gets."""
        further = [name for name in arguments.COLUMNS if name in existing] if self.is_chat else []
        return [*self.names, *further]

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
    spans: list[Span] | None = None  # characters [start, stop) in the loss; None: all


def find_columns(source: Source, text_column: str | None, data: str) -> Columns:
    """The columns with the text: `text_column`, else `messages`, else `prompt` and `completion`, else `text`, else the
    only column of strings.

    Raises:
        DataError: no such column, or none of these.
    """
    names = source.reader.names
    if text_column is not None and text_column not in names:
        raise DataError(
            f"{data}: no column {text_column!r}, found {', '.join(names)}. Choose one of them as `text_column`."
        )
    if text_column is not None:
        return Columns("messages" if _is_list(source, text_column) else "text", (text_column,))
    if "messages" in names:
        return Columns("messages", ("messages",))
    if "prompt" in names and "completion" in names:
        pair = ("prompt", "completion")
        lists = _is_list(source, "prompt")
        return Columns("prompt-completion-messages" if lists else "prompt-completion", pair)
    if "text" in names:
        return Columns("text", ("text",))
    strings = source.reader.string_columns(source.rows)
    if len(strings) == 1:
        return Columns("text", (strings[0],))
    raise DataError(
        f"{data}: found columns {', '.join(names)}, expected 'text', 'messages', 'prompt' with 'completion', or one "
        "column of strings. Name the column with the text as `text_column`."
    )


def check_chat_options(config: DataConfig, columns: Columns, data: str) -> None:
    """Raises: ConfigError for an option of chats with other data."""
    if not columns.is_chat and (unused := config.chat_options()):
        raise ConfigError(
            f"{data}: `{min(unused)}` is for chats, found {columns.format} data (column {', '.join(columns.names)}). "
            "Leave it out."
        )


def read_examples(
    row: Mapping[str, Any],
    where: str,
    *,
    columns: Columns,
    loss_on: str,
    turns: str,
    template: ChatTemplate | None,
) -> list[Example]:
    """The text of a row and its spans in the loss; several if the template does not render a chat as one.

    Args:
        template: of chats only.

    Raises:
        DataError: the row does not have the format; names `where`, the column and, in a chat, the message.
    """
    if columns.format == "text":
        return [Example(_string(row, columns.names[0], where, null_is_empty=True))]
    if columns.format == "prompt-completion":
        prompt, completion = (_string(row, name, where) for name in columns.names)
        text = prompt + completion
        return [Example(text, None if loss_on == "all" else [(len(prompt), len(text))])]

    assert template is not None  # of a chat
    parts = [check_messages(row[name], f"{where}, column {name!r}") for name in columns.names]
    messages = [message for part in parts for message in part]
    if not messages:
        return [Example("")]
    conversation = read_conversation(template, messages, read_arguments(row, where), where)
    if loss_on == "all":
        return [Example(conversation.text())]
    first = len(parts[0]) if loss_on == "completion" else 0
    return [Example(*each) for each in render_turns(conversation, first=first, last_only=turns == "last")]


def find_prompt(source: Source, text_column: str | None, data: str) -> Columns:
    """The column with the prompts: `messages`, else `prompt` (text or messages), else as in `find_columns`."""
    names = source.reader.names
    if text_column is None and "messages" not in names and "prompt" in names:
        return Columns("prompt-messages" if _is_list(source, "prompt") else "prompt", ("prompt",))
    return find_columns(source, text_column, data)


def read_prompt(row: Mapping[str, Any], where: str, *, columns: Columns, template: ChatTemplate | None) -> str:
    """The text that the teacher is to continue.

    Raises:
        DataError: as `read_examples`.
    """
    (name,) = columns.names
    if not columns.is_chat:
        return _string(row, name, where, null_is_empty=True)
    assert template is not None  # of a chat
    messages = check_messages(row[name], f"{where}, column {name!r}")
    if columns.format == "messages" and messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        return ""
    return read_conversation(template, messages, read_arguments(row, where), where).text(open_turn=True)


def _string(row: Mapping[str, Any], name: str, where: str, *, null_is_empty: bool = False) -> str:
    value = row[name]
    if value is None and null_is_empty:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{where}, column {name!r}: {wrong_type(value, 'a string')}. "
            "Correct the row, or choose another `text_column`."
        )
    return value


def _is_list(source: Source, name: str) -> bool:
    """Decided by the first value: `datasets` has several types for lists of objects."""
    return isinstance(source.reader.first_value(source.rows, name), list)
