"""What a chat template gets besides the messages: from columns of the row, and for all rows from the options.

    tools, documents        lists of objects
    chat_template_kwargs    an object with the template's own arguments, such as {"enable_thinking": false}

each also as a JSON string. A column of the row wins over `chat_template_kwargs` of the row, and that over the option.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.errors import ConfigError, DataError
from pipeline.teacher.text.chat.messages import wrong_type
from pipeline.teacher.text.chat.template import ChatTemplate
from pipeline.teacher.text.data_config import DataConfig, check_template_arguments
from pipeline.teacher.text.reading.sources import Source

COLUMNS = ("tools", "documents", "chat_template_kwargs")
_REASONING = ("reasoning_content", "reasoning", "thinking")


def open_template(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The template with the arguments for all rows, and a date if it prints one.

    Raises:
        ModelError: the tokenizer has no template.
    """
    template = ChatTemplate(tokenizer, config.chat_template_kwargs or {})
    if not template.prints_today:
        return template
    given = config.template_date
    date = datetime.date.fromisoformat(given) if given else datetime.date.today()
    return ChatTemplate(tokenizer, template.arguments, date)


def describe_options(config: DataConfig, template: ChatTemplate) -> dict[str, Any]:
    """The options of chats for the manifest, with the date that was used."""
    date = {} if template.date is None else {"template_date": template.date.isoformat()}
    return {**config.chat_options(), **date}


def find_unused(config: DataConfig, template: ChatTemplate, source: Source, columns: tuple[str, ...]) -> Iterator[str]:
    """Warnings about what does not reach the template, or does not stay the same."""
    names, read = source.reader.names, template.variables
    of_row = source.reader.first_value(source.rows, COLUMNS[-1]) if COLUMNS[-1] in names else None
    of_row = of_row if isinstance(of_row, Mapping) else {}
    for name in names:
        if name in read and name not in of_row and name not in columns and not template.passes(name):
            yield (
                f"the chat template reads {name!r}, but the column of this name is not passed to it. Put it into a "
                "column chat_template_kwargs, or leave it out if it is something else."
            )
    for name in (*(each for each in COLUMNS[:-1] if each in names), *template.arguments):
        if name not in read:
            yield f"{name!r} is given for the chat template, which does not read it."
    messages = source.reader.first_value(source.rows, columns[-1])
    keys = {key for message in messages or () if isinstance(message, Mapping) for key in message}
    thoughts = [name for name in _REASONING if name in keys]
    if thoughts and not any(name in template.source() for name in _REASONING):
        yield f"messages have {thoughts[0]!r}, which the chat template does not read: these thoughts are left out."
    if config.template_date is not None and template.date is None:
        yield "`template_date` is given, but the chat template prints no date."
    if template.date is not None and config.template_date is None:
        yield (
            f"the chat template prints today's date, here {template.date}. Give `template_date={template.date}` to "
            "every run that should have the same text."
        )


def read_arguments(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a row passes to the template besides its messages.

    Raises:
        DataError: a column does not hold what the template needs.
    """
    found: dict[str, Any] = {}
    for name, kind in zip(COLUMNS, (list, list, Mapping), strict=True):
        value, here = row.get(name), f"{where}, column {name!r}"
        if isinstance(value, str):
            value = _from_json(value, here)
        if value is None:
            continue
        items_expected = kind is list and not all(isinstance(item, Mapping) for item in value)
        if not isinstance(value, kind) or items_expected:
            expected = "a list of objects" if kind is list else "an object"
            raise DataError(f"{here}: {wrong_type(value, expected)}. Correct the row.")
        if kind is list:
            found[name] = value
            continue
        try:
            arguments = check_template_arguments(value)
        except ConfigError as error:
            raise DataError(f"{here}: {str(error).partition(': ')[2]}") from error
        found = {**arguments, **found}  # a column of its own wins
    return found


def _from_json(value: str, where: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"{where}: found a string that is not JSON ({error}). Correct the row.") from error
