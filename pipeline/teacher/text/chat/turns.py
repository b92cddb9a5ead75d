"""What the assistant says in a conversation, as character spans of its text.

A template with {% generation %} blocks marks it. Most templates have none; there, the assistant's text is what one
rendered prefix of the conversation has more than another:

    render(messages[:k], open turn)   …<|im_start|>assistant\\n
    render(messages[:k + 1])          …<|im_start|>assistant\\nFour.<|im_end|>\\n
                                                              ^^^^^^^^^^^^^^^

without trailing white space: the token that ends the turn is in the loss, the newline after it is not.

Templates of reasoning models drop the thoughts of earlier turns, so no text holds all that the assistant said. Then
each turn gets a text of its own, the one that the model sees when it gives this answer: the conversation up to it, as
the template renders it, and the answer with its thoughts. Where the template drops the thoughts of the last turn too
(DeepSeek-R1), the answer follows the opened turn as written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError
from pipeline.teacher.text.chat.messages import plain_text
from pipeline.teacher.text.chat.template import ChatTemplate, Conversation, Message, Span

_PROBE = "Answer"


class Rendering(NamedTuple):
    """A text, and the spans of it in the loss."""

    text: str
    spans: list[Span]


def render_turns(conversation: Conversation, *, first: int = 0, last_only: bool = False) -> list[Rendering]:
    """What the assistant says from message `first` on, or only the last time, in as few texts as hold it.

    That is one text for all, unless the template renders some of it otherwise when more messages follow.

    Raises:
        DataError: the template cannot render the conversation, or not what the assistant says.
    """
    turns = [k for k in range(first, len(conversation.messages)) if conversation.messages[k]["role"] == "assistant"]
    if last_only:
        turns = turns[-1:]
    everything = first == 0 and not last_only
    together = _marked(conversation, turns, everything) if conversation.has_blocks else _found(conversation, turns)
    return [together] if together is not None else [_alone(conversation, turn) for turn in turns]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the template puts after an assistant's message, such as <|im_end|>; empty if it is not found."""
    return _end_of_turn(Conversation(ChatTemplate(tokenizer), (), {}, "chat template"))


def _end_of_turn(conversation: Conversation) -> str:
    messages = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": _PROBE}]
    example = conversation.with_messages(messages)
    try:
        if example.has_blocks:
            text, blocks = example.text_and_blocks()
            text = text[slice(*blocks[-1])] if blocks else ""
        else:
            text = example.text()
    except DataError:  # a template that does not accept these two
        return ""
    return text.rpartition(_PROBE)[2].rstrip() if _PROBE in text else ""


def _marked(conversation: Conversation, turns: Sequence[int], everything: bool) -> Rendering | None:
    """The whole conversation with the blocks of these turns; None if some turn is rendered otherwise in it."""
    text, blocks = conversation.text_and_blocks()
    if not everything:
        before = conversation.text(turns[0]) if turns else text
        if not text.startswith(before):
            return None
        blocks = [block for block in blocks if block[0] >= len(before)]
    if len(blocks) == len(turns):  # a turn may have several blocks
        for turn, block in zip(turns, blocks, strict=True):
            if _drops(conversation, turn, text[slice(*block)]):
                return None
    return Rendering(text, blocks)


def _found(conversation: Conversation, turns: Sequence[int]) -> Rendering | None:
    """The whole conversation with the spans of these turns; None if some turn is rendered otherwise in it."""
    text = conversation.text()
    spans = []
    for turn in turns:
        opened, ended = conversation.text(turn, open_turn=True), conversation.text(turn + 1)
        if not (text.startswith(opened) and text.startswith(ended)):
            return None
        said = text[len(opened) : len(ended)].rstrip()
        if _drops(conversation, turn, said):
            return None
        spans.append((len(opened), len(opened) + len(said)))
    return Rendering(text, spans)


def _drops(conversation: Conversation, turn: int, rendered: str) -> bool:
    """Whether the template leaves out the beginning of what the assistant says, which is how it drops thoughts."""
    said = plain_text(conversation.messages[turn]).strip()
    if said in rendered:
        return False
    rendered = rendered.rstrip().removesuffix(_end_of_turn(conversation).rstrip()).strip()
    return said.endswith(rendered)


def _alone(conversation: Conversation, turn: int) -> Rendering:
    """The conversation up to this turn, as the model sees it when it gives this answer, and the answer."""
    if conversation.has_blocks:
        text, blocks = conversation.text_and_blocks(turn + 1)
        before = conversation.text(turn)
        blocks = [block for block in blocks if block[0] >= len(before)] if text.startswith(before) else blocks[-1:]
        if blocks and not _drops(conversation, turn, text[blocks[0][0] : blocks[-1][1]]):
            return Rendering(text, blocks)
        return _as_written(conversation, turn)
    text = conversation.text(turn + 1).rstrip()
    for start in _starts(conversation, turn, text):
        if not _drops(conversation, turn, text[start:]):
            whole = conversation.text(turn + 1)
            return Rendering(whole, [(start, len(text))])
    return _as_written(conversation, turn)


def _starts(conversation: Conversation, turn: int, text: str) -> Iterator[int]:
    """Where the answer may begin in the text: after the opening of the turn, or where the message is found."""
    for opening in (conversation.text(turn, open_turn=True), _opening(conversation, turn)):
        if opening is not None and text.startswith(opening):
            yield len(opening)
    said = plain_text(conversation.messages[turn]).strip()
    if said and said in text:
        yield text.rindex(said)


def _opening(conversation: Conversation, turn: int) -> str | None:
    """What the template puts before this message. A generation prompt may be longer, and open the thoughts too."""
    probe: Message = {"role": conversation.messages[turn]["role"], "content": _PROBE}
    before, found, _ = conversation.with_messages([*conversation.messages[:turn], probe]).text().rpartition(_PROBE)
    return before if found else None


def _as_written(conversation: Conversation, turn: int) -> Rendering:
    """The opened turn, and behind it the answer as written with the template's end of a turn."""
    message = conversation.messages[turn]
    if message.get("tool_calls"):
        raise DataError(
            f"{conversation.where}, message {turn} ({message['role']}): the chat template neither renders its text nor "
            "lets it follow the opened turn, so its tokens cannot be found. Use `loss_on=all` to train on all tokens, "
            "or a tokenizer whose template has {% generation %} blocks."
        )
    prompt, said = conversation.text(turn, open_turn=True), plain_text(message)
    opening = _opening(conversation, turn) or prompt
    thoughts = prompt.removeprefix(opening).rstrip() if prompt.startswith(opening) else ""
    if thoughts and said.lstrip().startswith(thoughts):
        # The generation prompt opens the thoughts, and so does the message.
        said = said.lstrip().removeprefix(thoughts).lstrip()
    text = prompt + said + _end_of_turn(conversation)
    return Rendering(text, [(len(prompt), len(text))])
