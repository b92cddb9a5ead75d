"""Text to token ids, and for each token whether it is in the loss.

A text is tokenised as a whole: parts that are tokenised separately have other tokens at their seams. The character
offsets of a token decide whether it is in the loss. A token across the start of a loss span, such as " Yes" of the
prompt "Answer: " and the completion "Yes", would belong to neither: then the text is tokenised part by part, so that
the prompt has the tokens that it has alone, from which the student will have to answer. Only a text of more than a
quarter million characters is tokenised in blocks that end with a line: a tokenizer needs about 130 bytes per
character, 4 GB for a text file of 30 MB.

Shape: T tokens of one text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.teacher.text.chat.template import Span
from pipeline.teacher.text.formats.examples import Example

# Four blocks are one group, which is shared by the tokenizer's threads.
_BLOCK_CHARACTERS = 1 << 18
_GROUP_CHARACTERS = 1 << 20

# One of these goes before a part of a text that is tokenised alone: a tokenizer like Llama 2's puts a space before
# whatever begins a text. Several, because the part may begin with what merges with one of them.
_LEADS = ("\n", "a", ".")

_TRIMS = re.compile(rb'"trim_offsets":\s*true')  # in the JSON of a post-processor

_Block = tuple[int, int, str]  # (index of the example, first character, text)


@dataclass(frozen=True)
class Affixes:
    """The special tokens that belong before and after a text, and who puts them there.

    Attributes:
        placement: "added" to each text; "rendered" by a chat template; or "removed", because they are put around each
            window of the text later.
    """

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    placement: Literal["added", "rendered", "removed"] = "added"


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text.

    Attributes:
        ids: int32 [T].
        targets: bool [T], whether the token is in the loss.
        had_affixes: the text brought special tokens that it would have got, and has them once now.
        split: a token across the start of a loss span was split there.
        teacher_prompt: int32, what the teacher reads before the first token in the loss instead of what is there; None:
            the same as the student (see `formats.teacher_prompts`).
    """

    ids: np.ndarray
    targets: np.ndarray
    had_affixes: bool = False
    split: bool = False
    teacher_prompt: np.ndarray | None = None


def encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, affixes: Affixes = Affixes()
) -> list[Tokens]:
    """The tokens of each example; none for an empty text.

    A prefix that is added is in the loss only if the whole text is; a suffix always.

    Args:
        tokenizer: for loss spans one `with_exact_offsets`.
        affixes: a text never begins with the prefix twice, whether it brings one or not.
    """
    ids: list[list[np.ndarray]] = [[np.zeros(0, np.int32)] for _ in examples]
    targets: list[list[np.ndarray]] = [[np.zeros(0, bool)] for _ in examples]
    split = [False] * len(examples)
    with_offsets = any(example.spans is not None for example in examples)
    for blocks in _groups(_blocks(examples)):
        encoded = _encoded(tokenizer, [text for _, _, text in blocks], with_offsets)
        for place, (index, first, text) in enumerate(blocks):
            block_ids = np.asarray(encoded["input_ids"][place], dtype=np.int32)
            spans = examples[index].spans
            if spans is None:
                learned = np.ones(len(block_ids), dtype=bool)
            else:
                offsets = np.asarray(encoded["offset_mapping"][place], dtype=np.int64).reshape(-1, 2)
                starts = [start - first for start, _ in spans if 0 < start - first < len(text)]
                if _are_inside(starts, offsets):
                    block_ids, offsets = _encode_parts(text, starts, tokenizer)
                    split[index] = True
                learned = token_targets(offsets + first, spans)
            ids[index].append(block_ids)
            targets[index].append(learned)
    return [
        _placed(example, np.concatenate(ids[i]), np.concatenate(targets[i]), affixes, split[i])
        for i, example in enumerate(examples)
    ]


