"""Hidden targets: what rounding the states does to the distributions rebuilt of them, their bytes, and their time.

Prose and code, half each, one document per row, through the teacher once, in float32. Each kind of states goes through
a cache and back, and through the head of that cache; what comes out is compared with the teacher's own log-softmax in
float64. **KL** is KL(teacher ‖ rebuilt) in nats. **log p**: the largest change of the log-probability of any token
above 1e-6. bfloat16 is not offered; it is here to show why.

Gradient: a student whose states are the teacher's times a matrix near the identity; the angle, in degrees, between the
gradient of that matrix under sparse targets and under whole distributions, all positions together.

Time: head and loss forward and backward of a student of the teacher's width, against those of top-64 targets.

    python -m benchmarks rebuilt
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import cache_format as cf
from benchmarks.measure import Result, Settings, Table, interleave, ratio, spread
from benchmarks.teacher import describe, open_teacher
from benchmarks.text import token_rows
from pipeline.losses import DistillLoss, FullTargets, SparseTargetBatch, fused_head
from pipeline.models.head import Head, open_head
from pipeline.models.head_export import export_head
from pipeline.models.teacher_head import TeacherHead
from pipeline.models.tokenizers import real_vocab_size
from pipeline.teacher.targets.hidden_states import quantised
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import ChunkTargets, draws, sparse_targets

ROWS, LENGTH, QUICK_LENGTH = 8, 64, 16
LIKELY = 1e-6
CHUNK = 128
DTYPES = ("float32", "float16", "int8", "bfloat16")
NEAR = 0.2  # how far the student's states are from the teacher's, in lengths
SPARSE = {
    "top-64": TargetRule(top_k=64),
    "top-16": TargetRule(top_k=16),
    "threshold 1/20": TargetRule(kind="threshold"),
}
LOSSES: dict[str, dict[str, object]] = {
    "forward KL": {},
    "forward KL at T = 2": {"temperature": 2.0},
    "forward KL at T = 4": {"temperature": 4.0},
    "reverse KL": {"divergence": "reverse-kl"},
    "JS(0.5)": {"divergence": "js"},
}


def run(settings: Settings) -> Result:
    model, tokenizer = open_teacher(settings.teacher)
    head = open_head(model, real_vocab_size(tokenizer, model.get_output_embeddings().weight.shape[0]))
    input_ids = token_rows(tokenizer, ROWS, QUICK_LENGTH if settings.quick else LENGTH)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), tempfile.TemporaryDirectory() as scratch:
            positions = torch.arange(input_ids.shape[1])[None]
            states = torch.cat([head.hidden_states(row[None], positions)[0] for row in torch.from_numpy(input_ids)])
            table = [_error(dtype, states, head, input_ids, Path(scratch)) for dtype in DTYPES]
            file = export_head(head).file(head.layers()[0])[0]
        angles = _angles(states.clone(), head)
        times = interleave(_losses(states.clone(), head), settings.rounds)
    finally:
        torch.set_num_threads(threads)
    by_dtype = {row[0]: row for row in table}
    timed = [[name, ratio(times, name, "top-64"), spread(times, name, "top-64")] for name in times if name != "top-64"]
    return Result(
        name="rebuilt",
        question="Distributions rebuilt of stored hidden states against the teacher's own, and what they cost",
        bound="KL 0; bytes: D numbers of a state; time: 4 products where sparse targets take 3, hence 1.33.",
        settings={"teacher": describe(model), "positions": len(states), "width": states.shape[1]},
        tables=[
            Table(
                "States",
                ["states", "bytes/token", "on disk", "KL mean", "KL 99 %", "KL largest", "log p", "other likeliest"],
                table,
            ),
            Table("Angle of the gradient to that of the whole distribution, degrees", ["loss", *SPARSE], angles),
            Table("Head and loss, forward and backward, ÷ top-64", ["loss", "ratio", "spread"], timed),
        ],
        summary={
            "head_megabytes": round(file.bytes / 1e6, 1),
            "head_dtype": file.dtype,
            **{f"kl_{name}": float(f"{row[3]:.3g}") for name, row in by_dtype.items()},
            **{f"bytes_{name}": round(float(row[2]), 1) for name, row in by_dtype.items() if row[2] != "—"},
            **{f"time_{name.replace(' ', '_')}": round(value, 2) for name, value, _ in timed},
        },
    )


def _angles(states: Tensor, head: Head) -> list[list[str | float]]:
    generator = torch.Generator().manual_seed(0)
    width, weight = states.shape[1], head.weight[: head.vocab_size].detach()
    near = torch.eye(width) + NEAR * torch.randn(width, width, generator=generator) / width**0.5
    labels = torch.randint(head.vocab_size, (len(states),), generator=generator)

    def gradient(targets: SparseTargetBatch | FullTargets, options: dict[str, object]) -> Tensor:
        matrix = near.clone().requires_grad_()
        loss = fused_head(
            states @ matrix,
            weight,
            None,
            targets,
            DistillLoss(**options),
            scale=1.0 / len(states),  # type: ignore[arg-type]
        ).loss
        return torch.autograd.grad(loss, matrix)[0].flatten().double()

    full = _full_targets(states, head, labels)
    sparse = {name: _sparse_targets(states, head, labels, rule) for name, rule in SPARSE.items()}
    table: list[list[str | float]] = []
    for name, options in LOSSES.items():
        whole, row = gradient(full, options), []
        for kind, targets in sparse.items():
            sampled = SPARSE[kind].sampled
            if sampled and options:  # unbiased for the forward KL at the cache's own temperature alone
                row.append("—")
                continue
            found = gradient(targets, {**options, "tail": "sampled" if sampled else "bucket"})
            cosine = torch.nn.functional.cosine_similarity(whole, found, dim=0).clamp(max=1.0)
            row.append(float(torch.rad2deg(torch.arccos(cosine))))
        table.append([name, *row])
    return table


def _full_targets(states: Tensor, head: Head, labels: Tensor) -> FullTargets:
    weight = head.weight[: head.vocab_size].detach()
    return FullTargets(
        states=states.half(),
        scales=None,
        place=torch.arange(len(states)),
        labels=labels,
        entropy=torch.zeros(len(states)),
        head=lambda each: each @ weight.T,
    )


def _sparse_targets(states: Tensor, head: Head, labels: Tensor, rule: TargetRule) -> SparseTargetBatch:
    chunks = []
    for start in range(0, len(states), CHUNK):
        here = np.arange(start, min(start + CHUNK, len(states)))
        drawn = draws(rule, np.zeros_like(here), here)
        chunks.append(sparse_targets(head.logits(states[here]).detach(), rule, drawn))
    ids, logprobs, exact, _, residual, entropy = ChunkTargets.cat(chunks)
    return SparseTargetBatch(
        ids=ids.long().clamp(min=0),
        logprobs=torch.where(ids >= 0, logprobs, -torch.inf),
        exact_counts=exact.long(),
        residual_logprob=residual,
        labels=labels,
        entropy=entropy,
    )


def _error(dtype: str, states: Tensor, head: Head, input_ids: np.ndarray, scratch: Path) -> list[str | float]:
    """A row of the table."""
    if dtype == "bfloat16":
        kept, bytes_per_token, on_disk, rebuilding = states.bfloat16().float(), 2.0 * states.shape[1], "—", head.logits
    else:
        cache = _cache(dtype, states, head, input_ids, scratch / dtype)
        spec = cache.metadata.hidden
        assert spec is not None
        (layer,), tokens = spec.layers, cache.num_tokens
        found = [row.hidden.values(layer) for row in cache if row.hidden is not None]
        kept, bytes_per_token, rebuilding = torch.from_numpy(np.concatenate(found)), spec.bytes_per_position, None
        on_disk = sum(each for name, each in cache.column_bytes().items() if name.startswith("hidden_")) / tokens
        rebuilding = TeacherHead(cache)
    kls, changes, others = [], [], []
    for exact_states, other_states in zip(states.split(CHUNK), kept.split(CHUNK), strict=True):
        exact = head.logits(exact_states).double().log_softmax(dim=1)
        found = rebuilding(other_states).double().log_softmax(dim=1)
        kls.append((exact.exp() * (exact - found)).sum(dim=1))
        changes.append((exact - found).abs().masked_fill(exact.exp() < LIKELY, 0.0).amax(dim=1))
        others.append((exact.argmax(dim=1) != found.argmax(dim=1)).double())
    kl = torch.cat(kls).clamp(min=0.0).numpy()
    worst, share = float(torch.cat(changes).max()), float(torch.cat(others).mean())
    return [dtype, bytes_per_token, on_disk, kl.mean(), float(np.quantile(kl, 0.99)), kl.max(), worst, f"{share:.2%}"]


def _cache(dtype: str, states: Tensor, head: Head, input_ids: np.ndarray, path: Path) -> cf.Cache:
    last, width = head.layers()
    file, contents = export_head(head).file(last)
    hidden = cf.HiddenSpec(layers=(last,), teacher_layers=last, width=width, dtype=dtype)
    targets = {**TargetRule(kind="hidden").to_json(), "hidden": hidden.to_json(), "head": file.to_json()}
    metadata = cf.CacheMetadata(
        teacher={"name": "benchmark"},
        tokenizer={},
        vocab_size=head.vocab_size,
        alignment="next",
        targets=targets,
        corpus={"rows": len(input_ids)},
    )
    length = input_ids.shape[1]
    kept, scales = quantised(states, dtype)
    nothing, counted = np.zeros(length, np.int64), np.arange(length) < length - 1
    with cf.CacheWriter(path, metadata, head=contents) as writer:
        for i, ids in enumerate(input_ids):
            here = slice(i * length, (i + 1) * length)
            zeros = np.zeros(length, np.float32)
            entries = cf.SparseTargets(nothing, np.zeros(0, np.int64), np.zeros(0, np.float32), nothing, zeros, zeros)
            of_row = cf.HiddenStates(
                np.ones(length, bool),
                {last: kept[here].numpy()},
                {} if scales is None else {last: scales[here].numpy()},
            )
            row = cf.CacheRow(i, ids, counted, np.array([length]), entries)
            writer.write([replace(row, hidden=of_row)])
    return cf.open_cache(path)


def _losses(states: Tensor, head: Head) -> dict[str, object]:
    """Head and loss of a student of this width, against each kind of targets."""
    generator = torch.Generator().manual_seed(0)
    weight = head.weight[: head.vocab_size].detach()
    student = (states + 0.3 * torch.randn(states.shape, generator=generator)).requires_grad_()
    trained = (weight + 0.01 * torch.randn(weight.shape, generator=generator)).requires_grad_()
    labels = torch.randint(head.vocab_size, (len(states),), generator=generator)
    top, full = _sparse_targets(states, head, labels, TargetRule(top_k=64)), _full_targets(states, head, labels)

    def loss_of(targets: SparseTargetBatch | FullTargets, **options: object) -> object:
        def both_ways() -> None:
            loss = DistillLoss(kd_weight=0.9, **options)  # type: ignore[arg-type]
            fused_head(student, trained, None, targets, loss).loss.backward()

        return both_ways

    return {
        "top-64": loss_of(top),
        "forward KL": loss_of(full),
        "reverse KL": loss_of(full, divergence="reverse-kl"),
        "forward KL at T = 2": loss_of(full, temperature=2.0),
    }
