"""Head and loss alone, compared with plain cross-entropy, and with Liger and cut-cross-entropy where installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.bench import BF16, RATE, Bench
from benchmarks.gpu.target_selection import without_triton
from benchmarks.measure import Table, Value
from benchmarks.shapes import Shape
from pipeline.losses import SparseTargetBatch, fused_head_loss
from pipeline.models.devices import kernels


def head(bench: Bench) -> list[Table]:
    columns = ["head", "V", "way", "milliseconds", "time/plain", RATE, "peak GB"]
    found: list[list[Value]] = []
    for shape in bench.sizes.students:
        hidden, weight, targets = _head_inputs(bench, shape)
        flops = 6 * len(hidden) * shape.width * shape.vocab
        plain = float("nan")
        for name, loss in _losses(hidden, weight, targets).items():

            def step(loss: Callable[[], Tensor] = loss, given: tuple[Tensor, ...] = (hidden, weight)) -> None:
                for each in given:
                    each.grad = None
                loss().backward()

            with bench.peak_memory() as peak:
                seconds = bench.seconds(step)
            plain = seconds if name == "plain cross-entropy" else plain
            cells: list[Value] = [f"D = {shape.width}", shape.vocab, name, seconds * 1e3, seconds / plain]
            found.append([*cells, flops / seconds / bench.flops, peak[0]])
    return [Table(f"Head and loss alone, forward and backward, N = {bench.sizes.head_positions:,}", columns, found)]


def _head_inputs(bench: Bench, shape: Shape, entries: int = 64) -> tuple[Tensor, Tensor, Any]:
    n, device = bench.sizes.head_positions, bench.device
    torch.manual_seed(0)
    hidden = torch.randn(n, shape.width, device=device).to(BF16).requires_grad_()
    weight = (torch.randn(shape.vocab, shape.width, device=device) * shape.width**-0.5).to(BF16).requires_grad_()
    step = shape.vocab // entries
    targets = SparseTargetBatch(
        ids=torch.randint(step, (n, entries), device=device) + torch.arange(entries, device=device) * step,
        logprobs=torch.randn(n, entries, device=device).log_softmax(1) - 0.12,
        residual_logprob=torch.full((n,), 1 - float(np.exp(-0.12)), device=device).log(),
        labels=torch.randint(shape.vocab, (n,), device=device),
    )
    return hidden, weight, targets


def _losses(hidden: Tensor, weight: Tensor, targets: Any) -> dict[str, Callable[[], Tensor]]:
    labels = targets.labels
    found: dict[str, Callable[[], Tensor]] = {
        "plain cross-entropy": lambda: functional.cross_entropy((hidden @ weight.T).float(), labels),
        "distill, top-64": lambda: fused_head_loss(hidden, weight, None, targets, kd_weight=0.9),
    }
    if kernels.kernels_on(hidden.device) is not None:
        found["distill, top-64, without Triton"] = lambda: without_triton(found["distill, top-64"])
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger cross-entropy"] = lambda: liger(weight, hidden, labels)
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy"] = lambda: linear_cross_entropy(hidden, weight, labels)
    return found
