"""Bytes per token of every kind of targets in both encodings, with every column, and the cost of computing and reading.

English prose (the Python manual, one document per row), cached by the code of stage one from the logits on, in record
batches of 32,768 tokens as `cache-teacher` makes them. A size is that of the shards on disk divided by all tokens. The
lexicon of `packed` is not included. It is learned from the first shard, so **packed** is measured on the other shard
alone. **Order-zero entropy**, summed over columns, is the size of the columns with an ideal order-zero coder. **KL of
rounding** compares exact entries and tail mass before and after the codebooks.

Cost: processor time of `sparse_targets` relative to top-64, and reading speed in tokens per second and core.

    python -m benchmarks sizes
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import cache_format as cf
from benchmarks.measure import Result, Settings, Table
from benchmarks.teacher import ROW_TOKENS, describe, hidden_states, open_teacher
from benchmarks.text import prose, windows
from pipeline.inspection import cache_statistics
from pipeline.models.head import Head, open_head
from pipeline.models.tokenizers import real_vocab_size
from pipeline.teacher.targets.cache_rows import cache_row
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import ChunkTargets, draws, sparse_targets
from pipeline.teacher.text.packing import TokenRow

ROWS, QUICK_ROWS = 208, 8
CHUNK = 256
RULES = {
    "top-64": TargetRule(top_k=64),
    "top-50": TargetRule(top_k=50),
    "top-16": TargetRule(top_k=16),
    "top-p 0.95": TargetRule(kind="top-p"),
    "random, 50 draws": TargetRule(kind="random", draws=50),
    "random, 13 draws": TargetRule(kind="random", draws=13),
    "threshold 1/8": TargetRule(kind="threshold", tail_threshold=1 / 8),
    "threshold 1/20": TargetRule(kind="threshold", tail_threshold=1 / 20),
    "threshold 1/50": TargetRule(kind="threshold", tail_threshold=1 / 50),
}


@dataclass(frozen=True)
class Text:
    """The teacher's states of some rows, and its head."""

    input_ids: np.ndarray  # [rows, T]
    states: np.ndarray  # [rows, T, D] float16
    head: Head


def run(settings: Settings) -> Result:
    model, tokenizer = open_teacher(settings.teacher)
    rows, length = (QUICK_ROWS, 64) if settings.quick else (ROWS, ROW_TOKENS)
    input_ids = windows(tokenizer, list(prose()), rows, length)
    head = open_head(model, real_vocab_size(tokenizer, model.get_output_embeddings().weight.shape[0]))
    text = Text(input_ids, hidden_states(model, input_ids), head)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        costs = _costs(text, settings.rounds)
        with tempfile.TemporaryDirectory() as scratch:
            rows_of = _rows(text)
            table = [
                _sizes(name, rule, rows_of.pop(name), text, Path(scratch)) + [costs[name]]
                for name, rule in RULES.items()
            ]
    finally:
        torch.set_num_threads(threads)
    columns = ["targets", "entries", "columns, zstd 9", "columns, zstd 19", "order-zero entropy", "packed"]
    columns += ["packed ÷ columns", "KL of rounding, nats", "reading columns, tokens/s", "reading packed, tokens/s"]
    columns += ["cost ÷ top-64"]
    return Result(
        name="sizes",
        question="Bytes per token of every kind of targets, with every column, and the cost of computing them.",
        bound="order-zero entropy for columns; for computing targets, the softmax and one more pass over the logits.",
        settings={"teacher": describe(model), "rows": rows, "row_tokens": length},
        tables=[Table("Bytes per token", columns, table)],
        summary={f"{row[0]}, {column}": row[i] for row in table for i, column in ((2, "columns"), (5, "packed"))},
    )


def _sizes(name: str, rule: TargetRule, rows: list[cf.CacheRow], text: Text, scratch: Path) -> list[str | float]:
    half = len(rows) // 2
    caches, seconds = {}, {}
    for encoding, level in (("columns", 9), ("columns", 19), ("packed", 9)):
        path = scratch / f"{name.replace('/', '-')}-{encoding}-{level}"
        metadata = cf.CacheMetadata(
            teacher={"name": "benchmark"},
            tokenizer={},
            vocab_size=text.head.vocab_size,
            alignment="next",
            targets=rule.to_json(),
            corpus={"rows": len(rows)},
            codebooks={**cf.default_codebooks(text.head.vocab_size), "target_logprobs": rule.codebook()},
            rows_per_shard=half,
            rows_per_record_batch=min(64, half),
            encoding=encoding,
            compression={"codec": "zstd", "level": level},
        )
        with cf.CacheWriter(path, metadata) as writer:
            writer.write(rows)
        cache = caches[encoding, level] = cf.open_cache(path)
        began = time.process_time()
        for _ in cache.iter_record_batches():
            pass
        seconds[encoding] = time.process_time() - began
    columns, best = (_per_token(caches["columns", level], 0) for level in (9, 19))
    packed = _per_token(caches["packed", 9], 1)
    floor = sum(cache_statistics(caches["columns", 9])["column_entropy_bytes_per_token"].values())
    tokens = text.input_ids.size
    return [
        name,
        sum(row.targets.num_entries for row in rows) / tokens,
        columns,
        best,
        floor,
        packed,
        packed / columns,
        _error(rows, caches["columns", 9]),
        round(tokens / seconds["columns"]),
        round(tokens / seconds["packed"]),
    ]


