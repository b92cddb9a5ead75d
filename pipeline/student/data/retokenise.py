"""A document in another tokenizer's tokens, and where tokens of both end together.

Text is compared byte by byte, because a token of a byte-level vocabulary may hold half a character. A document is a
sequence of **atoms**: each byte of an ordinary token, and each special token. Every token, of teacher or student, ends
after some number of atoms; a student position is *aligned* with a teacher position if both end after the same number.
Both have then read the same text, and both predict what comes next.

    teacher   The| cap|tain| counted|<eos>          atoms   3 7 11 19 20
    student   The| captain| coun|ted|</s>                   3 11 16 19 20       aligned: 3, 11, 19, 20

Bytes that are not UTF-8 (a row that was cut inside a character) cannot be given to another tokenizer: they become atoms
without a student token. Works for fast tokenizers without loss: byte-level and SentencePiece-like ones.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from pipeline.errors import ConfigError

ROLES = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


class TokenText:
    """The text of a tokenizer's tokens, as bytes.

    Args:
        size: number of tokens that the model knows; added tokens beyond it are ordinary text here.

    Attributes:
        tokenizer: without those tokens.
        bytes: id -> bytes of a token; for a special token those of its name.
        special: ids of special tokens.
        prefixes: whether the tokenizer puts a space before a text that starts without one.

    Raises: ConfigError for a tokenizer whose tokens have no known bytes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, whose: str, size: int | None = None) -> None:
        self.tokenizer = tokenizer = tokenizer if size is None else _without_added_beyond(tokenizer, size)
        parts = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
        kinds = {kind for part in ("decoder", "pre_tokenizer") for kind in _types(parts.get(part))}
        if "ByteLevel" in kinds:
            to_bytes = _byte_level
        elif kinds & {"ByteFallback", "Metaspace"}:
            to_bytes = _sentencepiece
        else:
            raise ConfigError(
                f"`cross_tokenizer`: the {whose}'s tokenizer ({type(tokenizer).__name__}) is neither byte-level nor "
                "SentencePiece-like, so the bytes of its tokens are unknown. Choose another model."
            )
        added = tokenizer.added_tokens_decoder
        self.bytes = {id_: to_bytes(token) for token, id_ in tokenizer.get_vocab().items()}
        self.bytes |= {id_: token.content.encode() for id_, token in added.items()}
        self.special = {id_ for id_, token in added.items() if token.special}
        self.prefixes = b"".join(self.bytes[i] for i in self.ids("a")) == b" a"

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def tokens(self, text: str) -> list[Token]:
        """`text` as tokens, with atoms counted from 0."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, raw = encoded["input_ids"], text.encode()
        parts = [self.bytes[i] for i in ids]
        prefixed = b"".join(parts) == b" " + raw  # the added space is not part of the text
        if prefixed:
            parts[0] = parts[0][1:]
        if b"".join(parts) == raw:
            ends = [0]
            for part in parts:
                ends.append(ends[-1] + len(part))
            return [
                Token(i, a, b, prefixed=prefixed and k == 0 and b > a)
                for k, (i, a, b) in enumerate(zip(ids, ends, ends[1:], strict=False))
            ]
        # The tokenizer changed the text (a normaliser, an unknown character): use its character offsets.
        spans = [(len(text[:a].encode()), len(text[:b].encode())) for a, b in encoded["offset_mapping"]]
        following = [*(start for start, _ in spans[1:]), len(raw)]
        return [Token(i, a, b, b <= after) for i, (a, b), after in zip(ids, spans, following, strict=True)]


@dataclass(frozen=True)
class Token:
    """A token of the student: atoms `start` to `end`."""

    id: int
    start: int
    end: int
    whole: bool = True  # ends exactly after the last atom
    prefixed: bool = False  # has an added space that is not an atom, see TokenText.prefixes


@dataclass(frozen=True)
class Retokenised:
    """One document in both tokenizers' tokens."""

    tokens: list[Token]
    ends: list[int]  # [T] atoms after each of the teacher's tokens
    prefixed: set[int]  # teacher tokens with an added space that is not an atom

    def aligned(self) -> Iterator[tuple[int, int]]:
        """(student position, teacher position) that end after the same atom; the last ones, if there are several.

        Excluded are positions where an added space starts the next token of one side only: `▁The` and `The` would be
        different tokens for the same word.
        """
        theirs = {end: t for t, end in enumerate(self.ends)}
        ours = {token.end: s for s, token in enumerate(self.tokens) if token.whole}
        for end, s in ours.items():
            if end in theirs:
                t = theirs[end]
                next_is_prefixed = s + 1 < len(self.tokens) and self.tokens[s + 1].prefixed
                if next_is_prefixed == (t + 1 in self.prefixed):
                    yield s, t


