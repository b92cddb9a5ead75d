"""A request for an answer, the answer, and what determines it.

An answer depends on the teacher, the seed, its prompt and its index, never on the batch, except for rounding.

Shapes: P tokens of a prompt, n of an answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import cache_format as cf
from pipeline.teacher.cache_config import GenerationConfig
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.chat import end_of_turn

EOS, STOP_STRING, LENGTH = STOP_REASONS = ("eos", "stop-string", "length")


@dataclass(frozen=True, eq=False)
class Request:
    """One answer to generate."""

    document: int  # row of the source
    index: int  # among the answers to it
    prompt: np.ndarray  # [P] int32, P ≥ 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """One answer. `row` holds prompt, answer and targets; its number is assigned once answers have been chosen.

    Attributes:
        stop_reason: eos (or the end of a turn), stop-string, or length.
        text: without the token or stop string that ended it.
        logprobs: [n] float32, of the generated tokens: natural logs of the teacher's own probabilities, at temperature
            1, without truncation or quantisation.
    """

    document: int
    index: int
    prompt_tokens: int
    stop_reason: str
    text: str
    logprobs: np.ndarray
    row: cf.CacheRow

    @property
    def token_ids(self) -> np.ndarray:
        """[n], including the token that ended it."""
        return self.row.input_ids[self.prompt_tokens :]

    @property
    def mean_logprob(self) -> float:
        return float(self.logprobs.mean(dtype=np.float64))


def place_of(documents: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Random-generator keys of answers, [n] uint64; caches of given text use the row number instead."""
    return np.asarray(documents, np.uint64) | np.asarray(indices, np.uint64) << np.uint64(40)


def find_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, is_chat: bool) -> list[int]:
    """End-of-text tokens of tokenizer and model and, for chats, the token that ends the assistant's turn."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    if is_chat:
        ends = tokenizer(end_of_turn(tokenizer), add_special_tokens=False)["input_ids"]
        # Only if it is a single token: the first of several may occur in the middle of an answer.
        found |= set(ends) if len(ends) == 1 else set()
    return sorted(int(token) for token in found)


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerSettings:
    """Everything that determines an answer except its prompt.

    Attributes:
        rule: selects the targets.
        sampling: how tokens are sampled.
        stop_tokens: an answer ends with any of these.
        max_length: maximum number of tokens of prompt and answer.
    """

    tokenizer: PreTrainedTokenizerBase
    rule: TargetRule
    sampling: GenerationConfig
    stop_tokens: frozenset[int]
    max_length: int