def _per_token(cache: cf.Cache, first_shard: int) -> float:
    shards = cache.manifest.shards[first_shard:]
    return sum(shard.bytes for shard in shards) / sum(shard.tokens for shard in shards)


@torch.inference_mode()
def _rows(text: Text) -> dict[str, list[cf.CacheRow]]:
    """Rows as stage one passes them to the writer, by rule; the logits of a chunk are computed once for all rules."""
    length = text.input_ids.shape[1]
    mask = np.arange(length) < length - 1
    logits, scratch = torch.empty(2, CHUNK, text.head.vocab_size)
    rows: dict[str, list[cf.CacheRow]] = {name: [] for name in RULES}
    for index, states in enumerate(text.states):
        parts: dict[str, list[ChunkTargets]] = {name: [] for name in RULES}
        for start in range(0, length - 1, CHUNK):
            positions = np.arange(start, min(start + CHUNK, length - 1))
            found = text.head.logits(torch.from_numpy(states[positions].astype(np.float32)), out=logits)
            for name, rule in RULES.items():
                random = draws(rule, np.full(len(positions), index), positions)
                parts[name].append(sparse_targets(found, rule, random, scratch))
        token_row = TokenRow(input_ids=text.input_ids[index], loss_mask=mask, segment_lengths=np.array([length]))
        for name in RULES:
            rows[name].append(cache_row(index, token_row, mask, ChunkTargets.cat(parts[name])))
    return rows


def _error(rows: list[cf.CacheRow], cache: cf.Cache) -> float:
    """Mean over positions of KL(exact ‖ decoded) over exact entries and tail mass; 0 where no entry is exact."""
    total, positions = 0.0, 0
    for before, after in zip(rows, cache.iter_rows(), strict=True):
        targets = before.targets
        position = np.repeat(np.arange(len(targets.counts)), targets.counts)
        exact = np.arange(targets.num_entries) - targets.offsets[position] < targets.exact_counts[position]
        t = len(targets.counts)

        def mass(weights: np.ndarray, which: np.ndarray = position[exact], t: int = t) -> np.ndarray:
            return np.bincount(which, weights, t)

        log_p, log_q = (row.targets.logprobs[exact].astype(np.float64) for row in (before, after))
        rest_p, rest_q = (np.exp(row.targets.residual_logprob.astype(np.float64)) for row in (before, after))
        norm_p, norm_q = mass(np.exp(log_p)) + rest_p, mass(np.exp(log_q)) + rest_q
        p, q = np.exp(log_p) / norm_p[position[exact]], np.exp(log_q) / norm_q[position[exact]]
        rest_p, rest_q = np.maximum(rest_p / norm_p, 1e-30), np.maximum(rest_q / norm_q, 1e-30)
        kl = mass(p * np.log(p / q)) + rest_p * np.log(rest_p / rest_q)
        total += float(kl[before.loss_mask].sum())
        positions += int(before.loss_mask.sum())
    return total / positions


def _costs(text: Text, rounds: int) -> dict[str, float]:
    """Processor time of `sparse_targets` on one chunk ÷ that of top-64 in the same round; medians."""
    states = text.states.reshape(-1, text.states.shape[-1])[:CHUNK].astype(np.float32)
    with torch.inference_mode():
        logits = text.head.logits(torch.from_numpy(states)).clone()
    scratch = torch.empty_like(logits)
    places = np.arange(len(states))

    def step(rule: TargetRule) -> Callable[[], object]:
        def once() -> object:
            return sparse_targets(logits, rule, draws(rule, places, places), scratch)

        return once

    steps = {name: step(rule) for name, rule in RULES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):  # the first is a warm-up
        for name, once in steps.items():
            began = time.thread_time()
            once()
            if i:
                seconds[name].append(time.thread_time() - began)
    plain = seconds["top-64"]
    return {
        name: statistics.median(a / b for a, b in zip(times, plain, strict=True)) for name, times in seconds.items()
    }
