"""Teachers in transformers, in this process: any architecture, exact repetition.

    rows ─▶ one upload ─▶ body: hidden states [B, T, D] ─▶ a chunk of positions at a time: head, logits [n, V]
         ─▶ targets ─▶ asynchronous copy to pinned memory

The [B, T, V] logits never exist. Nothing here waits for the device, except with `timed`: `RunningRows.rows`, which
capture calls in another thread, does, once for a record batch. Cost on top of the bare forward pass, per position:
softmax, top-K and entropy read V floats about five times, on CUDA with Triton twice (`benchmarks/capture.py`,
`benchmarks/stage_one_counts.py`).

Shapes: B rows of T tokens, n positions that get targets, D hidden width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.models.devices import kernels
from pipeline.models.devices.compilation import CompiledLayers
from pipeline.models.devices.placement import device_names
from pipeline.models.devices.transfer import download, recorded_event, upload
from pipeline.models.head import Head
from pipeline.models.head_export import HeadExport
from pipeline.models.isolation.document_attention import Documents
from pipeline.models.isolation.mask_shortcuts import mask_shortcuts
from pipeline.models.loading import teacher_fingerprints
from pipeline.models.padding import model_inputs, places
from pipeline.teacher.engines.answer_writer import AnswerWriter
from pipeline.teacher.engines.chunked_selection import ChunkedSelection, random_numbers
from pipeline.teacher.engines.engine_config import Tokens
from pipeline.teacher.engines.interface import BatchSizeHalved, Measured, OnAnswers, OnBatch, RowRequest, Timing
from pipeline.teacher.engines.token_budget import batches_within, find_budget
from pipeline.teacher.generation.answers import Answer, AnswerSettings, Request, token_set
from pipeline.teacher.targets import hidden_states
from pipeline.teacher.targets.cache_rows import cache_rows
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import ChunkTargets, label_scores
from pipeline.teacher.writing.shard_sizes import RECORD_BATCH_TOKENS

CHUNK_POSITIONS = 256
"""Positions per chunk of the head on a CPU, whose caches hold no more of the logits."""

CHUNK_BYTES = 2**28
"""Size of a chunk's fp32 logits on a GPU, of which two are there: large enough to read the head's weights seldom."""

CHUNK_STEP, MOST_CHUNK_POSITIONS = 128, 4096

OnLogits = Callable[[slice, Tensor], None]
"""Called with the positions of a chunk among the n of the batch, and their logits."""

T = TypeVar("T")


@dataclass(kw_only=True)
class RunningBatch:
    """One forward pass that has been started.

    Attributes:
        targets: on the host, for each rule; complete once `copied` has happened.
        states: layer -> [m, D] hidden states to store, on the host.
        scales: layer -> [m], for int8.
        label_logprobs: [n] of the next token of the row, on the host; only of a timed causal teacher.
        inputs: [n, D] what the head was applied to, on the device; only if asked for.
    """

    requests: Sequence[RowRequest]
    targets: list[ChunkTargets]
    states: dict[int, Tensor]
    scales: dict[int, Tensor]
    copied: torch.cuda.Event | None
    label_logprobs: Tensor | None
    inputs: Tensor | None
    timing: Timing

    def rows(self, rule: int = 0) -> list[cf.CacheRow]:
        self.wait()
        requests = self.requests
        indices, stored = [each.index for each in requests], [each.stored for each in requests]
        rows = cache_rows(indices, [each.row for each in requests], stored, self.targets[rule])
        masks = [each.with_states for each in requests if each.with_states is not None]
        if not masks:
            return rows
        states = hidden_states.of_rows(self.states, self.scales, masks, indices)
        return [replace(row, hidden=each) for row, each in zip(rows, states, strict=True)]

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()


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


class LabelScores:
    """Log-probabilities of the tokens that follow in the rows of a batch; see `OnLogits`."""

    def __init__(self, batch: Sequence[RowRequest]) -> None:
        following = [np.append(request.row.input_ids[1:], 0)[request.stored] for request in batch]
        self._labels = torch.from_numpy(np.concatenate(following).astype(np.int64))
        self._found: list[Tensor] = []

    def __call__(self, here: slice, logits: Tensor) -> None:
        self._found.append(label_scores(logits, self._labels[here]))

    def logprobs(self) -> Tensor:
        return torch.cat(self._found).cpu()


class TransformersEngine:
    """Owns the buffers of one teacher; see `TeacherEngine`.

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
        self.export, self.hidden, self.compiled = export, hidden, compiled
        self.divisible, self.timed = divisible, timed
        self.vocab_size = head.vocab_size
        self._chunk = chunk_positions(head.device, self.vocab_size)
        shape, where = (self._chunk, self.vocab_size), head.device
        self._logits = torch.empty(shape, dtype=head.logits_dtype, device=where) if head.linear else None
        self._scratch = torch.empty(shape, dtype=torch.float32, device=where)

    @property
    def stored_head(self) -> HeadExport | None:
        return self.export

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
            "chunk_positions": self._chunk,
            **({"padding_free": True} if self.head.padding_free else {}),
            **({"compiled": True} if self.compiled is not None else {}),
            **({"logits": "float32"} if self.head.sums_in_fp32 else {}),
            **({"selection": "triton"} if kernels.triton_kernels(self.head.device) is not None else {}),
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
            running.append(self._within_memory(partial(self.run_batch, batch, rules), batch))
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
                self.run_batch(batch, rules).wait()
                seconds.append(time.perf_counter() - began)
            return tokens / min(seconds)

        return find_budget(speed, fewest=width, most=max(1, RECORD_BATCH_TOKENS // width) * width)

    @torch.inference_mode()
    def run_batch(
        self, batch: Sequence[RowRequest], rules: Sequence[TargetRule], *, keep_inputs: bool = False
    ) -> RunningBatch:
        """Starts one forward pass."""
        device = self.head.device
        timing = Timing(tokens=sum(request.tokens for request in batch), selection=[0.0] * len(rules))
        read = [request.read for request in batch]
        inputs = model_inputs(read, with_mask=self.head.reads_padding_mask)
        width = inputs[0].shape[1]
        stored = places([request.places(request.stored) for request in batch], width)
        positions = np.concatenate([np.flatnonzero(request.stored) for request in batch])
        rows = np.repeat([request.place for request in batch], [np.count_nonzero(each.stored) for each in batch])
        uniforms = random_numbers(rules, rows, positions, device)
        with_states = [request.places(request.with_states) for request in batch if request.with_states is not None]
        chosen = [places(with_states, width)] if with_states else []
        documents = Documents.of_rows(read) if self.head.padding_free else None
        around = [] if documents is None else [documents.starts, documents.places]
        there = iter(upload([*inputs, *around, stored, *uniforms, *chosen], device))
        inputs = list(islice(there, len(inputs)))
        if documents is not None:
            documents = replace(documents, starts=next(there), places=next(there))
        stored, uniforms, chosen = next(there), list(islice(there, len(uniforms))), list(there)

        began = self._clock()
        with mask_shortcuts(read, device):
            hidden, states, scales = self._body(inputs, documents, chosen[0] if chosen else None)
        hidden = hidden.flatten(0, 1)[stored]  # [n, D]
        timing.forward += self._clock() - began
        labels = LabelScores(batch) if self.timed and not self.head.masked else None
        targets, multiplied = self._head(hidden, uniforms, rules, labels, timing)
        if multiplied is not None and self.hidden is not None:
            last = self.hidden.layers[-1]
            states[last], scale = hidden_states.quantised(multiplied, self.hidden.dtype)
            scales |= {} if scale is None else {last: scale}

        return RunningBatch(
            requests=batch,
            targets=[ChunkTargets(*map(download, each)) for each in targets],
            states={layer: download(each) for layer, each in states.items()},
            scales={layer: download(each) for layer, each in scales.items()},
            copied=recorded_event(device),
            label_logprobs=None if labels is None else labels.logprobs(),
            inputs=hidden if keep_inputs else None,
            timing=timing,
        )

    def _body(
        self, inputs: list[Tensor], documents: Documents | None, chosen: Tensor | None
    ) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
        """What the head is applied to [B, T, D], and the hidden states to store with their scales.

        Args:
            chosen: places of the positions whose states are stored; None: none are.
        """
        if self.hidden is None or chosen is None:
            return self.head.hidden_states(*inputs, documents=documents), {}, {}
        hidden, by_layer = self.layer_states(inputs, documents)
        states, scales = hidden_states.of_batch(by_layer, chosen, self.hidden.dtype) if by_layer else ({}, {})
        return hidden, states, scales

    def layer_states(self, inputs: list[Tensor], documents: Documents | None) -> tuple[Tensor, dict[int, Tensor]]:
        """What the head is applied to, and the states of the layers to store, in their order, [B, T, D] each."""
        assert self.hidden is not None
        last = self.hidden.teacher_layers
        inner = [layer for layer in self.hidden.of_layers if layer < last]
        if inner:
            hidden, states = self.head.states(inner, *inputs, documents=documents)
        else:  # without keeping the states of all layers
            hidden, states = self.head.hidden_states(*inputs, documents=documents), {}
        return hidden, states | ({last: hidden} if last in self.hidden.layers else {})

    def _head(
        self,
        hidden: Tensor,
        uniforms: Sequence[Tensor],
        rules: Sequence[TargetRule],
        on_logits: OnLogits | None,
        timing: Timing,
    ) -> tuple[list[ChunkTargets], Tensor | None]:
        """Targets of n positions by each rule; and what the output matrix multiplies, if that is not `hidden`."""
        selection = ChunkedSelection(rules, uniforms, self._clock)
        multiplied = []
        for start in range(0, max(1, len(hidden)), self._chunk):
            here = slice(start, start + self._chunk)
            began = self._clock()
            if self.export is not None and self.export.transforms:
                logits, inner = self.export.logits(hidden[here])
                multiplied.append(inner)
            else:
                logits = self.head.logits(hidden[here], out=self._logits)
            timing.forward += self._clock() - began
            if on_logits is not None:
                on_logits(here, logits)
            selection.add(here, logits, self._scratch)
        timing.selection = selection.seconds
        return selection.targets(), torch.cat(multiplied) if multiplied else None

    def next_targets(
        self, hidden: Tensor, places: np.ndarray, positions: np.ndarray, rule: TargetRule
    ) -> tuple[Tensor, ChunkTargets]:
        """Logits [b, V] float32 and targets on the host of the next token of b growing texts."""
        kept: list[Tensor] = []
        several = len(hidden) > self._chunk  # then the next chunk overwrites the buffer

        def keep(_: slice, logits: Tensor) -> None:
            kept.append(logits.float().clone() if several else logits.float())

        uniforms = upload(random_numbers([rule], places, positions, hidden.device), hidden.device)
        (targets,), _ = self._head(hidden, uniforms, [rule], keep, Timing(selection=[0.0]))
        return torch.cat(kept) if several else kept[0], targets.cpu()

    def generate(
        self, requests: Sequence[Request], settings: AnswerSettings, on_answers: OnAnswers = lambda _: None
    ) -> list[Answer]:
        writer = AnswerWriter(self, settings)
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

    def _clock(self) -> float:
        if not self.timed:
            return 0.0
        if self.head.device.type == "cuda":
            torch.cuda.synchronize(self.head.device)
        return time.perf_counter()


def chunk_positions(device: torch.device, vocab_size: int) -> int:
    """Positions per chunk of the head."""
    if device.type != "cuda":
        return CHUNK_POSITIONS
    fit = CHUNK_BYTES // (4 * vocab_size) // CHUNK_STEP * CHUNK_STEP
    return min(max(CHUNK_STEP, fit), MOST_CHUNK_POSITIONS)
