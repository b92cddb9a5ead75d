"""`make bench-gpu`: both stages on one CUDA device, beside what its products and its memory can do.

    card         rate of a large bf16 product and of a large copy: the bounds of everything below
    capture      `cache_teacher` with random teachers, compared with the forward pass and the head's product alone
    training     `train_student`, compared with transformers' cross-entropy in the same loop
    head         fused head and loss alone, compared with plain cross-entropy, and with Liger and
                 cut-cross-entropy where they are installed
    selection    targets from logits alone, compared with what copying the logits once takes
    loader       batches from the cache without a model

Head and selection are measured with the Triton kernels and without; everything else takes them if they work on this
card, which the settings of the results say.

Random weights cost what trained ones do, except that sampled targets have nearly the same number of entries at every
position. Results are written after every part, so that an interrupted run leaves those that it has. About ten minutes
on an H100 or faster; `--quick` runs everything tiny on any device, as a smoke test.

    python -m benchmarks.gpu
"""

from __future__ import annotations

import gc
import importlib.util
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

import cache_format as cf
import distill
from benchmarks import measure
from benchmarks.gpu_selection import selection, without_triton
from benchmarks.measure import Result, Table, Value
from benchmarks.shapes import EIGHT, ONE, SMALL, TINY, TINY_TEACHER, Shape
from pipeline.losses import SparseTargetBatch, fused_head_loss
from pipeline.models.devices import kernels
from pipeline.models.head import open_head
from pipeline.models.isolation.document_attention import Documents
from pipeline.models.isolation.padding_free import without_padding
from pipeline.models.padding import pad_rows

RESULTS = Path(__file__).parent / "results"
TARGETS: dict[str, dict[str, Any]] = {"top-64": {"targets": "top-k", "top_k": 64}, "threshold": {}}
BF16 = torch.bfloat16


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


