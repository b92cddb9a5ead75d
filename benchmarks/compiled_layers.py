"""Compiled layers (`compile` of both stages) compared with plain ones, on two copies of one model.

    teacher    a forward pass: the layers alone, then with head and top-64 targets as in `cache-teacher`
    student    forward and backward: the layers alone, then a step with fused loss and optimizer as in `train-student`

Both copies take turns on the same batch. Two rows of one document each, without padding. The models are some layers of
the teacher: all layers of a model share their compiled code, so that more of them change none of the ratios of layers.

Bound: the matrix products of the layers, which compiling does not change (nor does it change attention).

    python -m benchmarks compiled_layers
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch._inductor import config as inductor

import cache_format as cf
from benchmarks.measure import Result, Settings, Table, Value, interleave, ratio, spread
from benchmarks.teacher import describe, open_teacher
from benchmarks.text import token_rows
from pipeline.losses import DistillLoss
from pipeline.models.devices.compilation import CompiledLayers
from pipeline.models.head import Head, open_head
from pipeline.models.padding import model_inputs
from pipeline.student.data.dataset import Batch, CacheDataset
from pipeline.student.model.layer_selection import keep_layers
from pipeline.student.training.forward import distillation_output
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.engines.interface import RowRequest
from pipeline.teacher.engines.transformers_engine import TransformersEngine
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.packing import TokenRow

RULE, BATCH_ROWS, LAYERS = TargetRule(top_k=64), 2, 6

Work = Callable[[Head], Callable[[], object]]
"""What is timed, for one copy of the model."""


def run(settings: Settings) -> Result:
    row_tokens = 64 if settings.quick else 512
    teacher, tokenizer = open_teacher(settings.teacher)
    layers, vocab_size = min(LAYERS, teacher.config.num_hidden_layers), len(tokenizer)
    rows = token_rows(tokenizer, BATCH_ROWS, row_tokens)

    def copies(*, training: bool) -> list[Head]:
        return [open_head(keep_layers(teacher, layers).train(training), vocab_size) for _ in range(2)]

    teachers, students = copies(training=False), copies(training=True)
    with torch.inference_mode():
        of_teacher, first = _compare("teacher", teachers, _teacher_works(rows), rows.size, settings.rounds)
    batch = _batch(settings.teacher, rows)
    of_student, second = _compare("student", students, _student_works(batch), rows.size, settings.rounds)
    columns = ["", "plain, tokens/s", "compiled, tokens/s", "compiled ÷ plain, time", "range", "bound"]
    ratios = {"teacher": of_teacher[-1][3], "student": of_student[-1][3]}
    return Result(
        name="compiled_layers",
        question="Time of a model with compiled layers ÷ the same with plain layers, same batch.",
        bound="The products of the layers ÷ plain: compiling changes neither them nor attention, head and loss.",
        settings={
            "teacher": describe(teacher),
            "layers": layers,
            "rows": BATCH_ROWS,
            "row_tokens": row_tokens,
            "rounds": settings.rounds,
        },
        tables=[
            Table("Compiled layers compared with plain ones", columns, [*of_teacher, *of_student]),
            Table("Compiling", ["", "seconds, without torch's caches"], [["teacher", first], ["student", second]]),
        ],
        summary={f"time_ratio_{name}": round(float(found), 3) for name, found in ratios.items()},
    )


def _compare(
    name: str, heads: Sequence[Head], works: Mapping[str, Work], tokens: int, rounds: int
) -> tuple[list[list[Value]], float]:
    """A row of the table for each of `works`, and the seconds until the second of `heads` was compiled."""
    plain, compiled = heads
    products = _products(plain.body, tokens)
    table: list[list[Value]] = []
    began = time.perf_counter()
    with inductor.patch(force_disable_caches=True), closing(CompiledLayers(compiled)):
        for work, of in works.items():
            variants = {"compiled": of(compiled), "plain": of(plain), "products": products}
            if not table:
                variants["compiled"]()
                seconds = time.perf_counter() - began
            times = interleave(variants, rounds)
            speeds = [tokens / min(times[way]) for way in ("plain", "compiled")]
            against = ratio(times, "compiled", "plain"), spread(times, "compiled", "plain")
            table.append([f"{name}, {work}", *speeds, *against, ratio(times, "products", "plain")])
    return table, seconds


def _products(body: nn.Module, tokens: int) -> Callable[[], object]:
    """The products of the layers for a batch; three for each weight if there are gradients."""
    linears = [each for each in body.modules() if isinstance(each, nn.Linear)]
    training = torch.is_grad_enabled()
    states = {width: torch.randn(tokens, width, requires_grad=training) for width in {n.in_features for n in linears}}

    def run() -> None:
        for linear in linears:
            found = linear(states[linear.in_features])
            if training:
                torch.autograd.grad(found, (states[linear.in_features], linear.weight), torch.ones_like(found))

    return run


def _teacher_works(rows: np.ndarray) -> dict[str, Work]:
    stored, length = np.ones(rows.shape[1], bool), np.array([rows.shape[1]], np.int32)
    read = [TokenRow(row.astype(np.int32), stored, length) for row in rows]
    requests = [RowRequest(index=i, row=row, place=i, stored=stored) for i, row in enumerate(read)]

    def layers(head: Head) -> Callable[[], object]:
        inputs = model_inputs(read, with_mask=head.reads_padding_mask)
        return lambda: head.hidden_states(*inputs)

    def targets(head: Head) -> Callable[[], object]:
        engine = TransformersEngine(head, device=torch.device("cpu"), batch_size=len(rows))
        return lambda: engine.run(requests, [RULE])

    return {"layers alone": layers, "pass with targets": targets}


def _student_works(batch: Batch) -> dict[str, Work]:
    loss, scale = DistillLoss(kd_weight=0.9), 1 / batch["labels"].numel()

    def layers(head: Head) -> Callable[[], object]:
        def run() -> None:
            states = head.hidden_states(batch["input_ids"], batch["position_ids"], batch["attention_mask"])
            states.backward(torch.ones_like(states))
            head.model.zero_grad()

        return run

    def step(head: Head) -> Callable[[], object]:
        optimizer = torch.optim.AdamW(head.model.parameters(), lr=1e-5)

        def run() -> None:
            distillation_output(head, batch, loss, scale).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    return {"layers alone": layers, "training step": step}


def _batch(teacher: Path, rows: np.ndarray) -> Batch:
    """The rows with the teacher's targets."""
    with tempfile.TemporaryDirectory() as scratch:
        data = DataConfig(data=[{"input_ids": row.tolist()} for row in rows], seq_len=rows.shape[1])
        config = CacheTeacherConfig(teacher=str(teacher), data=data, output=f"{scratch}/cache", targets=RULE)
        cache_teacher(config)
        dataset = CacheDataset(cf.open_cache(config.output))
        return dataset.collate(dataset.__getitems__(range(len(dataset))))
