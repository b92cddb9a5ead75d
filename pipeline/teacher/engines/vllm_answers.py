"""Answers by vLLM: what it is asked for one, and the answer made of what it gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.teacher.engines.answer_writer import STREAM
from pipeline.teacher.engines.vllm_worker import KEY, Collected, Wanted
from pipeline.teacher.generation.answers import (
    EOS,
    LENGTH,
    STOP_STRING,
    Answer,
    AnswerSettings,
    Request,
    answer_row,
    complete_answer,
    place_of,
)
from pipeline.teacher.targets.cache_rows import cache_row
from pipeline.teacher.targets.philox import uniforms
from pipeline.teacher.targets.selection import ChunkTargets

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams


def answer_seed(request: Request, seed: int) -> int:
    """The seed of an answer: of the run's seed, the prompt and the index, as any other random number here."""
    place = place_of(np.array([request.document]), np.array([request.index]))
    return int(uniforms(seed, place, np.zeros(1, np.int64), 1, stream=STREAM)[0, 0] * 2**31)


def sampling_params(name: str, request: Request, settings: AnswerSettings) -> SamplingParams:
    """What vLLM is asked for an answer."""
    from vllm import SamplingParams

    given, prompt = settings.sampling, len(request.prompt)
    place = place_of(np.array([request.document]), np.array([request.index]))
    stored = np.zeros(prompt, bool)
    stored[-1] = True  # and all that are generated
    wanted = Wanted(name=name, place=int(place[0]), start=0, stored=np.packbits(stored).tobytes())
    return SamplingParams(
        max_tokens=min(given.max_new_tokens, settings.max_length - prompt),
        temperature=given.temperature,
        top_p=given.top_p,
        top_k=given.top_k,
        seed=answer_seed(request, given.seed),
        logprobs=0,
        stop=list(given.stop),
        stop_token_ids=sorted(settings.stop_tokens),
        ignore_eos=True,  # unless it is one of these
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        detokenize=bool(given.stop),
        extra_args={KEY: list(wanted)},
    )


def answer_of(request: Request, output: RequestOutput, collected: Collected, settings: AnswerSettings) -> Answer:
    (found,) = output.outputs
    token_ids = list(found.token_ids)
    if found.finish_reason == "length":
        stop_reason = LENGTH
    else:
        stop_reason = STOP_STRING if isinstance(found.stop_reason, str) else EOS
    logprobs = [of_token[token].logprob for token, of_token in zip(token_ids, found.logprobs, strict=True)]
    row = answer_row(request, token_ids)
    targets = ChunkTargets(*(each[: len(token_ids)] for each in collected.targets[0]))
    with_targets = cache_row(0, row, row.loss_mask, targets)
    return complete_answer(request, with_targets, logprobs, stop_reason, settings)
