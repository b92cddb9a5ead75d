"""Which columns of the rows hold the text, and in which format.

    messages                    a list of {role, content}: rendered with the teacher's chat template
    prompt-completion           two strings, joined
    prompt-completion-messages  the same two columns holding lists of messages
    text                        a string
    token-ids                   a list of token ids, and columns that say which are in the loss (see `token_ids`)

A prompt for the teacher alone may stand beside the student's (see `teacher_prompts`): the column teacher_prompt beside
prompt and completion, of the same kind as prompt; teacher_messages beside messages; teacher_input_ids beside input_ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.errors import ConfigError, DataError
from pipeline.teacher.text.chat import arguments
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.reading.sources import Source

IDS, TEACHER_IDS = "input_ids", "teacher_input_ids"
LABELS, SPANS = "labels", "loss_spans"
MASKS = ("loss_mask", "completion_mask", "assistant_masks")
LOSS_COLUMNS = (LABELS, *MASKS, SPANS)  # of token ids
PADDING, PACKED_POSITIONS, PACKED_LENGTHS = OTHER_COLUMNS = ("attention_mask", "position_ids", "seq_lengths")

Format = Literal[
    "text",
    "messages",
    "prompt-completion",
    "prompt-completion-messages",
    "prompt",
    "prompt-messages",
    "token-ids",
]

_TEACHER_COLUMNS: dict[Format, str] = {
    "messages": "teacher_messages",
    "prompt-completion": "teacher_prompt",
    "prompt-completion-messages": "teacher_prompt",
    "prompt": "teacher_prompt",
    "prompt-messages": "teacher_prompt",
    "token-ids": TEACHER_IDS,
}


@dataclass(frozen=True)
class Columns:
    """The format of the rows, and the columns that hold it.

    Attributes:
        names: one or two columns; of token ids further ones, which decide the loss.
        teacher: the column of the prompt that the teacher reads instead of the student's.
    """

    format: Format
    names: tuple[str, ...]
    teacher: str | None = None

    @property
    def all_names(self) -> tuple[str, ...]:
        return self.names if self.teacher is None else (*self.names, self.teacher)

    def to_read(self, existing: Sequence[str]) -> list[str]:
        """These columns and the existing ones that go with them: of a chat those that its template gets."""
        further = arguments.COLUMNS if self.is_chat else OTHER_COLUMNS if self.is_ids else ()
        return [*self.all_names, *(name for name in further if name in existing)]

    @property
    def is_chat(self) -> bool:
        return self.format.endswith("messages")

    @property
    def is_ids(self) -> bool:
        return self.format == "token-ids"

    @property
    def loss_choices(self) -> tuple[str, ...]:
        """Values of `loss_on` that this format allows; the first is the default."""
        choices = {
            "text": ("all",),
            "messages": ("assistant", "all"),
            "prompt-completion": ("completion", "all"),
            "prompt-completion-messages": ("completion", "assistant", "all"),
            "token-ids": ("labels", "all") if len(self.names) > 1 else ("all",),
        }[self.format]
        return choices if self.teacher is None else choices[:1]


def find_columns(source: Source, text_column: str | None, data: str) -> Columns:
    """The columns with the text: `text_column`, else `messages`, else `prompt` and `completion`, else `text`, else
    `input_ids`, else the only column of strings.

    Raises:
        DataError: no such column, or none of these, or a prompt for the teacher that does not go with them.
    """
    return _with_teacher(_text_columns(source, text_column, data), source, data)


def _text_columns(source: Source, text_column: str | None, data: str) -> Columns:
    names = source.reader.names
    if text_column is not None and text_column not in names:
        raise DataError(
            f"{data}: no column {text_column!r}, found {', '.join(names)}. Choose one of them as `text_column`."
        )
    if text_column is not None and _is_list(source, text_column, of=int):
        return _id_columns(names, text_column)
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
    if IDS in names:
        return _id_columns(names, IDS)
    strings = source.reader.string_columns(source.rows)
    if len(strings) == 1:
        return Columns("text", (strings[0],))
    raise DataError(
        f"{data}: found columns {', '.join(names)}, expected 'text', 'messages', 'prompt' with 'completion', "
        "'input_ids', or one column of strings. Name the column with the text as `text_column`."
    )


def _id_columns(names: Sequence[str], ids: str) -> Columns:
    return Columns("token-ids", (ids, *(name for name in LOSS_COLUMNS if name in names)))


def _with_teacher(columns: Columns, source: Source, data: str) -> Columns:
    """With the column of the teacher's prompts, if there is one."""
    expected = _TEACHER_COLUMNS.get(columns.format)
    given = [name for name in dict.fromkeys(_TEACHER_COLUMNS.values()) if name in source.reader.names]
    if not given:
        return columns
    if given != [expected]:
        instead = "no prompt for the teacher" if expected is None else f"only {expected!r}"
        raise DataError(
            f"{data}: found column {next(name for name in given if name != expected)!r} beside {columns.format} data "
            f"(column {', '.join(columns.names)}), expected {instead}. Rename or remove it."
        )
    return replace(columns, teacher=expected)


def find_prompt(source: Source, text_column: str | None, data: str) -> Columns:
    """The column with the prompts: `messages`, else `prompt` (text or messages), else as in `find_columns`."""
    names = source.reader.names
    if text_column is None and "messages" not in names and "prompt" in names:
        columns = Columns("prompt-messages" if _is_list(source, "prompt") else "prompt", ("prompt",))
        return _with_teacher(columns, source, data)
    columns = find_columns(source, text_column, data)
    if columns.is_ids:
        raise DataError(
            f"{data}: found token ids (column {columns.names[0]}), expected prompts as text or messages for a teacher "
            "that answers them. Use `text_column`."
        )
    return columns


def check_chat_options(config: DataConfig, columns: Columns, data: str) -> None:
    """Raises: ConfigError for an option of chats with other data."""
    if not columns.is_chat and (unused := config.chat_options()):
        raise ConfigError(
            f"{data}: `{min(unused)}` is for chats, found {columns.format} data (column {', '.join(columns.names)}). "
            "Leave it out."
        )


def _is_list(source: Source, name: str, of: type = object) -> bool:
    """Decided by the first value: `datasets` has several types for lists of objects."""
    value = source.reader.first_value(source.rows, name)
    return isinstance(value, list) and (of is object or bool(value and isinstance(value[0], of)))
