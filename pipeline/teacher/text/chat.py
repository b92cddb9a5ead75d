"""A conversation as text, and the character spans of it that are in the loss.

A template with `{% generation %}` blocks marks what the assistant writes. Most templates have none; there, the
assistant's text is what one rendered prefix of the conversation has more than another:

    render(messages[:k], add_generation_prompt=True)  …<|im_start|>assistant\\n
    render(messages[:k + 1])                          …<|im_start|>assistant\\nFour.<|im_end|>\\n
                                                                              ^^^^^^^^^^^^^^^

without trailing white space: the token that ends the turn is in the loss, the newline after it is not. A template that
rewrites earlier messages, for example by dropping their reasoning, has no such prefixes and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from pipeline.errors import DataError, ModelError

Message = Mapping[str, Any]
Span = tuple[int, int]  # characters [start, stop)

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that conversations are rendered with.

    Raises:
        ModelError: the tokenizer has none.
    """
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise ModelError(
            f"{tokenizer.name_or_path or 'teacher'}: the tokenizer has no chat template, expected "
            "one to render messages. Use an instruction-tuned teacher, or plain text."
        ) from error


def check_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """The messages without their null fields.

    Raises:
        DataError: not a list of messages; names `where` and the message.
    """
    if not isinstance(messages, list):
        raise DataError(f"{where}: {wrong_type(messages, 'a list of messages')}. Correct the row.")
    cleaned = []
    for index, message in enumerate(messages):
        here = f"{where}, message {index}"
        if not isinstance(message, Mapping):
            expected = "an object with role and content"
            raise DataError(f"{here}: {wrong_type(message, expected)}. Correct the row.")
        # In an Arrow column every message has every key; absent ones are null.
        message = {key: value for key, value in message.items() if value is not None}
        if not isinstance(message.get("role"), str):
            raise DataError(
                f"{here}: found keys {', '.join(map(str, message))}, expected a string 'role' and "
                "'content'. Correct the row, or rename the keys."
            )
        content = message.get("content")
        if content is None and "tool_calls" in message:
            content = ""
        if not isinstance(content, (str, list)):  # a list holds content in parts
            problem = wrong_type(content, "a string as content")
            raise DataError(f"{here} ({message['role']}): {problem}. Correct the row.")
        cleaned.append(message)
    return cleaned


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str) -> str:
    """The conversation as text, with special tokens.

    Raises:
        DataError: the template cannot render it.
    """
    return _render(tokenizer, messages, where)[0]


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str) -> str:
    """The conversation as text, followed by the opening of the assistant's turn."""
    return _render(tokenizer, messages, where, add_generation_prompt=True)[0]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the template puts after an assistant's message, such as <|im_end|>; empty if it is not found."""
    question, answer = {"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}
    try:
        text, spans = assistant_spans(tokenizer, [question, answer], "chat template")
    except DataError:  # a template that does not accept these two
        return ""
    return text[slice(*spans[-1])].rpartition("Answer")[2] if spans else ""


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str, *, first: int = 0
) -> tuple[str, list[Span]]:
    """The conversation as text, and the spans of the assistant's messages, starting with message `first`.

    Raises:
        DataError: the template cannot render it, or rewrites earlier messages.
    """
    if _GENERATION_BLOCK.search(chat_template(tokenizer)):
        text, spans = _render(tokenizer, messages, where, with_spans=True)
        begin = _prefix_length(tokenizer, messages[:first], text, where) if first else 0
        return text, [span for span in spans if span[0] >= begin]
    text = render(tokenizer, messages, where)
    spans = []
    for index in range(first, len(messages)):
        if messages[index]["role"] == "assistant":
            start = _prefix_length(tokenizer, messages[:index], text, where, open_turn=True)
            stop = _prefix_length(tokenizer, messages[: index + 1], text, where)
            spans.append((start, start + len(text[start:stop].rstrip())))
    return text, spans


def wrong_type(value: Any, expected: str) -> str:
    """Part of an error message: what was found and expected."""
    return f"found {'null' if value is None else type(value).__name__}, expected {expected}"


def _prefix_length(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    text: str,
    where: str,
    *,
    open_turn: bool = False,
) -> int:
    """The length of the prefix of `text` that renders `messages`, with the opening of the assistant's turn if asked."""
    prefix, _ = _render(tokenizer, messages, where, add_generation_prompt=open_turn)
    if not text.startswith(prefix):
        raise DataError(
            f"{where}: the chat template renders the first {len(messages)} messages differently when more follow, "
            "expected a prefix, which is needed to find the assistant's text. Use `loss_on=all` to train on all "
            "tokens, or a tokenizer whose template has {% generation %} blocks."
        )
    return len(prefix)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    where: str,
    *,
    add_generation_prompt: bool = False,
    with_spans: bool = False,
) -> tuple[str, list[Span]]:
    # Not apply_chat_template: it converts spans to a token mask, which loses everything after a span
    # that begins with trimmed white space, and it refuses an empty conversation.
    try:
        texts, spans = render_jinja_template(
            conversations=[list(messages)],
            chat_template=chat_template(tokenizer),
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=with_spans,
            **tokenizer.special_tokens_map,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}: the chat template cannot render the first {len(messages)} messages: {error}. "
            "Correct the row, or use a teacher whose template accepts such conversations."
        ) from error
    return texts[0], spans[0] if with_spans else []
