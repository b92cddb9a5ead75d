"""What every part of the benchmark shares: sizes, clock, peak of memory, and the bounds of the card."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import Table, Value
from benchmarks.shapes import EIGHT, ONE, SMALL, TINY, TINY_TEACHER, Shape

BF16 = torch.bfloat16
RATE = "share of the product's rate"
"""Column: operations that the models need per second, as a share of those of a large product."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    teachers: tuple[Shape, ...] = (ONE, EIGHT)
    students: tuple[Shape, ...] = (SMALL, ONE)
    row_tokens: tuple[int, ...] = (1024, 8192, 32_768)
    pass_tokens: int = 32_768  # of the rows of one forward pass in capture
    step_tokens: int = 16_384
    steps: int = 20
    cached_tokens: int = 262_144
    head_positions: int = 8192
    product: int = 8192


QUICK = Sizes(
    teachers=(TINY_TEACHER,),
    students=(TINY,),
    row_tokens=(64, 128),
    pass_tokens=256,
    step_tokens=256,
    steps=4,
    cached_tokens=2048,
    head_positions=128,
    product=256,
)


@dataclass(kw_only=True)
class Bench:
    """A run: where it measures, and what it has found."""

    device: torch.device
    sizes: Sizes
    scratch: Path
    tables: list[Table] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # part -> type and message of its error
    flops: float = float("nan")  # of a large product, per second
    bandwidth: float = float("nan")  # bytes read and written per second

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object], rounds: int = 5) -> float:
        """Median time of `run`, after one that is not counted."""
        times = []
        for _ in range(rounds + 1):
            self.wait()
            began = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    @contextmanager
    def peak_memory(self) -> Iterator[list[float]]:
        """Gigabytes at most inside the block; NaN elsewhere than on CUDA."""
        found = [float("nan")]
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        yield found
        if self.device.type == "cuda":
            found[0] = torch.cuda.max_memory_allocated(self.device) / 1e9

    def rows(self, shape: Shape, row_tokens: int, tokens: int) -> list[dict[str, list[int]]]:
        """Documents of random tokens, of 64 tokens up to a whole row."""
        rng = np.random.default_rng(0)
        documents = []
        while tokens > 0:
            length = int(rng.integers(min(64, row_tokens // 2), row_tokens))
            documents.append({"input_ids": rng.integers(2, shape.vocab, length).tolist()})
            tokens -= length
        return documents


def card(bench: Bench) -> list[Table]:
    n = bench.sizes.product
    left, right = (torch.randn(n, n, device=bench.device).to(BF16) for _ in range(2))
    bench.flops = 2 * n**3 / bench.seconds(lambda: left @ right)
    source = torch.empty(n * n * 4, dtype=torch.float32, device=bench.device)
    target = torch.empty_like(source)
    bench.bandwidth = 2 * source.nbytes / bench.seconds(lambda: target.copy_(source))
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU"
    cells: list[Value] = [name, bench.flops / 1e12, bench.bandwidth / 1e12]
    return [Table("Card", ["device", f"bf16 product of {n} × {n}, TFLOP/s", "copy, TB/s"], [cells])]
