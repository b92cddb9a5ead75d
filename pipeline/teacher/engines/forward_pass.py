"""One forward pass of a teacher in transformers: a batch of rows to the targets of their positions.

    rows ─▶ one upload ─▶ body: hidden states [B, T, D] ─▶ a chunk of positions at a time: head, logits [n, V]
         ─▶ targets ─▶ asynchronous copy to pinned memory

The [B, T, V] logits never exist. Nothing here waits for the device, except with `timed`: `RunningBatch.rows`, which
capture calls in another thread, does, once for a record batch. Cost on top of the bare forward pass, per position:
softmax, top-K and entropy read V floats about five times, on CUDA with Triton twice (`benchmarks/capture.py`,
`benchmarks/stage_one_counts.py`).

Shapes: B rows of T tokens, n positions that get targets, D hidden width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

import cache_format as cf
from pipeline.models.devices.buffers import empty_rows
from pipeline.models.devices.transfer import download, recorded_event, upload
from pipeline.models.head import Head
from pipeline.models.head_export import HeadExport
from pipeline.models.isolation.document_attention import Documents
from pipeline.models.isolation.mask_shortcuts import mask_shortcuts
from pipeline.models.padding import model_inputs, places
from pipeline.teacher.engines.chunked_selection import ChunkedSelection, chunk_positions, random_numbers
from pipeline.teacher.engines.interface import RowRequest, Timing
from pipeline.teacher.targets import hidden_states
from pipeline.teacher.targets.cache_rows import cache_rows
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import ChunkTargets, label_scores
from pipeline.teacher.targets.softmax import scratch_for

OnLogits = Callable[[slice, Tensor], None]
"""Called with the positions of a chunk among the n of the batch, and their logits."""


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


class ForwardPass:
    """Owns the buffers of one teacher, and starts its forward passes.

    Attributes:
        chunk: positions per chunk of the head.
        hidden: the hidden states to store, as far as the engine computes them.

    Args:
        head: of the teacher.
        export: the head as it is stored, for hidden targets.
        timed: measure every pass, which makes the host wait for the device.
    """

    def __init__(
        self, head: Head, *, export: HeadExport | None = None, hidden: cf.HiddenSpec | None = None, timed: bool = False
    ) -> None:
        self.head, self.export, self.hidden, self.timed = head, export, hidden, timed
        self.chunk = chunk_positions(head.vocab_size)
        shape = self.chunk, head.vocab_size
        self._logits = empty_rows(*shape, head.logits_dtype, head.device) if head.linear else None
        self._scratch = scratch_for(head.vocab_size, head.device)

    @torch.inference_mode()
    def run(
        self, batch: Sequence[RowRequest], rules: Sequence[TargetRule], *, keep_inputs: bool = False
    ) -> RunningBatch:
        """Starts a pass."""
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
        for start in range(0, max(1, len(hidden)), self.chunk):
            here = slice(start, start + self.chunk)
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
        several = len(hidden) > self.chunk  # then the next chunk overwrites the buffer

        def keep(_: slice, logits: Tensor) -> None:
            kept.append(logits.float().clone() if several else logits.float())

        uniforms = upload(random_numbers([rule], places, positions, hidden.device), hidden.device)
        (targets,), _ = self._head(hidden, uniforms, [rule], keep, Timing(selection=[0.0]))
        return torch.cat(kept) if several else kept[0], targets.cpu()

    def _clock(self) -> float:
        if not self.timed:
            return 0.0
        if self.head.device.type == "cuda":
            torch.cuda.synchronize(self.head.device)
        return time.perf_counter()
