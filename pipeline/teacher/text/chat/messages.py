"""The messages of a row as data sets really have them, in the form that the teacher's template expects.

    content        a string, or parts such as [{"type": "text", "text": "Hi"}]; a template that does not know parts
                   would print the list as Python code, so it gets the joined text
    arguments      of a tool call: an object, or the same as a JSON string; a template made for one prints the other as
                   Python code or quotes it twice, or fails

A conversation is passed on as written if the template prints it properly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pipeline.errors import DataError
from pipeline.teacher.text.chat.template import ChatTemplate, Conversation, Message


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
        # As apply_chat_template does: content and tool_calls are often null.
        message = {key: value for key, value in message.items() if value is not None}
        if not isinstance(message.get("role"), str):
            raise DataError(
                f"{here}: found keys {', '.join(map(str, message))}, expected a string 'role' and "
                "'content'. Correct the row, or rename the keys."
            )
        content = message.get("content")
        if content is None and "tool_calls" in message:
            content = ""
        if isinstance(content, list):
            _check_parts(content, f"{here} ({message['role']})")
        elif not isinstance(content, str):
            problem = wrong_type(content, "a string as content")
            raise DataError(f"{here} ({message['role']}): {problem}. Correct the row.")
        cleaned.append(message)
    return cleaned


def _check_parts(parts: Sequence[Any], where: str) -> None:
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else wrong_type(part, "an object")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"{where}, part {index} of the content: found {kind}, expected type 'text' with a string 'text': only "
                "text can be distilled. Remove the part or the row."
            )


def read_conversation(
    template: ChatTemplate, messages: Sequence[Message], arguments: Mapping[str, Any], where: str
) -> Conversation:
    """The conversation in the first form that the template prints properly, beginning with the one it is written in.

    Raises:
        DataError: the template can render none.
    """
    written = Conversation(template, messages, arguments, where)
    forms = [written.with_messages(form) for form in _forms(messages)]
    if len(forms) == 1:
        return written
    rendered: list[Conversation] = []
    failure: DataError | None = None
    for form in forms:
        try:
            text = form.text()
        except DataError as error:
            failure = failure or error
            continue
        if not any(leak in text for message in form.messages for leak in _leaks(message)):
            return form
        rendered.append(form)
    if failure is not None and not rendered:
        raise failure
    return rendered[0]


def plain_text(message: Message) -> str:
    """The content as one string."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def wrong_type(value: Any, expected: str) -> str:
    """Part of an error message: what was found and expected."""
    return f"found {'null' if value is None else type(value).__name__}, expected {expected}"


def _forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The messages as written, with joined parts, and with the arguments of tool calls as objects or as strings."""
    seen: list[list[Message]] = []
    for arguments in (None, _as_object, _as_string):
        for joined in (False, True):
            form = [_with_arguments(message, arguments) if arguments else message for message in messages]
            if joined:
                form = [{**m, "content": plain_text(m)} if isinstance(m.get("content"), list) else m for m in form]
            if form not in seen:
                seen.append(form)
                yield form


def _calls(message: Message) -> list[Mapping[str, Any]]:
    calls = message.get("tool_calls")
    return [call for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else []


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where name and arguments are: in `function`, or in the call itself."""
    function = call.get("function")
    return function if isinstance(function, Mapping) else call


def _with_arguments(message: Message, convert: Callable[[Any], Any]) -> Message:
    if not any("arguments" in _function(call) for call in _calls(message)):
        return message
    calls = []
    for call in _calls(message):
        function = dict(_function(call))
        if "arguments" in function:
            function["arguments"] = convert(function["arguments"])
        calls.append({**call, "function": function} if _function(call) is not call else function)
    return {**message, "tool_calls": calls}


def _as_object(arguments: Any) -> Any:
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
    return found if isinstance(found, Mapping) else arguments


def _as_string(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _leaks(message: Message) -> Iterator[str]:
    """Text that shows that a template did not expect the form of this message."""
    if isinstance(message.get("content"), list):
        yield str(message["content"])
    for call in _calls(message):
        arguments = _function(call).get("arguments")
        if isinstance(arguments, str):
            yield json.dumps(arguments, ensure_ascii=False)
        elif isinstance(arguments, Mapping) and arguments:
            yield str(arguments)
