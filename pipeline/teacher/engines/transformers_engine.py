"""Teachers in transformers, in this process: any architecture, exact repetition.

    rows, prompts ─▶ batches, longest first ─▶ `forward_pass`, `answer_writer`

A batch that does not fit the memory is freed, and the batch size halved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.models.devices import kernels
from pipeline.models.devices.compilation import CompiledLayers
from pipeline.models.devices.placement import device_names
from pipeline.models.head import Head
from pipeline.models.head_export import HeadExport
from pipeline.models.loading import teacher_fingerprints
from pipeline.teacher.engines.answer_writer import AnswerWriter
from pipeline.teacher.engines.answers import Answer, AnswerSettings, Request, token_set
from pipeline.teacher.engines.engine_config import Tokens
from pipeline.teacher.engines.forward_pass import ForwardPass, RunningBatch
from pipeline.teacher.engines.interface import BatchSizeHalved, Measured, OnAnswers, OnBatch, RowRequest
from pipeline.teacher.engines.token_budget import batches_within, find_budget
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.writing.shard_sizes import RECORD_BATCH_TOKENS

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RunningBatches:
    """See `RunningRows`."""

    requests: Sequence[RowRequest]
    batches: Sequence[RunningBatch]

    def rows(self, rule: int = 0) -> list[cf.CacheRow]:
        # The last one first: once it has been copied, the others have been too.
        rows = {row.row: row for batch in reversed(self.batches) for row in batch.rows(rule)}
        return [rows[request.index] for request in self.requests]

    def measured(self) -> list[Measured]:
        return [
            Measured(
                requests=batch.requests,
                timing=batch.timing,
                label_logprobs=None if batch.label_logprobs is None else batch.label_logprobs.numpy(),
            )
            for batch in self.batches
        ]


class TransformersEngine:
    """Runs one teacher a batch at a time; see `TeacherEngine`.

    Attributes:
        libraries, rows_in_flight, batch_size, batch_tokens: see `TeacherEngine`.

    Args:
        head: of the teacher.
        device: the one that was asked for.
        batch_size: rows or answers per forward pass.
        batch_tokens: tokens per forward pass over rows, instead of `batch_size`; "auto": found by the first `run`.
        export: the head as it is stored, for hidden targets.
        hidden: the hidden states to store, as far as the engine computes them.
        compiled: layers of the teacher, closed with the engine.
        divisible: whether either may be halved when out of memory.
        timed: measure every pass, which makes the host wait for the device.
    """

    libraries: Sequence[str] = ("torch", "transformers")
    rows_in_flight = 0
    usage = None

    def __init__(
        self,
        head: Head,
        *,
        device: torch.device,
        batch_size: int,
        batch_tokens: Tokens | None = None,
        export: HeadExport | None = None,
        hidden: cf.HiddenSpec | None = None,
        compiled: CompiledLayers | None = None,
        divisible: bool = True,
        timed: bool = False,
    ) -> None:
        self.head, self.device, self.batch_size = head, device, batch_size
        self.batch_tokens = batch_tokens
        # Those of a shard may be other ones: they are in its sidecar.
        self._asked = {"batch_size": batch_size} if batch_tokens is None else {"batch_tokens": batch_tokens}
        self.divisible, self.compiled = divisible, compiled
        self.vocab_size = head.vocab_size
        self.forward = ForwardPass(head, export=export, hidden=hidden, timed=timed)

    @property
    def hidden(self) -> cf.HiddenSpec | None:
        return self.forward.hidden

    @hidden.setter
    def hidden(self, spec: cf.HiddenSpec | None) -> None:
        self.forward.hidden = spec

    @property
    def stored_head(self) -> HeadExport | None:
        return self.forward.export

    @property
    def eos_token_ids(self) -> set[int]:
        settings = self.head.model.generation_config
        return token_set(None if settings is None else settings.eos_token_id)

    def layers(self) -> tuple[int, int]:
        return self.head.layers()

    @property
    def revision(self) -> str | None:
        return getattr(self.head.model.config, "_commit_hash", None)

    def describe_teacher(self) -> dict[str, str]:
        return {
            "architecture": type(self.head.model).__name__,
            "dtype": str(self.head.weight.dtype).removeprefix("torch."),
            **teacher_fingerprints(self.head.model),
        }

    def describe(self) -> dict[str, Any]:
        return {
            "device": device_names(self.head.model, self.device),
            # Elsewhere than on a CPU no sum is split over threads.
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            **self._asked,
            "head": "linear" if self.head.linear else "own",
            "chunk_positions": self.forward.chunk,
            **({"padding_free": True} if self.head.padding_free else {}),
            **({"compiled": True} if self.compiled is not None else {}),
            **({"logits": "float32"} if self.head.sums_in_fp32 else {}),
            **({"selection": "triton"} if kernels.kernels_on(self.head.device) is not None else {}),
        }

    def batches(self, requests: Sequence[RowRequest]) -> Iterator[list[RowRequest]]:
        """Longest first, so that little is padded and out of memory shows at once."""
        order = sorted(requests, key=lambda request: (-len(request.read.input_ids), request.index))
        if isinstance(self.batch_tokens, int):
            yield from batches_within(order, self.batch_tokens, padded=not self.head.padding_free)
            return
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def run(
        self, requests: Sequence[RowRequest], rules: Sequence[TargetRule], on_batch: OnBatch = lambda _: None
    ) -> RunningBatches:
        running = []
        if self.batch_tokens == "auto":
            self.batch_tokens = self._find_budget(requests, rules)
        for batch in self.batches(requests):
            running.append(self._within_memory(partial(self.forward.run, batch, rules), batch))
            on_batch(batch)
        return RunningBatches(requests=requests, batches=running)

    def _find_budget(self, requests: Sequence[RowRequest], rules: Sequence[TargetRule]) -> int:
        """Tokens per forward pass, tried on copies of the longest request."""
        longest = max(requests, key=lambda request: len(request.read.input_ids))
        width = len(longest.read.input_ids)

        def speed(tokens: int) -> float:
            batch, seconds = [longest] * (tokens // width), []
            for _ in range(3):  # the first one pays for allocations
                began = time.perf_counter()
                self.forward.run(batch, rules).wait()
                seconds.append(time.perf_counter() - began)
            return tokens / min(seconds)

        return find_budget(speed, fewest=width, most=max(1, RECORD_BATCH_TOKENS // width) * width)

    def generate(
        self, requests: Sequence[Request], settings: AnswerSettings, on_answers: OnAnswers = lambda _: None
    ) -> list[Answer]:
        writer = AnswerWriter(self.forward, settings)
        # Longest first: running out of memory shows at once, and there is little padding.
        order = sorted(requests, key=lambda request: (-len(request.read), request.document, request.index))
        answers: list[Answer] = []
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            written = self._within_memory(partial(writer.write, batch))
            answers += written
            on_answers(written)
        return answers

    def close(self) -> None:
        """The model is freed with the object, unless it was given as one: then it gets its own layers back."""
        if self.compiled is not None:
            self.compiled.close()

    def _within_memory(self, compute: Callable[[], T], rows: Sequence[RowRequest] = ()) -> T:
        """
        Args:
            rows: of the forward pass; none: answers.

        Raises: BatchSizeHalved; ConfigError where the batch size cannot be halved by one process alone.
        """
        tokens = self.batch_tokens if rows else None
        try:
            return compute()
        except Exception as error:
            smallest = self.batch_size == 1 if tokens is None else len(rows) == 1
            if not should_reduce_batch_size(error) or (self.divisible and smallest):
                raise
            if not self.divisible:
                limit = f"`batch_size` {self.batch_size}" if tokens is None else f"`batch_tokens` {tokens}"
                raise ConfigError(
                    f"{limit}: out of memory. With `tensor_parallel` it is not halved, since "
                    "all processes would have to. Use a smaller one; complete shards are kept."
                ) from error
        # Only here: the traceback of `error` holds the tensors of the batch.
        clear_device_cache(garbage_collection=True)
        if tokens is None:
            self.batch_size //= 2
        else:
            self.batch_tokens = min(int(tokens), sum(len(each.read.input_ids) for each in rows)) // 2
        raise BatchSizeHalved
