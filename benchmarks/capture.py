"""Stage one end to end, compared with the teacher's bare forward pass over the same rows.

    bare       model(input_ids, position_ids, use_cache=False) with the full logits of every batch, which are discarded
    capture    `cache_teacher`: forward, head and top-64 in chunks; check, encode, compress; shard, sidecar, manifest
    padded     the same with `--no-padding-free`: the body computes the padding and the masks of the bare pass

Same rows (of text that is already tokenised), same batches, same order. Each round runs one record batch of new rows
all ways. The bare pass starts with one untimed batch, because a virtual machine may take seconds to provide the
gigabyte of the first logits. Each capture finishes a complete cache, a cost that a long run pays once per shard. Packed
rows hold several documents; unpacked rows differ in length.

Bound: 1 for `padded`, the forward pass itself; it can be below only because it never fills the [B, T, V] logits.
Without padding there is less to compute.

    python -m benchmarks capture
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.measure import Result, Settings, Table, ratio, spread
from benchmarks.teacher import describe, open_teacher
from benchmarks.text import prose
from pipeline.models.padding import pad_rows
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.progress import CaptureSummary
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.packing import build_corpus

TOP_K, BATCH_ROWS = 64, 8


@dataclass(frozen=True)
class Sizes:
    rows: int  # per round
    row_tokens: int


def run(settings: Settings) -> Result:
    sizes = Sizes(rows=4, row_tokens=64) if settings.quick else Sizes(rows=32, row_tokens=512)
    model, tokenizer = open_teacher(settings.teacher)
    limit = getattr(model.config, "max_position_embeddings", sizes.row_tokens)
    sizes = Sizes(sizes.rows, min(sizes.row_tokens, limit))
    rows, summary = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for packing in (True, False):
            name = "packed" if packing else "one document per row"
            times, last = _rounds(settings, sizes, packing, model, tokenizer, Path(scratch) / name)
            rows.append(
                [name, last.rows, last.tokens, ratio(times, "capture", "bare"), spread(times, "capture", "bare")]
                + [ratio(times, "padded", "bare"), spread(times, "padded", "bare")]
                + [last.tokens / min(times["bare"]), last.tokens / min(times["capture"]), last.bytes / last.tokens]
            )
            for way in ("capture", "padded"):
                summary[f"{way}_{'packed' if packing else 'unpacked'}"] = round(ratio(times, way, "bare"), 3)
    columns = ["rows", "rows per round", "tokens", "capture/bare", "range", "padded/bare", "range, padded"]
    columns += ["bare tokens/s", "capture tokens/s", "bytes/token"]
    return Result(
        name="capture",
        question="cache-teacher end to end (forward, top-64, encode, write) ÷ the forward pass with full logits.",
        bound="1 with padding, the forward pass over the same rows; it can be below only because the [B, T, V] logits "
        "are never filled. Without padding, less is computed.",
        settings={
            "teacher": describe(model),
            "row_tokens": sizes.row_tokens,
            "batch_rows": BATCH_ROWS,
            "top_k": TOP_K,
            "rounds": settings.rounds,
        },
        tables=[Table("Capture compared with the bare forward pass", columns, rows)],
        summary=summary,
    )


def _rounds(
    settings: Settings,
    sizes: Sizes,
    packing: bool,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scratch: Path,
) -> tuple[dict[str, list[float]], CaptureSummary]:
    """Seconds of every way in each round, which uses new documents."""
    scratch.mkdir()
    documents = prose(500 if packing else 1200)  # some 125 or 300 tokens
    times: dict[str, list[float]] = {"bare": [], "capture": [], "padded": []}
    for i in range(settings.rounds):
        data = DataConfig(data=str(scratch / f"{i}.jsonl"), packing=packing, seq_len=sizes.row_tokens)
        _write_group(Path(data.data), documents, tokenizer, sizes, packing)
        for way in list(times) if i % 2 else list(times)[::-1]:
            gc.collect()
            if way == "bare":
                times["bare"].append(_bare_seconds(model, tokenizer, data))
                continue
            config = CacheTeacherConfig(
                teacher=str(settings.teacher),
                data=data,
                output=str(scratch / f"{way}-{i}"),
                targets=TargetRule(top_k=TOP_K),
                batch_size=BATCH_ROWS,
                padding_free=way == "capture",
            )
            seconds, last = _capture_seconds(config)
            times[way].append(seconds)
    return times, last


def _write_group(
    file: Path, documents: Iterator[str], tokenizer: PreTrainedTokenizerBase, sizes: Sizes, packing: bool
) -> None:
    """Writes as many of the next documents as nearly fill the rows of a round."""
    room = sizes.rows * sizes.row_tokens * 0.95 if packing else sizes.rows
    with file.open("w", encoding="utf-8") as stream:
        while True:
            text = next(documents)
            ids = tokenizer(text, verbose=False, truncation=True, max_length=sizes.row_tokens - 1)["input_ids"]
            room -= len(ids) + 1 if packing else 1
            stream.write(json.dumps({"text": tokenizer.decode(ids)}) + "\n")
            if room <= (sizes.row_tokens if packing else 0):
                return


@torch.inference_mode()
def _bare_seconds(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> float:
    rows = sorted(build_corpus(data, tokenizer), key=lambda row: -len(row.input_ids))  # the batches of cache_teacher
    batches = [pad_rows(rows[i : i + BATCH_ROWS]) for i in range(0, len(rows), BATCH_ROWS)]
    for timed in (False, True):
        start = time.perf_counter()
        for input_ids, position_ids in batches if timed else batches[:1]:
            model(input_ids=input_ids, position_ids=position_ids, use_cache=False)  # computes the full logits
    return time.perf_counter() - start


def _capture_seconds(config: CacheTeacherConfig) -> tuple[float, CaptureSummary]:
    """Time from loaded text and teacher to the finished cache."""
    started = [0.0]

    def on_stage(_: str) -> None:  # the last stage is the run itself
        started[0] = time.perf_counter()

    summary = cache_teacher(config, on_stage=on_stage)
    return time.perf_counter() - started[0], summary
