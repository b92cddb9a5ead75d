"""Targets by the two engines, and vLLM's own lists of top tokens, for the same rows; and answers by both engines.

    transformers     `TransformersEngine`: batches of rows, padded; the default targets
    vllm             `VllmEngine`: documents as requests; the same targets
    vllm, top 64     `VllmEngine`, top-64 targets
    prompt_logprobs  vLLM alone, prompt_logprobs=64: what other tools store

    answers          `generate` of both engines: the same prompts, sampled answers of one length, the default targets

Needs vLLM in this environment (`make test-vllm` makes one): `.venv-vllm/bin/python -m benchmarks engines`.

Bound: the forward pass; every way computes it once. For answers: a decoding step for every token of a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Result, Settings, Table, Times, Value, interleave, ratio, spread
from benchmarks.teacher import describe, open_teacher
from benchmarks.text import prose
from pipeline.models.head import open_head
from pipeline.models.loading import load_tokenizer
from pipeline.models.tokenizers import real_vocab_size
from pipeline.teacher.engines.answers import AnswerSettings, Request
from pipeline.teacher.engines.interface import RowRequest, TeacherEngine
from pipeline.teacher.engines.transformers_engine import TransformersEngine
from pipeline.teacher.engines.vllm.vllm_opening import open_vllm
from pipeline.teacher.generation.generation_config import GenerationConfig
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.packing import build_corpus

TOP_K, BATCH_ROWS = 64, 8
WAYS = ("transformers", "vllm", "vllm, top 64", "prompt_logprobs")


def run(settings: Settings) -> Result:
    rows, row_tokens = (4, 64) if settings.quick else (8, 512)
    model, tokenizer = open_teacher(settings.teacher)
    vocab_size = real_vocab_size(tokenizer, model.get_output_embeddings().weight.shape[0])
    texts = itertools.islice(prose(500), 4 * rows)
    corpus = build_corpus(DataConfig(data=[{"text": text} for text in texts], seq_len=row_tokens), tokenizer)
    requests = [
        RowRequest(index=i, row=corpus[i], place=i, stored=corpus[i].loss_mask) for i in range(min(rows, len(corpus)))
    ]
    tokens = sum(request.tokens for request in requests)
    head = open_head(model, vocab_size)
    transformers = TransformersEngine(head, device=torch.device("cpu"), batch_size=BATCH_ROWS)
    vllm = open_vllm(str(settings.teacher), vocab_size=vocab_size, seq_len=row_tokens, dtype="float32", engine_args={})
    default, top = TargetRule(), TargetRule(top_k=TOP_K)
    own = open_vllm(
        str(settings.teacher),
        vocab_size=vocab_size,
        seq_len=row_tokens,
        dtype="float32",
        engine_args={"max_logprobs": TOP_K},
    )
    times = interleave(
        {
            "transformers": lambda: transformers.run(requests, [default]).rows(),
            "vllm": lambda: vllm.run(requests, [default]).rows(),
            "vllm, top 64": lambda: vllm.run(requests, [top]).rows(),
            "prompt_logprobs": lambda: own.call(lambda engine: prompt_logprobs(engine, requests)),
        },
        settings.rounds,
    )
    table = [
        [way, tokens / min(times[way]), ratio(times, "transformers", way), spread(times, "transformers", way)]
        + [ratio(times, "prompt_logprobs", way)]
        for way in WAYS
    ]
    vllm.close()
    own.close()
    answers, answer_times = answers_per_s(settings, transformers, [request.row.input_ids for request in requests])
    return Result(
        name="engines",
        question="Targets of the same rows by transformers and by vLLM, beside vLLM's own prompt log-probabilities. "
        "Answers with targets by both.",
        bound="the forward pass, which every way computes once.",
        settings={
            "teacher": describe(model),
            "rows": len(requests),
            "row_tokens": row_tokens,
            "tokens": tokens,
            "batch_rows": BATCH_ROWS,
            "dtype": "float32",
            "rounds": settings.rounds,
        },
        tables=[
            Table(
                "Speed of the engines",
                ["way", "tokens/s", "÷ transformers", "range", "÷ prompt_logprobs"],
                table,
            ),
            Table("Answers", ["way", "answers/s", "tokens/s", "÷ transformers", "range"], answers),
        ],
        summary={
            "vllm_speed_ratio": round(ratio(times, "transformers", "vllm"), 3),
            "vllm_answers_ratio": round(ratio(answer_times, "transformers", "vllm"), 3),
        },
    )


def answers_per_s(
    settings: Settings, transformers: TransformersEngine, texts: Sequence[np.ndarray]
) -> tuple[list[list[Value]], Times]:
    """Rows of the table, and seconds. The prompts are beginnings of the texts; no answer ends before its length."""
    number, prompt_tokens, new_tokens = (4, 8, 8) if settings.quick else (32, 32, 64)
    transformers.batch_size = number
    length = prompt_tokens + new_tokens
    prompts = [texts[i % len(texts)][i // len(texts) :][:prompt_tokens] for i in range(number)]
    requests = [Request(i, 0, prompt) for i, prompt in enumerate(prompts)]
    wanted = AnswerSettings(
        tokenizer=load_tokenizer(str(settings.teacher)),
        rule=TargetRule(),
        sampling=GenerationConfig(max_new_tokens=new_tokens),
        stop_tokens=frozenset(),
        max_length=length,
    )
    vllm = open_vllm(
        str(settings.teacher),
        vocab_size=transformers.vocab_size,
        seq_len=length,
        dtype="float32",
        engine_args={},
        generates=True,
    )
    engines: dict[str, TeacherEngine] = {"transformers": transformers, "vllm": vllm}
    times = interleave(
        {name: partial(engine.generate, requests, wanted) for name, engine in engines.items()}, settings.rounds
    )
    vllm.close()
    rows: list[list[Value]] = [
        [name, number / min(times[name]), number * new_tokens / min(times[name])]
        + [ratio(times, "transformers", name), spread(times, "transformers", name)]
        for name in engines
    ]
    return rows, times


def prompt_logprobs(engine: Any, requests: list[RowRequest]) -> int:
    """Runs vLLM on the documents of the rows; the number of finished requests."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, prompt_logprobs=TOP_K, detokenize=False, flat_logprobs=True)
    number = 0
    for request in requests:
        start = 0
        for length in request.row.segment_lengths.tolist():
            ids = request.row.input_ids[start : start + length].tolist()
            engine.add_request(f"own-{number}", {"prompt_token_ids": ids}, params)
            start, number = start + length, number + 1
    finished = 0
    while engine.has_unfinished_requests():
        finished += sum(output.finished for output in engine.step())
    return finished
