"""Tokens that a server or a file names by text instead of by number.

The text of a token is not always one token: different tokens decode to the same text, and parts of a character all
decode to "�". Only a name that belongs to exactly one token counts. Parts of a character are known by their bytes,
which servers write beside the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_NUMBERED = re.compile(r"token_id:(\d+)")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # of vocabularies of SentencePiece
_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}  # of byte-level vocabularies
_DAMAGED = "\ufffd"


def numbered(name: str) -> int | None:
    """The token of `token_id:123`."""
    found = _NUMBERED.fullmatch(name)
    return None if found is None else int(found[1])


class TokenNames:
    """Token ids by their text, or by their bytes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._by_text: dict[str, int | None] = {}
        self._by_bytes: dict[bytes, int | None] = {}  # of tokens that are part of a character
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False)
        for token, text in enumerate(texts):
            if _DAMAGED not in text:
                self._by_text[text] = None if text in self._by_text else token
            elif part := _part(tokenizer.convert_ids_to_tokens(token)):
                self._by_bytes[part] = None if part in self._by_bytes else token

    def find(self, name: Any, data: Sequence[int] | None = None) -> int | None:
        """The only token with this name; None if there is none, or several.

        Args:
            name: text, or token_id:123. data: its bytes, which win over a text that was cut.
        """
        if isinstance(name, str) and (found := numbered(name)) is not None:
            return found
        if data:
            try:
                name = bytes(data).decode("utf-8")
            except UnicodeDecodeError:
                return self._by_bytes.get(bytes(data))
            except (ValueError, TypeError):
                return None
        return self._by_text.get(name) if isinstance(name, str) else None


def _part(token: str | None) -> bytes | None:
    """The bytes of a token; None if they are unknown, or whole characters."""
    if token is None:
        return None
    if byte := _BYTE.fullmatch(token):
        found = bytes([int(byte[1], 16)])
    elif all(letter in _BYTES for letter in token):
        found = bytes(_BYTES[letter] for letter in token)
    else:
        return None
    try:
        found.decode("utf-8")
    except UnicodeDecodeError:
        return found
    return None