def capture(bench: Bench) -> list[Table]:
    columns = ["teacher", "row tokens", "targets", "encoding", "tokens/s", "forward and head, tokens/s", "capture/bare"]
    columns += ["share of the product's rate", "bytes/token", "peak GB"]
    found: list[list[Value]] = []
    sizes = bench.sizes
    for shape in sizes.teachers:
        model = shape.model(bench.device, BF16, max(sizes.row_tokens) + 1)
        tokenizer = shape.tokenizer()
        for row_tokens in sizes.row_tokens:
            rows = bench.rows(shape, row_tokens, sizes.cached_tokens // (1 if shape is sizes.teachers[0] else 2))
            mean_length = statistics.mean(len(row["input_ids"]) for row in rows)
            batch = max(1, sizes.pass_tokens // row_tokens)
            bare = _bare(bench, model, shape, rows, row_tokens, batch)
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
                    share = speed * shape.forward_flops(mean_length) / bench.flops
                    cells: list[Value] = [shape.name, row_tokens, name, encoding, speed, bare, bare / speed, share]
                    found.append([*cells, summary.bytes / summary.tokens, peak[0]])
        del model
    return [Table("Capture", columns, found)]


@torch.inference_mode()
def _bare(
    bench: Bench, model: PreTrainedModel, shape: Shape, rows: list[dict[str, list[int]]], row_tokens: int, batch: int
) -> float:
    """Tokens per second of the forward pass and the head's product over the same documents, one batch of full rows."""
    head = open_head(model, shape.vocab)
    head = without_padding(head, row_tokens, wanted=None, device=bench.device)
    packed, lengths, filled = [], [], 0
    for row in rows:
        lengths.append(min(len(row["input_ids"]), row_tokens - filled))
        filled += lengths[-1]
        if filled == row_tokens:
            packed.append(_Row(np.ones(row_tokens, np.int64), np.array(lengths)))
            lengths, filled = [], 0
    packed = packed[:batch]
    inputs = [each.to(bench.device) for each in pad_rows(packed)]
    documents = Documents.of_rows(packed).to(bench.device)

    def run() -> None:
        hidden = head.hidden_states(*inputs, documents=documents).flatten(0, 1)
        for start in range(0, len(hidden), 1024):
            head.logits(hidden[start : start + 1024])

    return inputs[0].numel() / bench.seconds(run)


@dataclass(frozen=True)
class _Row:
    input_ids: np.ndarray
    segment_lengths: np.ndarray


def training(bench: Bench) -> list[Table]:
    columns = ["student", "trained with", "tokens/s", "share of the product's rate", "peak GB"]
    found: list[list[Value]] = []
    sizes, row_tokens = bench.sizes, bench.sizes.row_tokens[0]
    batch = max(1, sizes.step_tokens // row_tokens)
    for shape in sizes.students:
        cache, mean_length = _cache_for(bench, shape, row_tokens)
        flops = shape.training_flops(mean_length)
        for way in ("cross-entropy, plain loop", "distill"):
            model = shape.model(bench.device, torch.float32, row_tokens + 1)
            with bench.peak_memory() as peak:
                speed = (_plain if "plain" in way else _distilled)(bench, model, shape, cache, batch)
            found.append([shape.name, way, speed, speed * flops / bench.flops, peak[0]])
            del model
    return [Table("Training", columns, found)]


def _cache_for(bench: Bench, shape: Shape, row_tokens: int) -> tuple[Path, float]:
    """A cache of the student's own top-64 entries: it costs what a larger teacher's would."""
    output = bench.scratch / f"cache-{shape.name}"
    rows = bench.rows(shape, row_tokens, bench.sizes.cached_tokens)
    if not output.exists():
        model = shape.model(bench.device, BF16, row_tokens + 1)
        options = {"seq_len": row_tokens, "tokenizer": shape.tokenizer(), "device": str(bench.device)}
        distill.cache_teacher(model, rows, output, **options, **TARGETS["top-64"])
    return output, statistics.mean(len(row["input_ids"]) for row in rows)


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


def head(bench: Bench) -> list[Table]:
    columns = ["head", "V", "way", "milliseconds", "time/plain", "share of the product's rate", "peak GB"]
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
    if kernels.triton_kernels(hidden.device) is not None:
        found["distill, top-64, without Triton"] = lambda: without_triton(found["distill, top-64"])
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger cross-entropy"] = lambda: liger(weight, hidden, labels)
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy"] = lambda: linear_cross_entropy(hidden, weight, labels)
    return found


def loader(bench: Bench) -> list[Table]:
    """Batches as training gets them, without a model."""
    from torch.utils.data import DataLoader

    from pipeline.student.data.dataset import CacheDataset, to_device

    columns = ["encoding", "workers", "tokens/s"]
    found: list[list[Value]] = []
    shape, row_tokens = bench.sizes.students[0], bench.sizes.row_tokens[0]
    source, _ = _cache_for(bench, shape, row_tokens)
    packed = bench.scratch / "packed"
    for _ in cf.convert_cache(source, packed, cf.Conversion(encoding="packed")):
        pass
    batch = max(1, bench.sizes.step_tokens // row_tokens)
    for encoding, path in (("columns", source), ("packed", packed)):
        for workers in (0, 2, 4, 8):
            dataset = CacheDataset(cf.open_cache(path))
            batches = DataLoader(
                dataset,
                batch_size=batch,
                sampler=dataset.sampler(seed=0),
                collate_fn=dataset.collate,
                num_workers=workers,
                pin_memory=bench.device.type == "cuda",
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


PARTS = {
    "card": card,
    "capture": capture,
    "selection": selection,
    "training": training,
    "head": head,
    "loader": loader,
}


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)))
@click.option(
    "--quick", is_flag=True, help="Use tiny sizes on any device. The numbers mean nothing and are not recorded."
)
@click.option(
    "--results", type=click.Path(path_type=Path), help="Directory for the results [default: benchmarks/results]"
)
def main(parts: tuple[str, ...], quick: bool, results: Path | None) -> None:
    """Measure both stages on a CUDA device. Example: python -m benchmarks.gpu card capture"""
    if not torch.cuda.is_available() and not quick:
        raise click.ClickException("no CUDA device: this benchmark needs one. `--quick` runs it tiny on a CPU.")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    directory = results or (None if quick else RESULTS)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(device=device, sizes=QUICK if quick else Sizes(), scratch=Path(scratch))
        for name in dict.fromkeys(("card", *(parts or PARTS))):
            try:
                bench.tables += PARTS[name](bench)
            except torch.OutOfMemoryError as error:
                click.echo(f"{name}: out of memory: {error}", err=True)
            result = _result(bench)
            if directory is not None:
                measure.write(result, directory, "python -m benchmarks.gpu")
        measure.show(result)


def _result(bench: Bench) -> Result:
    shares = {
        f"{table.title.split(',')[0].lower()}_share": round(
            max(float(row[table.columns.index(RATE)]) for row in table.rows), 3
        )
        for table in bench.tables
        if RATE in table.columns
    }
    return Result(
        name="gpu",
        question="Both stages on one GPU: tokens per second, and the share of what its products and its memory can do.",
        bound="the rate of a large bf16 product on the same card, over the operations that the models need.",
        settings={
            "row_tokens_in_training": bench.sizes.row_tokens[0],
            "tokens_per_step": bench.sizes.step_tokens,
            "triton_kernels": kernels.triton_kernels(bench.device) is not None,
        },
        tables=bench.tables,
        summary={"tflops": round(bench.flops / 1e12, 1), "tb_per_s": round(bench.bandwidth / 1e12, 2), **shares},
    )


RATE = "share of the product's rate"

if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gpu")
