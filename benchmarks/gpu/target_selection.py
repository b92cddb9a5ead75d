"""Selection of targets from logits alone, by the Triton kernels and by plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from benchmarks.counted_kernels import plain_torch
from benchmarks.gpu.bench import Bench
from benchmarks.measure import Table, Value
from pipeline.models.devices import kernels
from pipeline.teacher.engines.chunked_selection import chunk_positions
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import sparse_targets

RULES = {"top-64": TargetRule(top_k=64), "threshold": TargetRule(), "random": TargetRule(kind="random")}

T = TypeVar("T")


def selection(bench: Bench) -> list[Table]:
    """One chunk of float32 logits. Two reads of them are needed; a copy reads and writes them once."""
    columns = ["V", "targets", "way", "milliseconds", "time/copy"]
    found: list[list[Value]] = []
    for shape in bench.sizes.teachers:
        n = chunk_positions(shape.vocab)
        logits = 3 * torch.randn(n, shape.vocab, device=bench.device)
        scratch = torch.empty_like(logits)
        copy = bench.seconds(lambda to=scratch, source=logits: to.copy_(source))
        for name, rule in RULES.items():
            uniforms = torch.rand(n, rule.uniforms, device=bench.device, dtype=torch.float64) if rule.uniforms else None

            def select(logits=logits, rule=rule, uniforms=uniforms, scratch=scratch) -> object:  # type: ignore[no-untyped-def]
                return sparse_targets(logits, rule, uniforms, scratch)

            ways: dict[str, Callable[[], object]] = {"plain torch": lambda select=select: without_triton(select)}
            if kernels.kernels_on(bench.device) is not None:
                ways["Triton"] = select
            for way, run in ways.items():
                seconds = bench.seconds(run)
                found.append([shape.vocab, name, way, seconds * 1e3, seconds / copy])
    return [Table("Selection of one chunk", columns, found)]


def without_triton(run: Callable[[], T]) -> T:
    with plain_torch():
        return run()
