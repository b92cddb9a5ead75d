"""Text to token ids, and for each token whether it is in the loss.

A text is tokenised as a whole: parts that are tokenised separately have other tokens at their seams. The character
offsets of a token decide whether it is in the loss. Only a text of more than a quarter million characters is tokenised
in blocks that end with a line: a tokenizer needs about 130 bytes per character, 4 GB for a text file of 30 MB.

Shape: T tokens of one text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.teacher.text.chat.template import Span
from pipeline.teacher.text.examples import Example

# Four blocks are one group, which is shared by the tokenizer's threads.
_BLOCK_CHARACTERS = 1 << 18
_GROUP_CHARACTERS = 1 << 20

_Block = tuple[int, int, str]  # (index of the example, first character, text)


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ids int32 [T] and targets bool [T] of each example; empty arrays for an empty text.

    Args:
        prefix: ids before each text; in the loss only if the whole text is.
        suffix: ids after each text, always in the loss; not repeated if the text ends with them already.
    """
    ids = [[np.asarray(prefix, dtype=np.int32)] for _ in examples]
    targets = [[np.full(len(prefix), example.spans is None)] for example in examples]
    with_offsets = any(example.spans is not None for example in examples)
    for blocks in _groups(_blocks(examples)):
        encoded = tokenizer(
            [text for _, _, text in blocks],
            add_special_tokens=False,
            padding=False,
            truncation=False,  # a tokenizer.json may have a truncation of its own
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=with_offsets,
            verbose=False,  # no warning about long texts: they are cut into windows later
        )
        for place, (index, first, _) in enumerate(blocks):
            block_ids = np.asarray(encoded["input_ids"][place], dtype=np.int32)
            spans = examples[index].spans
            if spans is None:
                learned = np.ones(len(block_ids), dtype=bool)
            else:
                offsets = np.asarray(encoded["offset_mapping"][place], dtype=np.int64)
                learned = token_targets(offsets.reshape(-1, 2) + first, spans)
            ids[index].append(block_ids)
            targets[index].append(learned)
    for index, example in enumerate(examples):
        if not example.text:
            ids[index], targets[index] = [ids[index][0][:0]], [targets[index][0][:0]]
        elif list(ids[index][-1][-len(suffix) :]) != list(suffix):
            ids[index].append(np.asarray(suffix, dtype=np.int32))
            targets[index].append(np.ones(len(suffix), dtype=bool))
    return [np.concatenate(parts) for parts in ids], [np.concatenate(parts) for parts in targets]


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
