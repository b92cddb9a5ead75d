"""Greedy answers of models, and a table that shows those of several models side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer

Messages = Sequence[Mapping[str, str]]


class Answering:
    """A model that answers chats.

    Args:
        directory: of a transformers model and its tokenizer.
    """

    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory, padding_side="left")

    def prompt(self, messages: Messages) -> str:
        """A chat through the template, up to the assistant's turn."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        return text

    def answers(self, chats: Sequence[Messages], new_tokens: int) -> list[str]:
        return self.continued([self.prompt(messages) for messages in chats], new_tokens)

    @torch.no_grad()
    def continued(self, prompts: Sequence[str], new_tokens: int) -> list[str]:
        """Greedy continuations of the prompts, 32 prompts at a time."""
        tokenizer = self.tokenizer

        def parts() -> Iterator[str]:
            for start in range(0, len(prompts), 32):
                texts = list(prompts[start : start + 32])
                batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
                written = self.model.generate(
                    **batch, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
                )
                yield from tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

        return list(parts())


def side_by_side(questions: Sequence[str], answers: Mapping[str, Sequence[str]]) -> Iterator[Table]:
    """A table for each question, with a column for each model."""
    for i, question in enumerate(questions):
        table = Table(
            title=Text(question, style="bold"), title_justify="left", box=SIMPLE_HEAD, show_edge=False, expand=True
        )
        for name in answers:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*(Text(each[i].strip()) for each in answers.values()))  # Text: an answer is not markup
        yield table
