"""A teacher in this process that computes rows of its cache again: alone, with rounding errors, and in a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import cache_format as cf
from pipeline.models.head import Head, open_head
from pipeline.models.head_export import HeadExport, export_head
from pipeline.models.loading import DTYPES, load_model, weights_fingerprint
from pipeline.models.objective import objective_for
from pipeline.models.teacher_head import TeacherHead
from pipeline.teacher.engines.answers import place_of
from pipeline.teacher.engines.interface import RowRequest
from pipeline.teacher.engines.transformers_engine import TransformersEngine
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.verification.rounding import Rounding
from pipeline.teacher.verification.row_check import RowCheck, RowChecker
from pipeline.teacher.verification.teacher_reading import Reading
from pipeline.teacher.verify_config import TeacherCheckConfig


@dataclass(frozen=True, eq=False)
class _Run:
    """See `TeacherRun`.

    Attributes:
        inputs: [n, D] what the head is applied to.
        rounding: random errors that its logits get; None: none.
    """

    row: cf.CacheRow
    inputs: Tensor
    head: Head
    temperature: float
    rounding: Rounding | None

    def logprobs(self, here: slice) -> Tensor:
        logits = self.head.logits(self.inputs[here])
        logits = logits if self.rounding is None else self.rounding(logits)
        return (logits.cpu().double() / self.temperature).log_softmax(dim=1)


class LoadedTeacher:
    """Computes rows of a cache again and compares them.

    Args:
        device: the one that was asked for.
        reading: what the teacher of the cache read.
    """

    times = "three times"

    def __init__(self, config: TeacherCheckConfig, cache: cf.Cache, device: torch.device, reading: Reading) -> None:
        metadata, objective = cache.metadata, objective_for(cache.metadata.alignment)
        recorded, named = metadata.teacher.get("dtype"), not isinstance(config.teacher, PreTrainedModel)
        self.model = load_model(
            config.teacher,
            objective=objective,
            dtype=recorded if config.dtype == "auto" and named and recorded in DTYPES else config.dtype,
            device=device,
            device_map=config.device_map,
            tensor_parallel=config.tensor_parallel,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
        self.head = open_head(self.model, metadata.vocab_size, masked=objective == "masked")
        self.reading = reading
        self.same_weights = metadata.teacher.get("weights_fingerprint") == weights_fingerprint(self.model)
        self.dtype = str(self.head.weight.dtype).removeprefix("torch.")
        self.rule = TargetRule.from_json(metadata.targets)
        export: HeadExport | None = None if metadata.head is None else export_head(self.head)
        self.engine = TransformersEngine(
            self.head,
            device=device,
            batch_size=int(metadata.capture.get("batch_size") or 8),
            export=export,
            hidden=None if metadata.hidden is None else replace(metadata.hidden, dtype="float32"),
        )
        recorded_dtype = DTYPES.get(str(recorded))
        self.rounding = Rounding(at_least=0.0 if recorded_dtype is None else torch.finfo(recorded_dtype).eps)
        self.checker = RowChecker(metadata, self.rule, None if metadata.head is None else TeacherHead(cache))
        places = np.array([(line["document"], line["answer"]) for line in cache.answers()], np.uint64).reshape(-1, 2)
        # Keys of each row's random numbers: the row's number, or the place of its answer.
        self.places = place_of(*places.T) if len(places) else np.arange(len(cache))

    def close(self) -> None:
        self.engine.close()

    def check(self, rows: Sequence[cf.CacheRow]) -> Iterator[RowCheck]:
        together = self.engine.batch_size
        for start in range(0, len(rows), together):
            batch = rows[start : start + together]
            for row, in_batch in zip(batch, self._runs(batch), strict=True):
                (alone,) = self._runs([row])
                with self.rounding.inside(self.model):
                    (rounded,) = self._runs([row], self.rounding)
                yield self.checker.check(row, int(self.places[row.row]), alone, rounded, in_batch)

    def _runs(self, rows: Sequence[cf.CacheRow], rounding: Rounding | None = None) -> list[_Run]:
        """One forward pass over these rows together."""
        requests = [
            RowRequest(
                index=row.row,
                row=row,
                place=int(self.places[row.row]),
                stored=self.checker.stored(row),
                with_states=None if row.hidden is None else np.array(row.hidden.mask),
                teacher=self.reading(row),
            )
            for row in rows
        ]
        running = self.engine.forward.run(requests, [self.rule], keep_inputs=True)
        assert running.inputs is not None
        inputs = running.inputs.split([int(request.stored.sum()) for request in requests])
        return [
            _Run(row, of_row, self.head, self.rule.temperature, rounding)
            for row, of_row in zip(running.rows(), inputs, strict=True)
        ]
