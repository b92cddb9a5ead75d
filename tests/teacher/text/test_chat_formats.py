"""Every kind of published chat template: the ids are those of `apply_chat_template`, the loss is on what was said."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from chat_templates import FORMATS
from pipeline.teacher.text.chat.arguments import open_template
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.encoding import encode
from pipeline.teacher.text.formats.examples import Columns, read_examples
from pipeline.teacher.text.prompts import open_prompts
from tiny import write_jsonl

DATE = "2026-03-01"


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text[:4]}, {"type": "text", "text": text[4:]}]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {key: {}}}}}
    for name, key in (("forecast", "city"), ("add", "left"))
]
TWO_TURNS = [user("2+2?"), assistant("Four."), user("times 3?"), assistant("Twelve.")]
WITH_SYSTEM = [{"role": "system", "content": "Be brief."}, *TWO_TURNS]
THOUGHTS = ["<think>\nsmall numbers\n</think>\n\n4", "<think>\n4 times 3\n</think>\n\n12"]
WITH_THOUGHTS = [user("2+2?"), assistant(THOUGHTS[0]), user("times 3?"), assistant(THOUGHTS[1])]
WITH_PARTS = [user(parts("hello")), assistant(parts("hi there"))]
WITH_CALLS = [
    user("Snow in Graz?"),
    call("forecast", city="Graz"),
    {"role": "tool", "content": "none"},
    assistant("No snow."),
]
# All that the assistant says stands in one text, unless the template drops thoughts or moves what comes first.
MOVING = {"qwen3", "deepseek-r1", "mistral"}
WITH_TOOLS = [name for name, format in FORMATS.items() if format.call]


def documents(
    name: str, row: dict[str, Any], *, loss_on: str = "assistant", turns: str = "all"
) -> list[tuple[list[int], list[list[int]], PreTrainedTokenizerFast]]:
    """Ids of each document, and of each run of loss tokens in it."""
    tokenizer = FORMATS[name].tokenizer()
    template = open_template(DataConfig(data="", template_date=DATE), tokenizer)
    examples = read_examples(
        row, "row 0", columns=Columns("messages", ("messages",)), loss_on=loss_on, turns=turns, template=template
    )
    found = []
    for each in encode(examples, tokenizer):
        ids, targets = each.ids, each.targets
        edges = np.flatnonzero(np.diff(np.concatenate([[0], targets, [0]])))
        found.append((ids.tolist(), [ids[a:b].tolist() for a, b in edges.reshape(-1, 2)], tokenizer))
    return found


def check(name: str, found: Any, texts: list[list[int]], said: list[list[str]]) -> None:
    assert [ids for ids, _, _ in found] == texts
    tokenizer = FORMATS[name].tokenizer()
    assert [[tokenizer.decode(run) for run in runs] for _, runs, _ in found] == said
    # The same tokens as in a generated answer, which begins behind a special token or a newline.
    assert [runs for _, runs, _ in found] == [[ids_of(tokenizer, text) for text in each] for each in said]


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def apply(name: str, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    """What transformers makes of it, on `DATE`."""
    tokenizer = FORMATS[name].tokenizer()
    date = datetime.date.fromisoformat(DATE).strftime("%d %b %Y")
    dated = {"date_string": date} if name == "llama3" else {}
    return tokenizer.apply_chat_template(messages, **dated, **options)["input_ids"]


@pytest.mark.parametrize("messages", [TWO_TURNS, WITH_SYSTEM], ids=["two turns", "system"])
@pytest.mark.parametrize("name", FORMATS)
def test_several_turns(name: str, messages: list[dict[str, Any]]) -> None:
    found = documents(name, {"messages": messages})
    says, first = FORMATS[name].says, len(messages) - 2
    empty = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    said = [says(empty + "Four."), says(empty + "Twelve.")]
    if name in MOVING and not (name == "mistral" and messages is TWO_TURNS):
        check(name, found, [apply(name, messages[:first]), apply(name, messages)], [[text] for text in said])
    else:
        check(name, found, [apply(name, messages)], [said])
    # Only the last turn: the same conversation, one run of loss tokens.
    check(name, documents(name, {"messages": messages}, turns="last"), [apply(name, messages)], [said[1:]])
    # All tokens: as it is.
    (whole,) = documents(name, {"messages": messages}, loss_on="all")
    assert whole[:2] == (apply(name, messages), [apply(name, messages)])


@pytest.mark.parametrize("name", FORMATS)
def test_thoughts_are_learned_in_every_turn(name: str) -> None:
    says = FORMATS[name].says
    found = documents(name, {"messages": WITH_THOUGHTS})
    if name == "deepseek-r1":
        # The prompt opens the thoughts, so the answer goes on behind <think>, as when the model writes it.
        said = [text.removeprefix("<think>\n") + "<|eos|>" for text in THOUGHTS]
        prompts = [apply(name, WITH_THOUGHTS[:turn], add_generation_prompt=True) for turn in (1, 3)]
        assert [ids for ids, _, _ in found] == [
            prompt + ids_of(found[0][2], text) for prompt, text in zip(prompts, said, strict=True)
        ]
        assert [runs for _, runs, _ in found] == [[ids_of(found[0][2], text)] for text in said]
    elif name == "qwen3":
        wholes = [apply(name, WITH_THOUGHTS[:stop]) for stop in (2, 4)]
        check(name, found, wholes, [[says(text)] for text in THOUGHTS])
    else:
        check(name, found, [apply(name, WITH_THOUGHTS)], [[says(text) for text in THOUGHTS]])


@pytest.mark.parametrize("as_strings", [False, True])
@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tools_and_calls(name: str, as_strings: bool) -> None:
    arguments = {"city": "Graz"}
    written = call("forecast", city="Graz")
    if as_strings:
        written["tool_calls"][0]["function"]["arguments"] = '{"city": "Graz"}'
    messages = [WITH_CALLS[0], written, *WITH_CALLS[2:]]
    found = documents(name, {"messages": messages, "tools": TOOLS})
    form = FORMATS[name]
    # The form that the template is made for.
    proper = WITH_CALLS
    if name == "deepseek-r1":
        proper = [WITH_CALLS[0], call("forecast"), *WITH_CALLS[2:]]
        proper[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Graz"}'
    last = "<think>\n\n</think>\n\nNo snow." if name == "qwen3" else "No snow."
    said = [form.calls("forecast", arguments), form.says(last)]
    if name == "deepseek-r1":
        wholes = [apply(name, proper[:stop], tools=TOOLS) for stop in (2, 4)]
        check(name, found, wholes, [[text] for text in said])
    elif name == "qwen3":  # an empty thought before a call only if it is the last message
        wholes = [apply(name, proper[:stop], tools=TOOLS) for stop in (2, 4)]
        check(name, found, wholes, [["<think>\n\n</think>\n\n" + said[0]], [said[1]]])
    else:
        check(name, found, [apply(name, proper, tools=TOOLS)], [said])


@pytest.mark.parametrize("name", FORMATS)
def test_content_in_parts(name: str) -> None:
    joined = [user("hello"), assistant("hi there")]
    found = documents(name, {"messages": WITH_PARTS})
    if name == "gemma3":  # knows parts, and trims each
        check(name, found, [apply(name, WITH_PARTS)], [[FORMATS[name].says("hi there")]])
    else:
        text = "<think>\n\n</think>\n\nhi there" if name == "qwen3" else "hi there"
        check(name, found, [apply(name, joined)], [[FORMATS[name].says(text)]])


@pytest.mark.parametrize("name", FORMATS)
def test_prompts_are_rendered_alike(name: str, tmp_path: Path) -> None:
    """For generation: with tools and arguments of row and options."""
    messages = WITH_CALLS[:3] if FORMATS[name].call else TWO_TURNS[:3]
    row = {"messages": [*messages, assistant("not used")]}
    if FORMATS[name].call:
        row["tools"] = TOOLS
    options = {"template_date": DATE, "chat_template_kwargs": {"enable_thinking": False}}
    config = DataConfig(data=str(write_jsonl(tmp_path / "data.jsonl", [row])), **options)
    (prompt,) = open_prompts(config, FORMATS[name].tokenizer()).read(range(1))
    if name == "deepseek-r1":
        messages = [messages[0], call("forecast"), messages[2]]
        messages[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Graz"}'
    expected = apply(name, messages, tools=row.get("tools"), add_generation_prompt=True, enable_thinking=False)
    assert prompt.ids.tolist() == expected