@dataclass(frozen=True)
class Retokeniser:
    """Converts documents from a teacher's tokens to a student's."""

    teacher: TokenText
    student: TokenText
    counterparts: dict[int, int | None] = field(init=False)  # of special tokens; None: left out
    inserts_bos: bool = field(init=False)  # student texts start with BOS, teacher texts do not

    def __post_init__(self) -> None:
        object.__setattr__(self, "counterparts", special_counterparts(self.teacher, self.student))
        ours, theirs = (text.tokenizer("a")["input_ids"][0] for text in (self.student, self.teacher))
        inserts_bos = ours == self.student.tokenizer.bos_token_id and theirs not in self.teacher.special
        object.__setattr__(self, "inserts_bos", inserts_bos)

    def document(self, ids: Sequence[int] | np.ndarray) -> Retokenised:
        tokens: list[Token] = []
        bos = self.student.tokenizer.bos_token_id
        if self.inserts_bos and not (len(ids) and self.counterparts.get(int(ids[0])) == bos):
            tokens.append(Token(bos, 0, 0))
        ends: list[int] = []
        run, at = b"", 0  # ordinary bytes not yet tokenised, atoms so far
        first, prefixed = True, set()
        for t, id_ in enumerate(map(int, ids)):
            if id_ not in self.teacher.special:
                text = self.teacher.bytes[id_]
                if first and self.teacher.prefixes and text.startswith(b" "):
                    text = text[1:]  # the added space
                    prefixed |= {t} if text else set()
                first = False
                run += text
                at += len(text)
                ends.append(at)
                continue
            tokens += self._cut(run, at - len(run))
            run, at = b"", at + 1
            ends.append(at)
            tokens += self._special(id_, at - 1)
        return Retokenised(tokens + self._cut(run, at - len(run)), ends, prefixed)

    def _cut(self, run: bytes, start: int) -> list[Token]:
        """Ordinary bytes as the student's tokens."""
        tokens: list[Token] = []
        for offset, text in _valid(run):
            by = start + offset
            tokens += [replace(t, start=t.start + by, end=t.end + by) for t in self.student.tokens(text)]
        return tokens

    def _special(self, id_: int, at: int) -> list[Token]:
        if id_ in self.counterparts:
            counterpart = self.counterparts[id_]
            return [] if counterpart is None else [Token(counterpart, at, at + 1)]
        ids = self.student.ids(self.teacher.bytes[id_].decode())  # its name, as text: one atom, in several tokens
        return [Token(i, at, at + 1, whole=k == len(ids) - 1) for k, i in enumerate(ids)]


def special_counterparts(teacher: TokenText, student: TokenText) -> dict[int, int | None]:
    """Special token of the teacher → the student's token of the same name, or else of the same role.

    None if the student has no token for a role. Tokens without a role and without a namesake are not included.
    """
    names = {student.bytes[i]: i for i in student.special}
    roles = {getattr(teacher.tokenizer, role): getattr(student.tokenizer, role) for role in reversed(ROLES)}
    return {
        i: names.get(teacher.bytes[i], roles.get(i)) for i in teacher.special if teacher.bytes[i] in names or i in roles
    }


def same_tokens(teacher: TokenText, student: TokenText) -> dict[int, int]:
    """Teacher's id → the student's id with the same bytes, or of the same special token."""
    by_name = student.tokenizer.get_vocab()
    names = {id_: name for name, id_ in teacher.tokenizer.get_vocab().items()}
    by_bytes: dict[bytes, int] = {}
    for id_, text in sorted(student.bytes.items(), reverse=True):
        if id_ not in student.special and (text not in by_bytes or not _is_fallback(student, id_)):
            by_bytes[text] = id_
    found: dict[int, int] = {}
    counterparts = special_counterparts(teacher, student)
    for id_, text in teacher.bytes.items():
        if id_ in teacher.special:
            counterpart = counterparts.get(id_)
        else:
            # The same name first: <0x41> and A are two tokens with the same byte.
            namesake = by_name.get(names.get(id_, ""))
            same = namesake is not None and namesake not in student.special and student.bytes[namesake] == text
            counterpart = namesake if same else by_bytes.get(text)
        if counterpart is not None:
            found[id_] = counterpart
    return found


def _valid(run: bytes) -> Iterator[tuple[int, str]]:
    """The valid UTF-8 parts of bytes, with their offsets."""
    start = 0
    while start < len(run):
        try:
            yield start, run[start:].decode()
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield start, run[start : start + error.start].decode()
            start += error.end


def _without_added_beyond(tokenizer: PreTrainedTokenizerBase, size: int) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy without the added tokens whose ids are `size` or more.

    The text models of Gemma 3 share a tokenizer with its image models, which has one token more than they have
    embeddings.
    """
    if not tokenizer.is_fast or all(id_ < size for id_ in tokenizer.added_tokens_decoder):
        return tokenizer
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["id"] < size]
    smaller = copy.deepcopy(tokenizer)
    smaller._tokenizer = Tokenizer.from_str(json.dumps(parts))
    return smaller


def _types(part: Any) -> Iterator[str]:
    """Types of a component of a fast tokenizer and of all components inside it."""
    if isinstance(part, dict):
        if "type" in part:
            yield part["type"]
        for value in part.values():
            yield from _types(value)
    elif isinstance(part, list):
        for value in part:
            yield from _types(value)


def _printable() -> dict[str, int]:
    """GPT-2's characters for bytes: printable bytes are themselves, the others are characters from 256 on, in order."""
    named = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in named]
    return {chr(byte): byte for byte in named} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _printable()


def _byte_level(token: str) -> bytes:
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode()


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _is_fallback(text: TokenText, id_: int) -> bool:
    name = text.tokenizer.convert_ids_to_tokens(id_)
    return len(name) == 6 and name.startswith("<0x") and name.endswith(">")
