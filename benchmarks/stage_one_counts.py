"""What stage one asks of a GPU, counted on a simulated one: waits of the host, copies, kernels, bytes for each logit.

    python -m benchmarks stage_one_counts

Nothing is measured: every operation of the real code is run on shapes alone (`benchmarks.simulated_gpu`). A kernel
reads its inputs and writes its outputs once. Bytes count where n·V numbers are touched, n the positions of a chunk; of
the product only the logits that it writes.

Bound: the product writes fp32 logits (4 bytes), and two reads of them are needed: one for the maximum, the sum of
exponentials and the block maxima, one for the block sums of the tail. 12 bytes for each logit.

The predictions take the data sheet of an H100 SXM (989 TFLOP/s bf16 dense, 3.35 TB/s) at full efficiency, so they are
bounds as well:

    body        2 · (parameters without embeddings) FLOP for each token
    head        2 · D · V FLOP for each token
    selection   bytes for each logit · V for each token
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.counted_kernels import counted_kernels, plain_torch
from benchmarks.measure import Result, Settings, Table
from benchmarks.simulated_gpu import DEVICE, Operation, SimulatedGpu, simulated_gpu
from pipeline.models.head import Head
from pipeline.teacher.engines.chunked_selection import chunk_positions
from pipeline.teacher.engines.interface import RowRequest
from pipeline.teacher.engines.transformers_engine import TransformersEngine
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import sparse_targets
from pipeline.teacher.text.packing import TokenRow

RULES = {
    "top-64": TargetRule(top_k=64),
    "top-p": TargetRule(kind="top-p"),
    "threshold": TargetRule(),
    "random": TargetRule(kind="random"),
}
ROWS, ROW_TOKENS, VOCAB, WIDTH = 8, 1024, 128_256, 4096
BOUND = 12
FLOPS, BANDWIDTH = 989e12, 3.35e12

# The same counts before stage one was changed for GPUs (chunks of 256 positions, logits rounded to bf16).
BEFORE = {"top-64": (5, 4), "top-p": (5, 4), "threshold": (37, 36), "random": (37, 36)}


@dataclass(frozen=True)
class Teacher:
    """Shape of a Llama 3."""

    name: str
    body: float  # parameters without embeddings and head
    width: int


TEACHERS = (Teacher("1B", 0.97e9, 2048), Teacher("8B", 6.98e9, 4096), Teacher("70B", 68.5e9, 8192))


def run(settings: Settings) -> Result:
    batches, chunks = [], []
    bytes_of: dict[str, list[float]] = {}
    for name, rule in RULES.items():
        gpu = _batch(rule, 1 if settings.quick else ROWS)
        waits, uploads = BEFORE[name]
        batches.append([name, waits, len(gpu.synchronisations), uploads, gpu.uploads, gpu.downloads])
        ways = [_chunk(rule, rounded=True), _chunk(rule), _chunk(rule, by_kernels=True)]
        bytes_of[name] = [each.bytes_per_logit for each in ways]
        chunks.append([name, *(each.kernels for each in ways), *(each.per_batch for each in ways)])
        chunks[-1] += [*bytes_of[name], bytes_of[name][-1] / BOUND]
    waits_now = max(row[2] for row in batches)
    batch = f"batch of {ROWS} rows of {ROW_TOKENS:,}"
    return Result(
        name="stage_one_counts",
        question="How often does the host wait for the GPU in stage one, and how much memory is moved for each logit?",
        bound=f"0 waits; 1 upload for each batch; {BOUND} bytes for each logit: written by the product, read twice.",
        settings={"rows": ROWS, "row_tokens": ROW_TOKENS, "vocab": VOCAB, "width": WIDTH},
        tables=[
            Table(
                f"Counts for a {batch}",
                ["targets", "waits before", "waits", "uploads before", "uploads", "downloads"],
                batches,
            ),
            Table(
                "Head and selection of a chunk",
                [
                    *("targets", "kernels before", "kernels", "kernels with Triton"),
                    *(f"kernels per 1,024 positions{which}" for which in (" before", "", " with Triton")),
                    *("bytes/logit before", "bytes/logit", "bytes/logit with Triton", "bytes with Triton/bound"),
                ],
                chunks,
            ),
            Table(
                "Predicted bounds on an H100, threshold; not measured on a GPU",
                [
                    "teacher",
                    "body, µs/token",
                    "head, µs/token",
                    "selection, µs/token",
                    "selection with Triton, µs/token",
                    "tokens/s",
                    "tokens/s with Triton",
                    "at the bound, tokens/s",
                ],
                [_predicted(teacher, *bytes_of["threshold"][1:]) for teacher in TEACHERS],
            ),
        ],
        summary={
            "waits": waits_now,
            "bytes_per_logit_threshold": round(bytes_of["threshold"][1], 1),
            "bytes_per_logit_threshold_triton": round(bytes_of["threshold"][2], 1),
        },
        conclusion="Every line of the predictions is parameters · 2 / 989 TFLOP/s, D · V · 2 / 989 TFLOP/s and "
        "V · bytes/logit / 3.35 TB/s; tokens/s is one over their sum.",
    )


def _batch(rule: TargetRule, rows: int) -> SimulatedGpu:
    """Counts of one forward pass and its targets. The body is small: what it asks for depends on the model alone."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    rng = np.random.default_rng(0)
    stored, documents = np.ones(ROW_TOKENS, bool), np.array([ROW_TOKENS // 2] * 2, np.int32)
    requests = [
        RowRequest(
            index=i,
            row=TokenRow(rng.integers(3, VOCAB, ROW_TOKENS, dtype=np.int32), stored, documents),
            place=i,
            stored=stored,
        )
        for i in range(rows)
    ]
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    with simulated_gpu(shapes_only=True) as gpu:
        head = Head(model=gpu.to_device(model), linear=True, vocab_size=VOCAB)
        engine = TransformersEngine(head, device=DEVICE, batch_size=rows)
        gpu.reset()
        engine.run(requests, [rule])
    return gpu


@dataclass(frozen=True)
class _Counts:
    kernels: int
    per_batch: float  # kernels for 1,024 positions
    bytes_per_logit: float


def _chunk(rule: TargetRule, *, rounded: bool = False, by_kernels: bool = False) -> _Counts:
    """Counts of the head and of the selection of one chunk.

    Args:
        rounded: as before: 256 positions, logits in bf16 that are widened again.
        by_kernels: selection by the Triton kernels.
    """
    n = 256 if rounded else chunk_positions(VOCAB)

    def tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=DEVICE)

    with simulated_gpu(shapes_only=True) as gpu, torch.no_grad():

        def count(name: str, read: int, written: int) -> None:
            gpu.operations.append(Operation(name, read, written, n * VOCAB))

        hidden, weight = tensor(n, WIDTH, dtype=torch.bfloat16), tensor(VOCAB, WIDTH, dtype=torch.bfloat16)
        logits = tensor(n, VOCAB, dtype=torch.bfloat16 if rounded else torch.float32)
        scratch = tensor(n, VOCAB, dtype=torch.float32)
        uniforms = tensor(n, rule.uniforms, dtype=torch.float64) if rule.uniforms else None
        gpu.reset()
        if rounded:
            torch.mm(hidden, weight.T, out=logits)
        else:
            torch.mm(hidden, weight.T, out_dtype=torch.float32, out=logits)
        product = gpu.operations.pop()
        with counted_kernels(count) if by_kernels else plain_torch():
            sparse_targets(logits, rule, uniforms, scratch)
    kernels = gpu.kernels + 1
    moved = gpu.bytes_of(at_least=n * VOCAB // 2) + product.written
    return _Counts(kernels, kernels * 1024 / n, moved / (n * VOCAB))


def _predicted(teacher: Teacher, plain: float, by_kernels: float) -> list[str | int | float]:
    """
    Args:
        plain, by_kernels: bytes for each logit.
    """
    body, head = 2 * teacher.body / FLOPS, 2 * teacher.width * VOCAB / FLOPS
    selections = [VOCAB * each / BANDWIDTH for each in (plain, by_kernels, BOUND)]
    speeds = [1 / (body + head + each) for each in selections]
    return [teacher.name, body * 1e6, head * 1e6, *(each * 1e6 for each in selections[:2]), *speeds]
