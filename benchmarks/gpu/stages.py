"""Both stages through `distill`'s functions, compared with the bare model; and batches without a model."""

from __future__ import annotations

import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

import cache_format as cf
import distill
from benchmarks.gpu.bench import BF16, RATE, Bench
from benchmarks.measure import Table, Value
from benchmarks.shapes import Shape, mean_length
from pipeline.models.head import open_head
from pipeline.models.isolation.document_attention import Documents
from pipeline.models.isolation.padding_free import without_padding
from pipeline.models.padding import pad_rows

TARGETS: dict[str, dict[str, Any]] = {"top-64": {"targets": "top-k", "top_k": 64}, "threshold": {}}


def capture(bench: Bench) -> list[Table]:
    columns = ["teacher", "row tokens", "targets", "encoding", "tokens/s", "forward and head, tokens/s", "capture/bare"]
    columns += [RATE, "bytes/token", "peak GB"]
    found: list[list[Value]] = []
    sizes = bench.sizes
    for shape in sizes.teachers:
        model = shape.model(bench.device, BF16, max(sizes.row_tokens) + 1)
        tokenizer = shape.tokenizer()
        for row_tokens in sizes.row_tokens:
            rows = bench.rows(shape, row_tokens, sizes.cached_tokens // (1 if shape is sizes.teachers[0] else 2))
            batch = max(1, sizes.pass_tokens // row_tokens)
            bare = flops = float("nan")  # of the rows that the first cache has, like every other
            for name, options in TARGETS.items():
                for encoding in ("columns", "packed") if row_tokens == sizes.row_tokens[0] else ("columns",):
                    output = bench.scratch / "cache"
                    shutil.rmtree(output, ignore_errors=True)
                    began: list[float] = []
                    with bench.peak_memory() as peak:
                        summary = distill.cache_teacher(
                            model,
                            rows,
                            output,
                            tokenizer=tokenizer,
                            seq_len=row_tokens,
                            batch_size=batch,
                            encoding=encoding,
                            device=str(bench.device),
                            on_progress=lambda at, began=began: (
                                began.append(time.perf_counter()) if not at.done else None
                            ),
                            **options,
                        )
                    speed = summary.tokens / (time.perf_counter() - began[-1])  # since the last stage began
                    if np.isnan(bare):
                        packed = _rows_of(output)
                        bare = _bare(bench, model, shape, packed, row_tokens, batch)
                        flops = shape.forward_flops(_mean_length(packed))
                    share = speed * flops / bench.flops
                    cells: list[Value] = [shape.name, row_tokens, name, encoding, speed, bare, bare / speed, share]
                    found.append([*cells, summary.bytes / summary.tokens, peak[0]])
        del model
    return [Table("Capture", columns, found)]


@dataclass(frozen=True)
class _Row:
    input_ids: np.ndarray
    segment_lengths: np.ndarray


def _rows_of(cache: Path) -> list[_Row]:
    """The rows of a cache without their targets, longest first, as a teacher reads them."""
    rows = [_Row(row.input_ids, row.segment_lengths) for row in cf.open_cache(cache).iter_rows()]
    return sorted(rows, key=lambda row: -len(row.input_ids))


def _mean_length(rows: list[_Row]) -> float:
    return mean_length(int(length) for row in rows for length in row.segment_lengths)


@torch.inference_mode()
def _bare(bench: Bench, model: PreTrainedModel, shape: Shape, rows: list[_Row], row_tokens: int, batch: int) -> float:
    """Tokens per second of the forward pass and the head's product over the same rows, in batches of the same size."""
    head = open_head(model, shape.vocab)
    head = without_padding(head, row_tokens, wanted=None, device=bench.device)
    batches = []
    for start in range(0, len(rows), batch):
        here = rows[start : start + batch]
        inputs = [each.to(bench.device) for each in pad_rows(here)]
        batches.append((inputs, Documents.of_rows(here).to(bench.device)))

    def run() -> None:
        for inputs, documents in batches:
            hidden = head.hidden_states(*inputs, documents=documents).flatten(0, 1)[documents.places]
            for start in range(0, len(hidden), 1024):
                head.logits(hidden[start : start + 1024])

    return sum(len(row.input_ids) for row in rows) / bench.seconds(run, rounds=1)


def training(bench: Bench) -> list[Table]:
    columns = ["student", "trained with", "tokens/s", RATE, "peak GB"]
    found: list[list[Value]] = []
    sizes, row_tokens = bench.sizes, bench.sizes.row_tokens[0]
    batch = max(1, sizes.step_tokens // row_tokens)
    for shape in sizes.students:
        cache = _cache_for(bench, shape, row_tokens)
        # The plain loop has documents as long as a row.
        lengths = {"cross-entropy, plain loop": float(row_tokens), "distill": _mean_length(_rows_of(cache))}
        for way, length in lengths.items():
            model = shape.model(bench.device, torch.float32, row_tokens + 1)
            with bench.peak_memory() as peak:
                speed = (_plain if "plain" in way else _distilled)(bench, model, shape, cache, batch)
            found.append([shape.name, way, speed, speed * shape.training_flops(length) / bench.flops, peak[0]])
            del model
    return [Table("Training", columns, found)]


def _cache_for(bench: Bench, shape: Shape, row_tokens: int) -> Path:
    """A cache of the student's own top-64 entries: it costs what a larger teacher's would."""
    output = bench.scratch / f"cache-{shape.name}"
    if not output.exists():
        rows = bench.rows(shape, row_tokens, bench.sizes.cached_tokens)
        model = shape.model(bench.device, BF16, row_tokens + 1)
        options = {"seq_len": row_tokens, "tokenizer": shape.tokenizer(), "device": str(bench.device)}
        distill.cache_teacher(model, rows, output, **options, **TARGETS["top-64"])
    return output


def _distilled(bench: Bench, model: PreTrainedModel, shape: Shape, cache: Path, batch: int) -> float:
    steps: list[float] = []

    def on_progress(at: distill.Progress) -> None:
        if at.done > len(steps):
            bench.wait()
            steps.append(time.perf_counter())

    output = bench.scratch / "student"
    shutil.rmtree(output, ignore_errors=True)
    distill.train_student(
        str(cache),
        model,
        output,
        max_steps=bench.sizes.steps,
        batch_size=batch,
        tokenizer=shape.tokenizer(),
        on_progress=on_progress,
    )
    tokens = cf.open_cache(cache)
    return tokens.num_tokens / len(tokens) * batch / statistics.median(np.diff(steps[1:]))


def _plain(bench: Bench, model: PreTrainedModel, shape: Shape, cache: Path, batch: int) -> float:
    """Full rows of one document each, full logits, autocast to bfloat16, fused AdamW."""
    row_tokens = bench.sizes.row_tokens[0]
    ids = torch.randint(2, shape.vocab, (batch, row_tokens), device=bench.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=bench.device.type == "cuda")
    model.train()

    def step() -> None:
        with torch.autocast(bench.device.type, BF16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return ids.numel() / bench.seconds(step, max(2, bench.sizes.steps // 2))


def loader(bench: Bench) -> list[Table]:
    """Batches as training gets them, without a model."""
    from torch.utils.data import BatchSampler, DataLoader

    from pipeline.student.data.batches_ahead import BatchesAhead
    from pipeline.student.data.dataset import CacheDataset, to_device

    columns = ["encoding", "workers", "tokens/s"]
    found: list[list[Value]] = []
    shape, row_tokens = bench.sizes.students[0], bench.sizes.row_tokens[0]
    source = _cache_for(bench, shape, row_tokens)
    packed = bench.scratch / "packed"
    for _ in cf.convert_cache(source, packed, cf.Conversion(encoding="packed")):
        pass
    batch = max(1, bench.sizes.step_tokens // row_tokens)
    for encoding, path in (("columns", source), ("packed", packed)):
        for workers in (0, 2, 4, 8):
            rows, pinned = CacheDataset(cf.open_cache(path)), bench.device.type == "cuda"
            order = BatchSampler(rows.sampler(seed=0), batch, drop_last=False)
            ahead = BatchesAhead(rows, order, pinned=pinned)
            batches = DataLoader(
                ahead, batch_sampler=order, collate_fn=ahead.collate, num_workers=workers, pin_memory=pinned
            )
            tokens, began = 0, 0.0
            for i, each in enumerate(batches):
                if i == 1:  # the first one starts the workers
                    began = time.perf_counter()
                tokens += int(each["num_tokens"]) if i else 0
                to_device(each, bench.device)
            bench.wait()
            found.append([encoding, workers, tokens / (time.perf_counter() - began)])
    return [Table("Loader, top-64", columns, found)]
