"""A request for an answer, the answer, and what determines it.

An answer depends on the teacher, the seed, its prompt and its index, never on the batch, except for rounding.

Shapes: P tokens of a prompt, n of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

import cache_format as cf
from pipeline.teacher.generation.generation_config import GenerationConfig
from pipeline.teacher.targets.philox import uniforms
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.chat.turns import end_of_turn
from pipeline.teacher.text.formats.teacher_prompts import behind_prompts
from pipeline.teacher.text.packing import TokenRow

Messages = Callable[[], Sequence[Mapping[str, Any]]]

STREAM = 2  # random stream for token sampling; tail sampling uses 0, masking 1
EOS, STOP_STRING, LENGTH = STOP_REASONS = ("eos", "stop-string", "length")


@dataclass(frozen=True, eq=False)
class Request:
    """One answer to generate."""

    document: int  # row of the source
    index: int  # among the answers to it
    prompt: np.ndarray  # [P] int32, P ≥ 1, in the row
    teacher_prompt: np.ndarray | None = None  # what the teacher reads, if that is not the prompt
    by_teacher: bool = True  # the teacher answers; another writer reads the prompt, and the teacher scores
    messages: Messages | None = None  # what is answered, before it is rendered; raises DataError if that is not a chat

    @property
    def read(self) -> np.ndarray:
        """What is answered."""
        return self.teacher_prompt if self.teacher_prompt is not None and self.by_teacher else self.prompt

    @property
    def ahead(self) -> int:
        """How far the teacher is ahead of the row."""
        return len(self.read) - len(self.prompt)


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """One answer. `row` holds prompt, answer and targets; its number is assigned once answers have been chosen.

    Attributes:
        stop_reason: eos (or the end of a turn), stop-string, or length.
        text: without the token or stop string that ended it.
        logprobs: [n] float32, of the generated tokens: natural logs of the probabilities of the model that wrote
            them, at temperature 1, without truncation or quantisation.
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


def answer_seed(request: Request, seed: int) -> int:
    """The seed of an answer: of the run's seed, the prompt and the index, as any other random number here."""
    place = place_of(np.array([request.document]), np.array([request.index]))
    return int(uniforms(seed, place, np.zeros(1, np.int64), 1, stream=STREAM)[0, 0] * 2**31)


def token_set(given: int | list[int] | None) -> set[int]:
    """A setting such as `eos_token_id`, which may be one token, several or none."""
    return {int(token) for token in (given if isinstance(given, list) else [given]) if token is not None}


def find_stop_tokens(own: set[int], tokenizer: PreTrainedTokenizerBase, *, is_chat: bool) -> list[int]:
    """End-of-text tokens of tokenizer and model and, for chats, the token that ends the assistant's turn.

    Args:
        own: those of the model's generation settings.
    """
    found = {tokenizer.eos_token_id, *own} - {None}
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
        longest_read: the same for what the teacher reads; default: `max_length`.
    """

    tokenizer: PreTrainedTokenizerBase
    rule: TargetRule
    sampling: GenerationConfig
    stop_tokens: frozenset[int]
    max_length: int
    longest_read: int | None = None

    def most_tokens(self, request: Request) -> int:
        """Maximum number of tokens of an answer."""
        room = self.max_length - len(request.prompt)
        read = request.prompt if request.teacher_prompt is None else request.teacher_prompt
        room_for_teacher = (self.longest_read or self.max_length) - len(read)
        return min(self.sampling.max_new_tokens, room, room_for_teacher)


def answer_row(request: Request, token_ids: Sequence[int]) -> TokenRow:
    """Prompt and answer as one row. Args: token_ids: of the answer, including the one that ended it."""
    all_ids = np.concatenate([request.prompt, token_ids]).astype(np.int32)
    loss_mask = np.zeros(len(all_ids), bool)
    # Position t predicts token t + 1, so the last prompt token predicts the first answer token.
    loss_mask[len(request.prompt) - 1 : -1] = True
    other = request.teacher_prompt
    return TokenRow(
        all_ids,
        loss_mask,
        np.array([len(all_ids)], np.int32),
        teacher=None if other is None else behind_prompts(request.prompt, other, token_ids),
    )


def complete_answer(
    request: Request, row: cf.CacheRow, logprobs: Sequence[float], stop_reason: str, settings: AnswerSettings
) -> Answer:
    """Args: row: `answer_row` with targets; logprobs: of the answer's tokens."""
    token_ids = row.input_ids[len(request.prompt) :].tolist()
    text = decode(settings.tokenizer, token_ids[:-1] if token_ids[-1] in settings.stop_tokens else token_ids)
    if stop_reason == STOP_STRING:
        text = text[: find_stop(text, settings.sampling.stop)]
    return Answer(
        document=request.document,
        index=request.index,
        prompt_tokens=len(request.prompt),
        stop_reason=stop_reason,
        text=text,
        logprobs=np.array(logprobs, np.float32),
        row=row,
    )


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Index of the first stop string in the text, or None."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """With special tokens: a predicate should see all that the teacher generated in an answer."""
    return str(tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