def token_targets(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Which tokens start within one of the spans, bool [T], by their character offsets [T, 2].

    A token across the start of a span is left out: the student starts its answer with another one. A token across the
    end ("!\\n") is included: there is no other way to end. A tokenizer that trims white space gives such tokens empty
    offsets at their end; the last condition keeps them out of a span that starts there.
    """
    starts, stops = offsets[:, 0], offsets[:, 1]
    inside = np.zeros(len(offsets), dtype=bool)
    for start, stop in spans:
        inside |= (starts >= start) & (starts < stop) & (stops > start)
    return inside


def special_affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    begin = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:begin], whole[begin + len(plain) :]


def with_exact_offsets(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy whose offsets cover all characters of a token: with `trim_offsets`, its post-processor
    leaves out white space, and a token across the start of a loss span looks as if it began there.

    The copy adds no special tokens. It takes seconds for a large vocabulary.
    """
    processor: Any = tokenizer.backend_tokenizer.post_processor if tokenizer.is_fast else None
    if processor is None or not _TRIMS.search(processor.__getstate__()):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = None
    return tokenizer


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], with_offsets: bool) -> Any:
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        padding=False,
        truncation=False,  # a tokenizer.json may have a truncation of its own
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=with_offsets,
        verbose=False,  # no warning about long texts: they are cut into windows later
    )


def _are_inside(characters: Sequence[int], offsets: np.ndarray) -> bool:
    """Whether a token begins before one of the characters and goes on after it."""
    return any(((offsets[:, 0] < at) & (offsets[:, 1] > at)).any() for at in characters)


def _encode_parts(
    text: str, starts: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 [T] and character offsets int64 [T, 2] of a text, each of whose parts is tokenised alone."""
    bounds = [0, *sorted(set(starts)), len(text)]
    ids, offsets = [], []
    for start, stop in pairwise(bounds):
        part_ids, part_offsets = _encode_part(text[start:stop], tokenizer, begins_text=start == 0)
        ids.append(part_ids)
        offsets.append(part_offsets + start)
    return np.concatenate(ids), np.concatenate(offsets)


def _encode_part(text: str, tokenizer: PreTrainedTokenizerBase, *, begins_text: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids and offsets of a part, as what follows other text unless it begins one."""
    leads = ("",) if begins_text else (*_LEADS, "")  # the last one: no lead stays apart
    for lead in leads:
        encoded = _encoded(tokenizer, [lead + text], True)
        ids = np.asarray(encoded["input_ids"][0], dtype=np.int32)
        offsets = np.asarray(encoded["offset_mapping"][0], dtype=np.int64).reshape(-1, 2)
        if not _are_inside([len(lead)], offsets):
            break
    begin = int(np.argmax(offsets[:, 1] > len(lead))) if lead else 0
    return ids[begin:], offsets[begin:] - len(lead)


def _placed(example: Example, ids: np.ndarray, targets: np.ndarray, affixes: Affixes, split: bool) -> Tokens:
    """The tokens with the special tokens where they belong, once."""
    if not example.text:
        return Tokens(ids, targets)
    prefix, suffix = list(affixes.prefix), list(affixes.suffix)
    own = _copies(ids, prefix)
    keep = 1 if affixes.placement == "rendered" and own else 0
    begin, stop = (own - keep) * len(prefix), len(ids)
    if affixes.placement == "removed":
        stop -= _copies(ids[begin:][::-1], suffix[::-1]) * len(suffix)
    had_affixes = (begin, stop) != (0, len(ids))
    ids, targets = ids[begin:stop], targets[begin:stop]
    if affixes.placement == "added":
        after = [] if suffix and ids[-len(suffix) :].tolist() == suffix else suffix
        ids = np.concatenate([prefix, ids, after]).astype(np.int32)
        targets = np.concatenate(
            [np.full(len(prefix), example.spans is None), targets, np.ones(len(after), dtype=bool)]
        )
    return Tokens(ids, targets, had_affixes, split)


def _copies(ids: np.ndarray, affix: list[int]) -> int:
    """How many times the ids begin with the affix."""
    copies = 0
    while affix and ids[copies * len(affix) : (copies + 1) * len(affix)].tolist() == affix:
        copies += 1
    return copies


def _blocks(examples: Iterable[Example]) -> Iterator[_Block]:
    for index, example in enumerate(examples):
        start, text = 0, example.text
        while start < len(text):
            stop = start + _BLOCK_CHARACTERS
            if stop < len(text):
                stop = text.rfind("\n", start, stop) + 1 or text.rfind(" ", start + 1, stop)
                stop = stop if stop > start else start + _BLOCK_CHARACTERS
            yield index, start, text[start:stop]
            start = stop


def _groups(blocks: Iterable[_Block]) -> Iterator[list[_Block]]:
    """Lists of blocks, small enough to bound the tokenizer's memory."""
    group: list[_Block] = []
    characters = 0
    for block in blocks:
        group.append(block)
        characters += len(block[2])
        if characters >= _GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group
