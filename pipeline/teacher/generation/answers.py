"""A teacher generates answers to prompts; their targets come from the same forward passes.

    prompts ─▶ states of the last token [b, D] ─▶ head, logits [b, V] ─▶ targets (the raw distribution)
                    ▲                                                └─▶ a token (temperature, top-k, top-p)
                    └──────────────── next position ◀────────────────────┘

An answer depends on the teacher, the seed, its prompt and its index, never on the batch, except for rounding.

Shapes: b answers in progress, D hidden width, V vocabulary size, T tokens of prompt and answer, n of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import cache_format as cf
from pipeline.errors import ModelError
from pipeline.teacher.cache_config import GenerationConfig
from pipeline.teacher.generation.decoding import Decoding
from pipeline.teacher.generation.token_sampling import draw
from pipeline.teacher.targets.cache_rows import cache_row
from pipeline.teacher.targets.philox import uniforms
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import ChunkTargets
from pipeline.teacher.text.chat.turns import end_of_turn
from pipeline.teacher.text.packing import TokenRow

if TYPE_CHECKING:
    from pipeline.teacher.engines.transformers_engine import TransformersEngine

STREAM = 2  # random stream for token sampling; tail sampling uses 0, masking 1
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


class AnswerWriter:
    """Generates one batch of answers with a teacher in transformers.

    Args:
        engine: gives logits and targets of the next token.
    """

    def __init__(self, engine: TransformersEngine, settings: AnswerSettings) -> None:
        self.engine, self.tokenizer, self.rule = engine, settings.tokenizer, settings.rule
        self.generation = settings.sampling
        self.stop_tokens, self.max_length = settings.stop_tokens, settings.max_length
        # A string of n bytes has at most n tokens; 4 more for tokens that are only part of a character.
        self.tail_tokens = 4 + max((len(stop.encode()) for stop in settings.sampling.stop), default=0)

    @torch.inference_mode()
    def write(self, requests: Sequence[Request]) -> list[Answer]:
        """One batch, in the order given. Raises: ModelError if the teacher's logits are not all finite."""
        prompts = {request.document: request.prompt for request in requests}
        decoding = Decoding(self.engine.head, list(prompts.values()))
        if len(prompts) < len(requests):  # several answers per prompt share one pass over it
            order = {document: i for i, document in enumerate(prompts)}
            decoding.select([order[request.document] for request in requests])
        drafts = [_Draft(request, self._limit(request)) for request in requests]
        active = drafts
        for step in range(self.generation.max_new_tokens):
            tokens = self._next(decoding, active, step)
            for draft in active:
                draft.stop_reason = self._stop_reason(draft)
            going_on = [i for i, draft in enumerate(active) if draft.stop_reason is None]
            if not going_on:
                break
            if len(going_on) < len(active):
                decoding.select(going_on)
                active, tokens = [active[i] for i in going_on], tokens[going_on]
            decoding.advance(tokens)
        return [self._answer(draft) for draft in drafts]

    def _next(self, decoding: Decoding, active: Sequence[_Draft], step: int) -> torch.Tensor:
        """Adds a token, its log-probability and the targets at its position to each draft. Returns the tokens [b]."""
        generation = self.generation
        places = place_of(
            np.array([draft.request.document for draft in active]), np.array([draft.request.index for draft in active])
        )
        positions = np.array([len(draft.request.prompt) - 1 + step for draft in active])
        logits, targets = self.engine.next_targets(decoding.hidden, places, positions, self.rule)
        if not targets.entropy.isfinite().all():
            bad = active[int((~targets.entropy.isfinite()).nonzero()[0, 0])].request
            raise ModelError(
                f"prompt {bad.document}, answer {bad.index}, after {step} tokens: the teacher's logits hold NaN or "
                "infinity. Try `dtype` float32 (or bfloat16 instead of float16); the answers before are kept."
            )
        chances = uniforms(generation.seed, places, np.full(len(places), step), 1, stream=STREAM)[:, 0]
        tokens = draw(
            logits,
            torch.from_numpy(chances),
            temperature=generation.temperature,
            top_p=generation.top_p,
            most=generation.top_k,
        )
        logprobs = logits.gather(1, tokens[:, None])[:, 0] - torch.logsumexp(logits, dim=1)
        for i, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
            active[i].token_ids.append(token)
            active[i].logprobs.append(min(logprob, 0.0))
            active[i].targets.append(ChunkTargets(*(part[i] for part in targets)))
        return tokens

    def _limit(self, request: Request) -> int:
        return min(self.generation.max_new_tokens, self.max_length - len(request.prompt))

    def _stop_reason(self, draft: _Draft) -> str | None:
        if draft.token_ids[-1] in self.stop_tokens:
            return EOS
        if self.generation.stop and self._stop_at(self._decode(draft.token_ids[-self.tail_tokens :])) is not None:
            return STOP_STRING
        return LENGTH if len(draft.token_ids) >= draft.limit else None

    def _stop_at(self, text: str) -> int | None:
        """Index of the first stop string in the text, or None."""
        return min((at for stop in self.generation.stop if (at := text.find(stop)) >= 0), default=None)

    def _decode(self, token_ids: list[int]) -> str:
        # Special tokens too: the predicate should see all that the teacher generated in an answer.
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _answer(self, draft: _Draft) -> Answer:
        request = draft.request
        text = self._decode(draft.token_ids[:-1] if draft.stop_reason == EOS else draft.token_ids)
        if draft.stop_reason == STOP_STRING:
            text = text[: self._stop_at(text)]
        token_ids = np.concatenate([request.prompt, draft.token_ids]).astype(np.int32)
        counted = np.zeros(len(token_ids), bool)
        # Position t predicts token t + 1, so the last prompt token predicts the first answer token.
        counted[len(request.prompt) - 1 : -1] = True
        row = TokenRow(token_ids, counted, np.array([len(token_ids)], np.int32))
        targets = ChunkTargets(*(torch.stack(parts) for parts in zip(*draft.targets, strict=True)))
        return Answer(
            document=request.document,
            index=request.index,
            prompt_tokens=len(request.prompt),
            stop_reason=str(draft.stop_reason),
            text=text,
            logprobs=np.array(draft.logprobs, np.float32),
            row=cache_row(0, row, counted, targets),
        )


class _Draft:
    """An answer in progress."""

    def __init__(self, request: Request, limit: int) -> None:
        self.request, self.limit = request, limit  # tokens, at most
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.targets: list[ChunkTargets] = []  # of one position each
        self.stop_reason: str | None = None
