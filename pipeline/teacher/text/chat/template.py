"""A teacher's chat template, and everything that it is rendered with besides the messages.

A conversation is rendered exactly as `apply_chat_template(messages, tools=…, documents=…, **chat_template_kwargs)`
renders it. Two things differ from calling that: spans stay character spans, and a template that prints today's date
prints a fixed one, so that all workers and a later continuation see the same text.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from pipeline.errors import DataError, ModelError

Message = Mapping[str, Any]
Span = tuple[int, int]  # characters [start, stop)

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TODAY = "strftime_now"


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's template with arguments that hold for all rows.

    Attributes:
        arguments: `tools`, `documents` and the template's own, such as `enable_thinking`.
        date: what the template takes for today.
    """

    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, Any] = field(default_factory=dict)
    date: datetime.date | None = None

    def source(self, tools: Any = None) -> str:
        """The Jinja text; some tokenizers have another one for conversations with tools.

        Raises:
            ModelError: the tokenizer has none.
        """
        try:
            return self.tokenizer.get_chat_template(tools=tools)
        except ValueError as error:
            raise ModelError(
                f"{self.tokenizer.name_or_path or 'teacher'}: the tokenizer has no chat template, expected "
                "one to render messages. Use an instruction-tuned teacher, or plain text."
            ) from error

    @property
    def variables(self) -> frozenset[str]:
        """The names that the template reads, with and without tools."""
        return _variables(self.source()) | _variables(self.source(tools=[]))

    @property
    def prints_today(self) -> bool:
        return _TODAY in self.variables

    def passes(self, name: str) -> bool:
        """Whether the template gets a value of this name for every row, or from the columns made for it."""
        passed = {"messages", "tools", "documents", "add_generation_prompt"}
        return name in passed or name in self.arguments or name in self.tokenizer.special_tokens_map


@dataclass(frozen=True)
class Conversation:
    """The messages of one row, ready to be rendered.

    Attributes:
        arguments: of the row; they win over those of the template.
        where: the row, for errors.
    """

    template: ChatTemplate
    messages: Sequence[Message]
    arguments: Mapping[str, Any]
    where: str

    @property
    def has_blocks(self) -> bool:
        """Whether the template marks what the assistant writes, with {% generation %}."""
        return _GENERATION_BLOCK.search(self._source) is not None

    def text(self, stop: int | None = None, *, open_turn: bool = False) -> str:
        """The first `stop` messages as text with special tokens, followed by the opening of the assistant's turn if
        asked.

        Raises:
            DataError: the template cannot render them.
        """
        return self._render(stop, open_turn=open_turn)[0]

    def text_and_blocks(self, stop: int | None = None) -> tuple[str, list[Span]]:
        """`text`, and the spans that the template marks. Raises: DataError."""
        return self._render(stop, with_blocks=True)

    def with_messages(self, messages: Sequence[Message]) -> Conversation:
        return replace(self, messages=messages)

    @property
    def _all_arguments(self) -> dict[str, Any]:
        return {**self.template.arguments, **self.arguments}

    @property
    def _source(self) -> str:
        return self.template.source(self._all_arguments.get("tools"))

    def _render(
        self, stop: int | None, *, open_turn: bool = False, with_blocks: bool = False
    ) -> tuple[str, list[Span]]:
        # Not apply_chat_template: it converts spans to a token mask, which loses everything after a span
        # that begins with trimmed white space, and it refuses an empty conversation.
        messages, source = list(self.messages[:stop]), self._source
        try:
            with _today(source, self.template.date):
                texts, spans = render_jinja_template(
                    conversations=[messages],
                    chat_template=source,
                    add_generation_prompt=open_turn,
                    return_assistant_tokens_mask=with_blocks,
                    **{**self.template.tokenizer.special_tokens_map, **self._all_arguments},
                )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.where}: the chat template cannot render the first {len(messages)} messages: {error}. "
                "Correct the row, or use a teacher whose template accepts such conversations."
            ) from error
        return texts[0], spans[0] if with_blocks else []


@lru_cache(maxsize=16)
def _variables(source: str) -> frozenset[str]:
    parsed = _compile_jinja_template(source).environment.parse(source)
    # Functions of the environment are not undeclared, but this one counts.
    today = {_TODAY} & {name.name for name in parsed.find_all(jinja2.nodes.Name)}
    return frozenset(jinja2.meta.find_undeclared_variables(parsed) | today)


@contextmanager
def _today(source: str, date: datetime.date | None) -> Iterator[None]:
    """Inside the block the template takes `date` for today."""
    # transformers renders this very object, and turns a function among the arguments into a string.
    own = _compile_jinja_template(source).globals
    if date is None:
        yield
        return
    before, midnight = own[_TODAY], datetime.datetime.combine(date, datetime.time())
    own[_TODAY] = midnight.strftime
    try:
        yield
    finally:
        own[_TODAY] = before
