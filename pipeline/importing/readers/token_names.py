"""Tokens that a file names by text instead of by number.

`token_id:123` is a number. The text of a token is not always one token: different tokens decode to the same text, and
parts of a character all decode to "�". Only a name that belongs to exactly one token counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.importing.readers.foreign_rows import BadRow

_NUMBERED = re.compile(r"token_id:(\d+)")


def token_of(name: Any, position: int) -> int:
    """The token that is named by number: 123, "123" or "token_id:123". Raises: BadRow."""
    if isinstance(name, int) and not isinstance(name, bool):
        return name
    if isinstance(name, str) and (found := _NUMBERED.fullmatch(name)):
        return int(found[1])
    if isinstance(name, str) and name.isdecimal():
        return int(name)
    raise BadRow(f"position {position}: token {name!r}, expected a number or token_id:NUMBER")


class TokenNames:
    """Token ids by their text, and by their bytes where those are given."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        names: dict[str, int | None] = {}
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False)
        for token, text in enumerate(texts):
            names[text] = None if text in names or "\ufffd" in text else token
        self._names = names

    def find(self, name: Any, data: Sequence[int] | None = None) -> int | None:
        """The only token with this text; None if there is none, or several.

        Args:
            name: text, or token_id:123. data: its bytes in UTF-8, which win over a text that was cut.
        """
        if isinstance(name, str) and (found := _NUMBERED.fullmatch(name)):
            return int(found[1])
        if data:
            try:
                name = bytes(data).decode("utf-8")
            except (ValueError, TypeError):
                return None
        return self._names.get(name) if isinstance(name, str) else None
