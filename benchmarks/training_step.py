"""A training step of stage two, compared with one of transformers' Trainer on labels.

    Trainer     cross-entropy on the labels, logits of every position: what a fine-tuning script runs
    distill     `train_student`: top-64 targets and labels, logits of the loss tokens alone

Same student (the first layers of the teacher), same rows, same optimizer, two rows a step. The second half of
each row counts in the loss, like the answer of a chat. Whole runs take turns; the first two steps of each are not
timed.

Bound: the products of the student's layers for every token and of its head for the loss tokens, over the products of
layers and head for every token.

    python -m benchmarks training_step
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import cache_format as cf
from benchmarks.measure import Result, Settings, Table, Value, ratio, spread
from benchmarks.teacher import describe, open_teacher
from benchmarks.text import token_rows
from pipeline.losses import IGNORE_INDEX
from pipeline.student.data.dataset import CacheDataset
from pipeline.student.model.initialization import load_student
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.train import train_student
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig

TOP_K, BATCH_ROWS, LAYERS, UNTIMED = 64, 2, 6, 2
LEARNING_RATE = 1e-4


def run(settings: Settings) -> Result:
    steps, row_tokens = (2, 64) if settings.quick else (12, 512)
    teacher, tokenizer = open_teacher(settings.teacher)
    layers = min(LAYERS, teacher.config.num_hidden_layers)
    student_of = partial(load_student, str(settings.teacher), layers=layers, vocab_size=len(tokenizer), seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        cache = str(Path(scratch) / "cache")
        mask = [0] * (row_tokens // 2) + [1] * (row_tokens - row_tokens // 2)
        rows = token_rows(tokenizer, BATCH_ROWS * (steps + UNTIMED), row_tokens)
        data = [{"input_ids": row.tolist(), "loss_mask": mask} for row in rows]
        cache_teacher(
            CacheTeacherConfig(
                teacher=str(settings.teacher),
                data=DataConfig(data=data, seq_len=row_tokens),
                output=cache,
                targets=TargetRule(top_k=TOP_K),
            )
        )
        config = TrainStudentConfig(
            cache=(cache,),
            student=str(settings.teacher),
            student_layers=layers,
            output=str(Path(scratch) / "student"),
            overwrite=True,
            batch_size=BATCH_ROWS,
            learning_rate=LEARNING_RATE,
            max_steps=steps + UNTIMED,
            device="cpu",
        )
        labelled = _labelled(cf.open_cache(cache))
        times: dict[str, list[float]] = {"Trainer": [], "distill": []}
        for i in range(settings.rounds):
            for way in list(times)[:: -1 if i % 2 else 1]:
                if way == "distill":
                    ends = _distill_steps(config)
                else:
                    ends = _trainer_steps(student_of(), labelled, Path(scratch) / "labels", steps + UNTIMED)
                times[way].append(statistics.median(b - a for a, b in itertools.pairwise(ends[UNTIMED - 1 :])))
    bound = _bound(student_of())
    table: list[list[Value]] = [
        [way, BATCH_ROWS * row_tokens / min(times[way]), ratio(times, way, "Trainer"), spread(times, way, "Trainer")]
        for way in times
    ]
    return Result(
        name="training_step",
        question="A step on top-64 targets and labels ÷ a step of transformers' Trainer on labels, same rows.",
        bound=f"{bound:.2f}, the products of the layers and of the head for the loss tokens.",
        settings={
            "teacher": describe(teacher),
            "student_layers": layers,
            "rows_per_step": BATCH_ROWS,
            "row_tokens": row_tokens,
            "loss_tokens": sum(mask),
            "timed_steps": steps,
            "rounds": settings.rounds,
        },
        tables=[Table("A training step", ["", "tokens/s", "÷ Trainer", "range"], table)],
        summary={"time_ratio": round(ratio(times, "distill", "Trainer"), 3), "bound": round(bound, 3)},
    )


def _labelled(cache: cf.Cache) -> list[dict[str, torch.Tensor]]:
    """The rows of a cache as Trainer takes them, without what only distillation needs."""
    dataset, rows = CacheDataset(cache), []
    for i in range(len(dataset)):
        row = dataset[i]
        labels = torch.full((len(row.input_ids),), IGNORE_INDEX)
        # The model shifts labels by itself: the target at position t is the token at t + 1.
        counted = torch.from_numpy(row.loss_mask.astype(bool))[:-1]
        input_ids = torch.from_numpy(row.input_ids.astype("int64"))
        labels[1:] = torch.where(counted, input_ids[1:], IGNORE_INDEX)
        rows.append({"input_ids": input_ids, "labels": labels})
    return rows


def _distill_steps(config: TrainStudentConfig) -> list[float]:
    """When each optimizer step of `train_student` ended, in seconds."""
    ends: list[float] = []
    train_student(config, on_step=lambda _step, _steps: ends.append(time.perf_counter()))
    return ends


def _trainer_steps(
    student: PreTrainedModel, rows: Sequence[dict[str, torch.Tensor]], output: Path, steps: int
) -> list[float]:
    """The same of a plain Trainer."""
    ends: list[float] = []
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=BATCH_ROWS,
        learning_rate=LEARNING_RATE,
        max_steps=steps,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_steps=steps,
    )
    watch = _Watch(lambda: ends.append(time.perf_counter()))
    trainer = Trainer(model=student, args=arguments, train_dataset=rows, callbacks=[watch])  # type: ignore[arg-type]
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return ends


class _Watch(TrainerCallback):
    def __init__(self, ended: Callable[[], None]) -> None:
        self.ended = ended

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended()


def _bound(student: PreTrainedModel) -> float:
    """Products of a step with half of the tokens in the loss ÷ those of a step with all of them."""
    head = student.get_output_embeddings().weight.numel()
    body = sum(p.numel() for name, p in student.named_parameters() if p.ndim == 2 and "layers." in name)
    return (body + head / 2) / (body + head)
