"""Runs of `cache-teacher --generate` on chats: prompts with tools, arguments of the template, and one date."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

import cache_format as cf
from chat_templates import FORMATS
from generating import generate
from pipeline.teacher.generation import caching
from pipeline.teacher.text.chat import arguments
from tiny import tiny_llama, write_jsonl

ANSWERS = {"answers_per_prompt": 3, "max_new_tokens": 8, "batch_size": 4, "temperature": 1.3}


class Killed(BaseException):
    pass


def _killed(*_: object) -> None:
    raise Killed


def test_answers_to_chats_have_one_date_and_the_arguments_they_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = FORMATS["llama3"].tokenizer()
    tokenizer.chat_template += "{{ mood }}"
    teacher = tiny_llama(tmp_path / "teacher", tokenizer)
    messages = [{"role": "user", "content": "Well?"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    data = write_jsonl(tmp_path / "data.jsonl", [{"messages": messages, "tools": tools}] * 4)
    options = {**ANSWERS, "chat_template_kwargs": {"mood": "calm"}}
    warnings: list[str] = []

    def on(day: int) -> None:
        date = type("Date", (datetime.date,), {"today": classmethod(lambda _: datetime.date(2026, 1, day))})
        monkeypatch.setattr(arguments.datetime, "date", date)

    on(1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(caching, "cache_metadata", _killed)
        generate(teacher, data, tmp_path / "cache", on_warning=warnings.append, **options)
    assert ["here 2026-01-01" in warning for warning in warnings] == [True]
    on(2)
    generate(teacher, data, tmp_path / "cache", on_warning=warnings.append, **options)
    generate(teacher, data, tmp_path / "cache", on_warning=warnings.append, **options)
    assert len(warnings) == 1
    cache = cf.open_cache(tmp_path / "cache")
    recorded = cache.manifest.metadata.corpus
    assert (recorded["template_date"], recorded["chat_template_kwargs"]) == ("2026-01-01", {"mood": "calm"})
    prompt = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, date_string="01 Jan 2026", mood="calm"
    )["input_ids"]
    assert cache[0].input_ids[: len(prompt)].tolist() == prompt
    for other in ({}, {"chat_template_kwargs": {"mood": "wild"}}, {"template_date": "2026-01-02"}):
        with pytest.raises(cf.CacheError, match="made with other settings"):
            generate(teacher, data, tmp_path / "cache", **({**options, **other} if other else ANSWERS))
