"""The fused head and loss, compared with transformers' cross-entropy on the full logits.

    plain      F.linear(hidden, weight), then transformers' ForCausalLMLoss, then backward: cross-entropy only
    fused      pipeline.losses.fused_head_loss, 64 entries per position, then backward: KL and cross-entropy, or KL

Both start from the same hidden states [N, D] and end with the gradients of hidden states and weight. Time: interleaved
rounds. Memory: one process per variant; the peak resident size during one step, minus the size before it and minus the
two gradients that both variants return. (Plain cross-entropy peaks before its weight gradient exists, so subtracting it
favours the plain variant.)

Bound: three matrix products, 6·N·D·V floating-point operations, at the rate that this machine reaches for these
products alone, 1,024 positions at a time into allocated memory.

    python -m benchmarks fused_loss
"""

from __future__ import annotations

import functools
import gc
import math
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import psutil
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from benchmarks.measure import Result, Settings, Table, interleave, ratio, spread
from pipeline.losses import SparseTargetBatch, fused_head_loss

HIDDEN, ENTRIES, KD_WEIGHT = 576, 64, 0.9  # D and K of SmolLM2-135M and of the demo
SIZES = ((49_152, 2048), (49_152, 4096), (128_256, 2048))  # vocabulary, positions
QUICK_SIZES = ((8_192, 512),)
CHUNKS, QUICK_CHUNKS = (128, 256, 512, 1024), (128, 512)
PRODUCT_ROWS = 1024

Step = Callable[[], object]


def run(settings: Settings) -> Result:
    rows, chunk_rows, summary = [], [], {}
    for vocab, positions in QUICK_SIZES if settings.quick else SIZES:
        times = interleave(_timed(vocab, positions), settings.rounds)
        plain_bytes = extra_bytes("plain", vocab, positions)
        fused_bytes = extra_bytes("mix", vocab, positions)
        fastest = min(times["products"])
        gflops = 6 * positions * HIDDEN * vocab / fastest / 1e9
        for name, what in (("mix", "KL + CE"), ("kl", "KL only")):
            time_ratio, memory_ratio = ratio(times, name, "plain"), fused_bytes / plain_bytes
            rows.append(
                [vocab, positions, what, time_ratio, spread(times, name, "plain"), ratio(times, name, "products")]
                + [ratio(times, "plain", "products"), gflops, memory_ratio, fused_bytes / 1e6, plain_bytes / 1e6]
            )
            summary |= {f"time_ratio_{name}_{vocab}_{positions}": round(time_ratio, 3)}
        summary |= {f"memory_ratio_{vocab}_{positions}": round(fused_bytes / plain_bytes, 3)}
    for vocab, positions in QUICK_SIZES if settings.quick else (SIZES[0], SIZES[-1]):
        chunks = QUICK_CHUNKS if settings.quick else CHUNKS
        times = interleave(_chunked(vocab, positions, chunks), settings.rounds)
        plain_bytes = extra_bytes("plain", vocab, positions)
        for size in chunks:
            used = extra_bytes("mix", vocab, positions, size)
            time_ratio = ratio(times, str(size), "plain")
            chunk_rows.append([vocab, positions, size, time_ratio, used / plain_bytes, used / 1e6])
    columns = ["V", "N", "fused loss", "time/plain", "range", "time/bound", "plain/bound", "GFLOP/s"]
    columns += ["memory/plain", "fused MB", "plain MB"]
    chunk_columns = ["V", "N", "chunk", "time/plain", "memory/plain", "extra MB"]
    return Result(
        name="fused_loss",
        question="Fused head and distillation loss ÷ transformers' cross-entropy; forward and backward, float32.",
        bound="the three matrix products of head and gradients alone, 6·N·D·V operations, at their measured rate.",
        settings={
            "hidden width D": HIDDEN,
            "entries K": ENTRIES,
            "chunk": SparseTargetBatch.CHUNK_POSITIONS,
            "rounds": settings.rounds,
        },
        tables=[Table("Fused compared with plain", columns, rows), Table("Chunk size", chunk_columns, chunk_rows)],
        summary=summary,
    )


@functools.cache
def extra_bytes(step: str, vocab: int, positions: int, chunk: int = SparseTargetBatch.CHUNK_POSITIONS) -> int:
    """Peak memory of one step beyond inputs and gradients, measured in a new process."""
    command = [sys.executable, "-m", "benchmarks.fused_loss", step, str(vocab), str(positions), str(chunk)]
    root = Path(__file__).parents[1]
    return int(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout)


