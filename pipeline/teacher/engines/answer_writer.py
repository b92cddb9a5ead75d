"""Generates one batch of answers with a teacher in transformers; their targets come from the same forward passes.

    prompts ─▶ states of the last token [b, D] ─▶ head, logits [b, V] ─▶ targets (the raw distribution)
                    ▲                                                └─▶ a token (temperature, top-k, top-p)
                    └──────────────── next position ◀────────────────────┘

If an answer grows past a length at which the teacher switches (`models.isolation.length_limits`), its targets are
computed again in one pass over prompt and answer: a student, and `verify`, see the whole row.

Shapes: b answers in progress, D hidden width, V vocabulary size, n tokens of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pipeline.errors import ModelError
from pipeline.teacher.engines.answers import (
    EOS,
    LENGTH,
    STOP_STRING,
    STREAM,
    Answer,
    AnswerSettings,
    Request,
    answer_row,
    complete_answer,
    decode,
    find_stop,
    place_of,
)
from pipeline.teacher.engines.decoding import Decoding
from pipeline.teacher.engines.forward_pass import ForwardPass
from pipeline.teacher.engines.interface import RowRequest
from pipeline.teacher.engines.token_sampling import draw
from pipeline.teacher.targets.cache_rows import cache_row
from pipeline.teacher.targets.philox import uniforms
from pipeline.teacher.targets.selection import ChunkTargets


class AnswerWriter:
    """Generates answers, a batch at a time.

    Args:
        forward: gives logits and targets of the next token.
    """

    def __init__(self, forward: ForwardPass, settings: AnswerSettings) -> None:
        self.forward, self.settings, self.rule = forward, settings, settings.rule
        self.generation = settings.sampling
        self.stop_tokens = settings.stop_tokens
        # A string of n bytes has at most n tokens; 4 more for tokens that are only part of a character.
        self.tail_tokens = 4 + max((len(stop.encode()) for stop in settings.sampling.stop), default=0)

    @torch.inference_mode()
    def write(self, requests: Sequence[Request]) -> list[Answer]:
        """One batch, in the order given. Raises: ModelError if the teacher's logits are not all finite."""
        prompts = {request.document: request.read for request in requests}
        decoding = Decoding(self.forward.head, list(prompts.values()))
        if len(prompts) < len(requests):  # several answers per prompt share one pass over it
            order = {document: i for i, document in enumerate(prompts)}
            decoding.select([order[request.document] for request in requests])
        drafts = [_Draft(request, self.settings.most_tokens(request)) for request in requests]
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
        logits, targets = self.forward.next_targets(decoding.hidden, places, positions, self.rule)
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

    def _stop_reason(self, draft: _Draft) -> str | None:
        if draft.token_ids[-1] in self.stop_tokens:
            return EOS
        if self.generation.stop:
            text = decode(self.settings.tokenizer, draft.token_ids[-self.tail_tokens :])
            if find_stop(text, self.generation.stop) is not None:
                return STOP_STRING
        return LENGTH if len(draft.token_ids) >= draft.limit else None

    def _answer(self, draft: _Draft) -> Answer:
        request, row = draft.request, answer_row(draft.request, draft.token_ids)
        if self.forward.head.separates(len(request.read), len(request.read) + len(draft.token_ids)):
            place = int(place_of(np.array([request.document]), np.array([request.index]))[0])
            whole = RowRequest(index=request.document, row=row, place=place, stored=row.loss_mask, teacher=row.teacher)
            (with_targets,) = self.forward.run([whole], [self.rule]).rows()
        else:
            targets = ChunkTargets(*(torch.stack(parts) for parts in zip(*draft.targets, strict=True)))
            with_targets = cache_row(request.document, row, row.loss_mask, targets)
        return complete_answer(request, with_targets, draft.logprobs, str(draft.stop_reason), self.settings)


class _Draft:
    """An answer in progress."""

    def __init__(self, request: Request, limit: int) -> None:
        self.request, self.limit = request, limit  # tokens, at most
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.targets: list[ChunkTargets] = []  # of one position each
        self.stop_reason: str | None = None
