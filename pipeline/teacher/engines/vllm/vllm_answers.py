"""Answers by vLLM: its sampling options for a request, and the answer made from its output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.teacher.engines.answers import (
    EOS,
    LENGTH,
    STOP_STRING,
    Answer,
    AnswerSettings,
    Request,
    answer_row,
    answer_seed,
    complete_answer,
)
from pipeline.teacher.engines.vllm.vllm_collector import Collected
from pipeline.teacher.targets.cache_rows import cache_row
from pipeline.teacher.targets.selection import ChunkTargets

if TYPE_CHECKING:
    from vllm import RequestOutput


def sampling_options(request: Request, settings: AnswerSettings) -> dict[str, Any]:
    """Arguments of vLLM's `SamplingParams` for an answer."""
    given = settings.sampling
    return {
        "max_tokens": settings.most_tokens(request),
        "temperature": given.temperature,
        "top_p": given.top_p,
        "top_k": given.top_k,
        "seed": answer_seed(request, given.seed),
        "logprobs": 0,
        "stop": list(given.stop),
        "stop_token_ids": sorted(settings.stop_tokens),
        "ignore_eos": True,  # unless it is one of these
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "detokenize": bool(given.stop),
    }


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
    with_targets = cache_row(request.document, row, row.loss_mask, targets)
    return complete_answer(request, with_targets, logprobs, stop_reason, settings)