def _timed(vocab: int, positions: int) -> dict[str, Step]:
    hidden, weight, targets = _inputs(vocab, positions)
    steps = {name: _step(name, hidden, weight, targets) for name in ("plain", "mix", "kl")}
    return {**steps, "products": _products(hidden.detach(), weight.detach())}


def _chunked(vocab: int, positions: int, chunks: Sequence[int]) -> dict[str, Step]:
    hidden, weight, targets = _inputs(vocab, positions)
    steps = {str(size): _step("mix", hidden, weight, targets, size) for size in chunks}
    return {"plain": _step("plain", hidden, weight, targets), **steps}


def _inputs(vocab: int, positions: int) -> tuple[Tensor, Tensor, SparseTargetBatch]:
    """Random inputs on the scale of a language model's; the cost does not depend on the values."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, HIDDEN, generator=generator)
    weight = torch.randn(vocab, HIDDEN, generator=generator) * (2 / HIDDEN**0.5)
    exact_mass = 0.88
    logprobs = torch.log_softmax(2 * torch.randn(positions, ENTRIES, generator=generator), dim=1) + math.log(exact_mass)
    step = vocab // ENTRIES
    ids = torch.randint(step, (positions, ENTRIES), generator=generator) + torch.arange(ENTRIES) * step
    targets = SparseTargetBatch(
        ids=ids,
        logprobs=logprobs,
        residual_logprob=torch.full((positions,), 1 - exact_mass).log(),
        labels=torch.randint(vocab, (positions,), generator=generator),
    )
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def _step(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    targets: SparseTargetBatch,
    chunk: int = SparseTargetBatch.CHUNK_POSITIONS,
) -> Step:
    """Forward and backward of the first micro-batch of an optimizer step; leaves the gradients on the tensors."""

    def plain() -> Tensor:
        logits = F.linear(hidden, weight)
        return ForCausalLMLoss(logits, labels=None, vocab_size=len(weight), shift_labels=targets.labels)

    def fused() -> Tensor:
        kd_weight = KD_WEIGHT if name == "mix" else 1.0
        return fused_head_loss(hidden, weight, None, targets, kd_weight=kd_weight, chunk_size=chunk)

    def step() -> None:
        hidden.grad = weight.grad = None
        (plain if name == "plain" else fused)().backward()

    return step


def _products(hidden: Tensor, weight: Tensor) -> Step:
    logits = torch.zeros(PRODUCT_ROWS, len(weight))
    d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros_like(weight)

    def products() -> None:
        for start in range(0, len(hidden), PRODUCT_ROWS):
            states = hidden[start : start + PRODUCT_ROWS]
            chunk = logits[: len(states)]
            torch.mm(states, weight.T, out=chunk)
            torch.mm(chunk, weight, out=d_hidden[start : start + PRODUCT_ROWS])
            torch.mm(chunk.T, states, out=d_weight)

    return products


class _PeakMemory:
    """Peak resident bytes while the block runs, minus those at its start."""

    def __enter__(self) -> _PeakMemory:
        gc.collect()
        self._process = psutil.Process()
        self._start = self._peak = self._process.memory_info().rss
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()
        return self

    def _sample(self) -> None:
        # Filling any tensor that matters takes longer than a millisecond.
        while not self._done.wait(0.001):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._sampler.join()
        self.bytes = max(self._peak, self._process.memory_info().rss) - self._start


@click.command()
@click.argument("step")
@click.argument("vocab", type=int)
@click.argument("positions", type=int)
@click.argument("chunk", type=int)
def measure_memory(step: str, vocab: int, positions: int, chunk: int) -> None:
    """Print the bytes that one step needs beyond its inputs and gradients (what `extra_bytes` runs)."""
    small = _inputs(512, 64)
    _step(step, *small)()  # lets libraries allocate their own buffers
    hidden, weight, targets = _inputs(vocab, positions)
    with _PeakMemory() as memory:
        _step(step, hidden, weight, targets, chunk)()
    print(memory.bytes - sum(t.numel() * t.element_size() for t in (hidden, weight)))


if __name__ == "__main__":
    measure_memory()
