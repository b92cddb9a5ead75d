"""Memory traffic of head and loss on a GPU, counted without one, and the training speed that it allows.

The walk of `pipeline.losses.fused` runs on the meta device, and a dispatch mode adds up what every operation reads and
writes: each input once, each result once, what selects by an index only what it selects; views are free. `before` sums
products in bfloat16 and takes 512 positions at a time, `after` sums them in float32 and takes as many as the default on
a GPU, both in plain torch; `kernels` is `after` with the Triton kernels, which move what their code says
(`benchmarks.counted_kernels`).

Predicted, not measured: a token of a student with P parameters costs 6·P FLOP at 4·10^14 FLOP/s (an H100 at 40 %), and
the traffic of its head at 3.35·10^12 bytes/s. The products of the head are among the 6·P.

    python -m benchmarks loss_counts
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.counted_kernels import counted_kernels, plain_torch
from benchmarks.measure import Result, Settings, Table
from pipeline.losses import DistillLoss, RaggedTargets, SparseTargetBatch, fused_head
from pipeline.losses.fused import chunk_positions
from pipeline.models.devices import products

ENTRIES, CHUNKS, OLD_CHUNK = 64, 4, 512
FLOPS, BANDWIDTH = 4e14, 3.35e12
BOUND = 18
STUDENTS = {"0.1 B": (1e8, 576, 49_152), "1 B": (1e9, 2048, 128_256), "8 B": (8e9, 4096, 128_256)}  # P, D, V
LOSSES = {"forward KL": {}, "forward KL at T = 2": {"temperature": 2.0}, "js": {"divergence": "js"}}

aten = torch.ops.aten
SELECTS = {aten.gather.default: 2, aten.scatter_.value: 2, aten.scatter_add_.default: 2, aten.index_select.default: 2}
WRITES_ONLY = {aten.copy_.default, aten.fill_.Scalar, aten.zero_.default}
FREE = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.detach.default}
FREE |= {aten.alias.default}


@dataclass
class Traffic(TorchDispatchMode):
    """Bytes moved of logits [n, V] and of matrices [V, D], and the number of operations on logits."""

    vocab: int
    width: int
    logits: int = 0
    weights: int = 0
    operations: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or func in FREE:
            return result
        if func in SELECTS:
            return result  # K numbers of V
        moved = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        moved += [x for x in tree_leaves(args[func in WRITES_ONLY :]) if isinstance(x, Tensor)]
        logits = [x for x in moved if x.dim() == 2 and self.vocab in x.shape and self.width not in x.shape]
        self.logits += sum(x.numel() * x.element_size() for x in logits)
        self.operations += bool(logits)
        matrices = [x for x in moved if sorted(x.shape) == sorted((self.vocab, self.width))]
        self.weights += sum(x.numel() * x.element_size() for x in matrices)
        return result

    def count(self, name: str, read: int, written: int) -> None:
        """A kernel on logits."""
        self.logits += read + written
        self.operations += 1


def run(settings: Settings) -> Result:
    rows, speeds, summary = [], [], {}
    for name, (parameters, width, vocab) in STUDENTS.items():
        new_chunk = chunk_positions(SparseTargetBatch, torch.device("meta"), vocab)  # type: ignore[arg-type]
        for loss, options in LOSSES.items():
            for when, chunk in (("before", OLD_CHUNK), ("after", new_chunk), ("kernels", new_chunk)):
                found = traffic(
                    width, vocab, chunk, wide=when != "before", by_kernels=when == "kernels", options=options
                )
                positions = CHUNKS * chunk
                per_logit = found.logits / (positions * vocab)
                per_weight = found.weights / (CHUNKS * vocab * width)
                per_token = (found.logits + found.weights) / positions
                rows.append(
                    [name, loss, when, chunk, found.operations / CHUNKS, per_logit, per_weight, per_token / 1e6]
                )
                if loss == "forward KL":
                    seconds = per_token / BANDWIDTH
                    share = seconds / (seconds + 6 * parameters / FLOPS)
                    speeds.append([name, when, FLOPS / (6 * parameters), 1 / (seconds + 6 * parameters / FLOPS), share])
                    summary[f"bytes_per_logit_{when}"] = round(per_logit, 1)
                    summary[f"bytes_per_weight_{when}"] = round(per_weight, 1)
    return Result(
        name="loss_counts",
        question="Bytes that head and loss move on a GPU under bfloat16 autocast; counted on the meta device.",
        bound=f"{BOUND} bytes per logit: the product writes float32 (4), the log-sum-exp reads it (4), the gradient "
        "reads it and writes bfloat16 (4 + 2), two products read that (2 + 2); 8 per weight and chunk.",
        settings={"entries K": ENTRIES, "chunks": CHUNKS, "FLOP/s": FLOPS, "bytes/s": BANDWIDTH},
        tables=[
            Table(
                "Traffic",
                ["student", "loss", "", "chunk", "operations/chunk", "bytes/logit", "bytes/weight/chunk", "MB/token"],
                rows,
            ),
            Table(
                "Predicted tokens/s on an H100 (not measured): 1 / (6·P/4e14 + bytes per token/3.35e12)",
                ["student", "", "products alone", "tokens/s", "share of the traffic"],
                speeds,
            ),
        ],
        summary=summary,
    )


def traffic(width: int, vocab: int, chunk: int, *, wide: bool, by_kernels: bool, options: dict[str, Any]) -> Traffic:
    """Of `CHUNKS` chunks of loss tokens, both ways, without the pass that multiplies by the gradient of the loss."""
    n = CHUNKS * chunk
    hidden = torch.empty(n, width, device="meta", requires_grad=True)
    weight = torch.empty(vocab, width, device="meta", requires_grad=True)
    found = Traffic(vocab, width)
    with _as_a_gpu(wide), counted_kernels(found.count) if by_kernels else plain_torch(), found:
        fused_head(
            hidden, weight, None, _targets(n), DistillLoss(kd_weight=0.9, **options), scale=1.0, chunk_size=chunk
        )
    return found


def _targets(n: int) -> RaggedTargets:
    def of(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return RaggedTargets(
        ids=of(n * ENTRIES, dtype=torch.int16),
        logprobs=of(n * ENTRIES, dtype=torch.float32),
        starts=of(n),
        counts=of(n, dtype=torch.int32),
        exact_counts=of(n, dtype=torch.int32),
        residual_logprob=of(n, dtype=torch.float32),
        entropy=of(n, dtype=torch.float32),
        labels=of(n),
        loss_tokens=of(n),
        width=ENTRIES,
    )


@contextlib.contextmanager
def _as_a_gpu(wide: bool) -> Iterator[None]:
    """Autocast to bfloat16, which torch does not offer for the meta device; products as CUDA has them if `wide`."""
    with (
        mock.patch.object(torch, "is_autocast_enabled", lambda kind="cuda": True),
        mock.patch.object(torch, "get_autocast_dtype", lambda kind="cuda": torch.bfloat16),
        mock.patch.object(products, "writes_wide_sums", lambda factor, out: wide),
        mock.patch.object(products, "adds_wide_sums", lambda device, dtype: wide),
    ):
        yield
