"""One row of a dataset as text, and the character spans of it that are in the loss.

The columns decide the format (see `row_format`). Beside messages, the columns `tools`, `documents` and
`chat_template_kwargs` are passed to the template. A conversation whose template drops earlier thoughts becomes several
texts, one for each answer (see `chat.turns`).

Prompts for the teacher to answer (`read_prompt`) come from the same columns without the answer: the last message is
dropped if it is the assistant's, and `completion` is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import DataError
from pipeline.teacher.text.chat.arguments import read_arguments
from pipeline.teacher.text.chat.messages import check_messages, read_conversation, wrong_type
from pipeline.teacher.text.chat.template import ChatTemplate, Span
from pipeline.teacher.text.chat.turns import render_turns
from pipeline.teacher.text.formats.row_format import Columns


@dataclass(frozen=True)
class Example:
    """Attributes: teacher: of a row with a prompt for the teacher, the text that it reads."""

    text: str
    spans: list[Span] | None = None  # characters [start, stop) in the loss; None: all
    teacher: Example | None = None


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
        example = _behind(prompt, completion)
        if loss_on == "all":
            return [replace(example, spans=None)]
        if columns.teacher is None or row[columns.teacher] is None:
            return [example]
        return [replace(example, teacher=_behind(_string(row, columns.teacher, where), completion))]

    assert template is not None  # of a chat
    parts = [check_messages(row[name], f"{where}, column {name!r}") for name in columns.names]
    messages = [message for part in parts for message in part]
    if not messages:
        return [Example("")]
    conversation = read_conversation(template, messages, read_arguments(row, where), where)
    if loss_on == "all":
        return [Example(conversation.text())]
    first, last_only = len(parts[0]) if loss_on == "completion" else 0, turns == "last"
    rendered = [Example(*each) for each in render_turns(conversation, first=first, last_only=last_only)]
    if columns.teacher is None or row[columns.teacher] is None:
        return rendered
    answers = [k for k in range(first, len(messages)) if messages[k]["role"] == "assistant"]
    begin = first if loss_on == "completion" else (answers or [0])[-1 if last_only else 0]
    before = check_messages(row[columns.teacher], f"{where}, column {columns.teacher!r}")
    _check_teacher_messages(before, 1 if last_only else len(answers), f"{where}, column {columns.teacher!r}")
    theirs = read_conversation(template, [*before, *messages[begin:]], read_arguments(row, where), where)
    read = [Example(*each) for each in render_turns(theirs, first=len(before), last_only=last_only)]
    if len(read) != len(rendered):
        raise DataError(
            f"{where}: the chat template makes {len(rendered)} documents of the conversation with the student's prompt "
            f"and {len(read)} with the teacher's. Use `turns=last`, or one answer in each row."
        )
    return [replace(ours, teacher=teacher) for ours, teacher in zip(rendered, read, strict=True)]


def _check_teacher_messages(prompt: Sequence[Mapping[str, Any]], answers: int, where: str) -> None:
    """Raises: DataError for messages that the answers cannot follow."""
    roles = [message["role"] for message in prompt]
    if roles and roles[-1] == "assistant":
        raise DataError(
            f"{where}: the last message is the assistant's, expected the messages before the answer, which is taken "
            "from the student's row. Remove it."
        )
    if "assistant" in roles and answers > 1:
        raise DataError(
            f"{where}: found an assistant's message, and {answers} answers in the loss: these follow the teacher's "
            "prompt from the first one on, so that the conversation would be repeated. Use `turns=last` for the last "
            "answer alone, or give the teacher the messages before the first one."
        )


def _behind(prompt: str, completion: str) -> Example:
    """With the loss on the completion."""
    text = prompt + completion
    return Example(text, [(len(prompt), len(text))])


def read_prompt(row: Mapping[str, Any], where: str, *, columns: Columns, template: ChatTemplate | None) -> str:
    """The text that the student is to continue, and the teacher too if there is no other prompt for it.

    Raises:
        DataError: as `read_examples`.
    """
    if not columns.is_chat:
        return _string(row, columns.names[0], where, null_is_empty=True)
    return _opened(read_messages(row, where, columns), row, where, template)


def read_teacher_prompt(
    row: Mapping[str, Any], where: str, *, columns: Columns, template: ChatTemplate | None
) -> str | None:
    """The text that the teacher is to continue, if it has a prompt of its own in this row. Raises: DataError."""
    if columns.teacher is None or row[columns.teacher] is None:
        return None
    if not columns.is_chat:
        return _string(row, columns.teacher, where)
    return _opened(read_teacher_messages(row, where, columns.teacher), row, where, template)


def read_messages(row: Mapping[str, Any], where: str, columns: Columns) -> Sequence[Mapping[str, Any]]:
    """The conversation that is to be continued. Raises: DataError."""
    (name,) = columns.names
    messages = check_messages(row[name], f"{where}, column {name!r}")
    answered = columns.format == "messages" and messages and messages[-1]["role"] == "assistant"
    return messages[:-1] if answered else messages


def read_teacher_messages(row: Mapping[str, Any], where: str, column: str) -> Sequence[Mapping[str, Any]]:
    """The conversation that the teacher is to continue. Raises: DataError."""
    here = f"{where}, column {column!r}"
    messages = check_messages(row[column], here)
    _check_teacher_messages(messages, 1, here)
    return messages


def _opened(
    messages: Sequence[Mapping[str, Any]], row: Mapping[str, Any], where: str, template: ChatTemplate | None
) -> str:
    """The conversation up to the assistant's turn."""
    assert template is not None  # of a chat
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
