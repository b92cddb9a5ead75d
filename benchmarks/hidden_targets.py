"""Full distributions from stored hidden states: the error of rounded states, their bytes, and the time of the loss.

The teacher runs once, in float32, over prose and code, half each, one document per row. States of each dtype are
written to a cache and read back, and the head of that cache is applied to them. The result is compared with the
teacher's own log-softmax in float64. **KL** is KL(teacher ‖ from stored states) in nats. bfloat16 is not offered, for
the reason that its row shows.

Gradient: the student's states are the teacher's times a matrix near the identity. Measured is the angle, in degrees,
between the gradients of this matrix under sparse targets and under full distributions, over all positions.

Time: head and loss, forward and backward, of a student of the teacher's width, relative to top-64 targets.

    python -m benchmarks hidden_targets
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
DISTANCE = 0.2  # of the student's states from the teacher's, relative to their norm
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
    "Jensen–Shannon": {"divergence": "js"},
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
        name="hidden_targets",
        question="Full distributions from stored hidden states: error against the teacher's own, bytes and time.",
        bound="KL 0; bytes: the D numbers of a state; time: 4 products instead of 3 for sparse targets, hence 1.33.",
        settings={"teacher": describe(model), "positions": len(states), "width": states.shape[1]},
        tables=[
            Table(
                "States",
                ["states", "bytes/token", "bytes/token on disk", "mean KL", "99th percentile of KL", "max KL"]
                + [f"max |Δlog p|, p > {LIKELY:g}", "positions with another argmax"],
                table,
            ),
            Table("Angle to the gradient under full distributions, degrees", ["loss", *SPARSE], angles),
            Table("Time of head and loss, forward and backward, ÷ top-64", ["loss", "ratio", "range"], timed),
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
    near = torch.eye(width) + DISTANCE * torch.randn(width, width, generator=generator) / width**0.5
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

    full_targets = _full_targets(states, head, labels)
    sparse = {name: _sparse_targets(states, head, labels, rule) for name, rule in SPARSE.items()}
    table: list[list[str | float]] = []
    for name, options in LOSSES.items():
        full, row = gradient(full_targets, options), []
        for kind, targets in sparse.items():
            sampled = SPARSE[kind].sampled
            if sampled and options:  # a sample serves only the forward KL at the temperature of the cache
                row.append("—")
                continue
            found = gradient(targets, {**options, "tail": "sampled" if sampled else "bucket"})
            cosine = torch.nn.functional.cosine_similarity(full, found, dim=0).clamp(max=1.0)
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
        random = draws(rule, np.zeros_like(here), here)
        chunks.append(sparse_targets(head.logits(states[here]).detach(), rule, random))
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
    """Row of the table for a dtype."""
    if dtype == "bfloat16":
        stored, bytes_per_token, on_disk, logits = states.bfloat16().float(), 2.0 * states.shape[1], "—", head.logits
    else:
        cache = _cache(dtype, states, head, input_ids, scratch / dtype)
        spec = cache.metadata.hidden
        assert spec is not None
        (layer,), tokens = spec.layers, cache.num_tokens
        found = [row.hidden.values(layer) for row in cache if row.hidden is not None]
        stored, bytes_per_token = torch.from_numpy(np.concatenate(found)), spec.bytes_per_position
        on_disk = sum(each for name, each in cache.column_bytes().items() if name.startswith("hidden_")) / tokens
        logits = TeacherHead(cache)
    kls, changes, others = [], [], []
    for exact_states, other_states in zip(states.split(CHUNK), stored.split(CHUNK), strict=True):
        exact = head.logits(exact_states).double().log_softmax(dim=1)
        found = logits(other_states).double().log_softmax(dim=1)
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
    stored, scales = quantised(states, dtype)
    nothing, loss_mask = np.zeros(length, np.int64), np.arange(length) < length - 1
    with cf.CacheWriter(path, metadata, head=contents) as writer:
        for i, ids in enumerate(input_ids):
            here = slice(i * length, (i + 1) * length)
            zeros = np.zeros(length, np.float32)
            entries = cf.SparseTargets(nothing, np.zeros(0, np.int64), np.zeros(0, np.float32), nothing, zeros, zeros)
            row_states = cf.HiddenStates(
                np.ones(length, bool),
                {last: stored[here].numpy()},
                {} if scales is None else {last: scales[here].numpy()},
            )
            row = cf.CacheRow(i, ids, loss_mask, np.array([length]), entries)
            writer.write([replace(row, hidden=row_states)])
    return cf.open_cache(path)


def _losses(states: Tensor, head: Head) -> dict[str, object]:
    """Forward and backward of head and loss of a student of this width, for each kind of targets."""
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
