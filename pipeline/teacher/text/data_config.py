"""Options of the text and how it becomes rows of tokens; a part of `cache_config`. Standard library only."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from pipeline.errors import ConfigError
from pipeline.options import check_ranges, option

IO, TEXT = "Input and output", "Text"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, and how it becomes rows of tokens."""

    # A path or hub name; several paths (in Python and in a config file); or (Python only) a datasets.Dataset or an
    # iterable of dicts.
    data: Any = option(
        help="Text: file, glob or directory (.txt .jsonl .json .parquet .csv .tsv .arrow, also .gz), or a dataset on "
        "the hub.",
        group=IO,
        common=True,
        several=True,
    )
    data_config: str | None = option(None, help="Configuration (subset) of a hub dataset.", group=TEXT)
    split: str = option("train", help="Split of the dataset, or a slice such as train[:10%].", group=TEXT)
    text_column: str | None = option(
        None,
        help="Column of strings, chat messages or token ids.",
        group=TEXT,
        default_text="messages, prompt with completion, text, or input_ids",
        common=True,
    )
    sample_by: Literal["document", "paragraph", "line"] = option(
        "document", help="Unit of text in a .txt file that becomes one document.", group=TEXT
    )
    loss_on: Literal["auto", "all", "assistant", "completion", "labels"] = option(
        "auto",
        help="Tokens in the loss. auto: all tokens of plain text, assistant messages of a chat, the completion of a "
        "prompt, or the tokens that labels or masks mark among token ids.",
        group=TEXT,
    )
    turns: Literal["all", "last"] = option(
        "all", help="Assistant messages of a chat that are in the loss: all of them, or the last one.", group=TEXT
    )
    # JSON on the command line; in Python and in a config file its contents.
    chat_template_kwargs: Any = option(
        None,
        help="Arguments of the chat template as a JSON object, such as '{\"enable_thinking\": false}'. A row's own "
        "columns override them.",
        group=TEXT,
        metavar="JSON",
        table=True,
    )
    template_date: str | None = option(
        None,
        help="Date for chat templates that print today's date.",
        group=TEXT,
        metavar="YYYY-MM-DD",
        default_text="the date of an unfinished cache, else today",
    )
    append_eos: bool | None = option(
        None, help="End every text with EOS.", group=TEXT, default_text="on for causal teachers"
    )
    max_documents: int | None = option(None, help="Use only the first N documents.", group=TEXT, minimum=1)
    packing: bool | None = option(
        None, help="Pack several short documents into a row.", group=TEXT, default_text="on for causal teachers"
    )
    seq_len: int = option(1024, help="Maximum number of tokens per row.", group=TEXT, minimum=2, common=True)
    teacher_seq_len: int | None = option(
        None,
        help="Maximum number of tokens that the teacher reads for a row, if the data have prompts for the teacher.",
        group=TEXT,
        minimum=2,
        default_text="4 times `seq_len`, at most the number of positions of the teacher",
    )
    overlap: int = option(
        1,
        help="Tokens that each later window of a long document repeats as context, outside the loss.",
        group=TEXT,
        minimum=1,
    )
    keep_columns: tuple[str, ...] = option(
        (), help="Column to keep for each document, such as its domain; may be given several times.", group=TEXT
    )
    num_proc: int | None = option(None, help="Number of processes that tokenize the text.", group=TEXT, minimum=1)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.chat_template_kwargs is not None:
            object.__setattr__(self, "chat_template_kwargs", check_template_arguments(self.chat_template_kwargs))
        try:
            datetime.date.fromisoformat(self.template_date or "2000-01-01")
        except ValueError:
            raise ConfigError(f"`template_date` {self.template_date}: expected a date such as 2026-01-31.") from None

    def to_json(self) -> dict[str, Any]:
        """What decides the rows, besides the text itself, as in the manifest."""
        # Not asdict: it would copy `data`, which may be a generator.
        left_out = {*_NOT_OF_ROWS, *_OF_CHATS} | (set() if self.overlap > 1 else {"overlap"})
        left_out |= {"teacher_seq_len"} if self.teacher_seq_len is None else set()
        names = [field.name for field in fields(self) if field.name not in left_out]
        return {_RECORDED_AS.get(name, name): getattr(self, name) for name in names} | self.chat_options()

    @classmethod
    def from_json(cls, recorded: Mapping[str, Any], data: Any) -> DataConfig:
        """The options that a manifest records, for the text itself."""
        names = [field.name for field in fields(cls) if field.name not in _NOT_OF_ROWS]
        given = {name: recorded.get(_RECORDED_AS.get(name, name)) for name in names}
        return cls(data=data, **{name: value for name, value in given.items() if value is not None})

    def chat_options(self) -> dict[str, Any]:
        """The options of chats that are not at their default, as in the manifest."""
        return {name: value for name in _OF_CHATS if (value := getattr(self, name)) not in (None, "all", {})}


_RECORDED_AS = {"seq_len": "window_length", "teacher_seq_len": "teacher_window_length"}
_NOT_OF_ROWS = ("data", "keep_columns", "num_proc")
_OF_CHATS = ("turns", "chat_template_kwargs", "template_date")
# What the messages of a row and the rendering itself set.
_NOT_ARGUMENTS = {"messages", "conversation", "conversations", "chat_template", "add_generation_prompt"} | {
    "continue_final_message",
    "return_assistant_tokens_mask",
}


def check_template_arguments(given: Any) -> dict[str, Any]:
    """The arguments of a chat template, which may be given as JSON. Raises: ConfigError."""
    expected = 'expected a JSON object such as {"enable_thinking": false}'
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ConfigError(f"`chat_template_kwargs`: not JSON ({error}), {expected}.") from error
    if not isinstance(given, Mapping):
        raise ConfigError(f"`chat_template_kwargs`: found {type(given).__name__}, {expected}.")
    if from_data := sorted(_NOT_ARGUMENTS & set(given)):
        raise ConfigError(f"`chat_template_kwargs`: {from_data[0]!r} comes from the data. Leave it out.")
    return dict(given)
