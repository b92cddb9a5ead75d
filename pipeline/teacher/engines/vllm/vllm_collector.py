"""What a vLLM worker computes in a step: targets of the positions that requests want, from the step's hidden states.

    hidden states of a step [tokens, D] ─▶ wanted positions ─▶ a chunk at a time: vLLM's head, logits [n, V] ─▶ targets

A request says in `SamplingParams.extra_args["distill"]` which positions it wants (`Wanted`). What was computed stays
here, on the host, until `take` fetches it. A request that vLLM preempts is computed again from its start; what was
collected before is not collected twice. Nothing here belongs to vLLM; `vllm_worker` connects it.

Shapes: D hidden width, n positions, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.models.devices.transfer import upload
from pipeline.teacher.engines.chunked_selection import ChunkedSelection, chunk_positions, random_numbers
from pipeline.teacher.targets import hidden_states
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import ChunkTargets, draws, label_scores, sparse_targets
from pipeline.teacher.targets.softmax import scratch_for

KEY = "distill"
"""Key in a request's `extra_args`."""


class Wanted(NamedTuple):
    """What a request wants. It travels as a list, since vLLM sends the arguments of a request as msgpack.

    Attributes:
        name: under which its targets are fetched.
        place: key of its random numbers.
        start: position of its first token in the row, which keys its random numbers; below 0 if the row begins later.
        stored: bits of the prompt's positions that get targets, as `numpy.packbits`. All positions behind it get some.
        with_states: bits of those whose hidden states are stored; empty: none.
    """

    name: str
    place: int
    start: int
    stored: bytes
    with_states: bytes = b""


class Span(NamedTuple):
    """The tokens of one request in a step: rows `offset` to `offset + tokens` of the hidden states."""

    wanted: Sequence[Any]
    offset: int
    first: int  # position of the first of them in the request
    tokens: int
    prompt: Sequence[int]


class Collected(NamedTuple):
    """What the wanted positions of one request have, in their order, on the host.

    Attributes:
        targets: by rule.
        states: layer -> [m, D], at the positions whose states are stored.
        scales: layer -> [m], for int8.
        label_logprobs: [n] of the next token of the prompt, if the collector is `timed`; otherwise empty.
    """

    targets: list[ChunkTargets]
    states: dict[int, Tensor]
    scales: dict[int, Tensor]
    label_logprobs: Tensor


@dataclass
class _Request:
    """Positions before `until` have been collected."""

    until: int = 0
    parts: list[Collected] = field(default_factory=list)


class StepTargets:
    """Collects the targets of requests, step by step.

    Args:
        logits: [n, D] → [n, ≥V], the model's own head; None on a rank that does not get them.
        vocab_size: V.

    Attributes:
        inner: layer -> [tokens, D], states of the current step that may be stored; `add` uses them up.
        last_layer: under which the states that `add` gets are stored; None: they are not.
        states_dtype: of stored states.
        timed: measure, which makes the host wait for the device.
        seconds: time that the selection of targets has taken, by rule.
    """

    def __init__(self, logits: Callable[[Tensor], Tensor | None], *, vocab_size: int) -> None:
        self.logits, self.vocab_size = logits, vocab_size
        self.set_rules([], timed=False)
        self.inner: dict[int, Tensor] = {}
        self.last_layer: int | None = None
        self.states_dtype = "float16"
        self.gets_logits = True
        self._requests: dict[str, _Request] = {}
        self._scratch: Tensor | None = None

    def set_rules(self, rules: Sequence[TargetRule], *, timed: bool) -> None:
        self.rules, self.timed = rules, timed
        self.seconds = [0.0] * len(rules)

    @torch.inference_mode()
    def add(self, hidden: Tensor, spans: Iterable[Span]) -> None:
        """Collects what one step has computed. Args: hidden: [tokens, D]."""
        inner, self.inner = self.inner, {}  # a step that collects none must not get those of an earlier one
        rows, places, positions, labels, counts, names, with_states = [], [], [], [], [], [], []
        for span in spans:
            wanted = Wanted(*span.wanted)
            request = self._requests.setdefault(wanted.name, _Request())
            here = np.arange(max(span.first, request.until), span.first + span.tokens)
            request.until = max(request.until, span.first + span.tokens)
            here = here[_bits(wanted.stored, here, len(span.prompt), behind=True)]
            if not len(here):
                continue
            rows.append(here - span.first + span.offset)
            places.append(np.full(len(here), wanted.place, np.uint64))
            positions.append(here + wanted.start)
            counts.append(len(here))
            names.append(wanted.name)
            with_states.append(_bits(wanted.with_states, here, len(span.prompt), behind=False))
            if self.timed:
                labels.append(np.append(span.prompt, 0)[np.minimum(here + 1, len(span.prompt))])
        if not rows:
            return
        row = np.concatenate(rows)
        found = self._targets(
            hidden[_index(row, hidden)],
            np.concatenate(places),
            np.concatenate(positions),
            np.concatenate(labels) if labels else None,
        )
        if found is None:
            return
        targets, label_logprobs = found
        states, scales = self._states(inner, hidden, row[np.concatenate(with_states)])
        of_targets = np.cumsum(counts)[:-1].tolist()
        of_states = np.cumsum([each.sum() for each in with_states])[:-1].tolist()
        by_rule = [zip(*(tensor.tensor_split(of_targets) for tensor in each), strict=True) for each in targets]
        for name, targets_here, *others in zip(
            names,
            zip(*by_rule, strict=True),
            _split(states, of_states, len(names)),
            _split(scales, of_states, len(names)),
            label_logprobs.tensor_split(of_targets) if labels else [label_logprobs] * len(names),
            strict=True,
        ):
            part = Collected([ChunkTargets(*each) for each in targets_here], *others)
            self._requests[name].parts.append(part)

    def _states(
        self, inner: dict[int, Tensor], hidden: Tensor, rows: np.ndarray
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """States and scales of every layer to store, at some rows of the step, on the host."""
        states: dict[int, Tensor] = {}
        scales: dict[int, Tensor] = {}
        if not len(rows):
            return states, scales
        last = {} if self.last_layer is None else {self.last_layer: hidden}
        for layer, each in (inner | last).items():
            kept, scale = hidden_states.quantised(each[_index(rows, each)], self.states_dtype)
            states[layer] = kept.cpu()
            if scale is not None:
                scales[layer] = scale.cpu()
        return states, scales

    def _targets(
        self, inputs: Tensor, places: np.ndarray, positions: np.ndarray, labels: np.ndarray | None
    ) -> tuple[list[ChunkTargets], Tensor] | None:
        """Targets by each rule, and the labels' log-probabilities, on the host; None on a rank that gets no logits."""
        uniforms = upload(random_numbers(self.rules, places, positions, inputs.device), inputs.device)
        selection = ChunkedSelection(self.rules, uniforms, partial(self._clock, inputs))
        label_logprobs = [torch.zeros(0)]
        chunk = chunk_positions(self.vocab_size)
        for start in range(0, len(inputs), chunk):
            here = slice(start, start + chunk)
            logits = self.logits(inputs[here])
            if logits is None:
                self.gets_logits = False
                continue  # the others need this rank's part of the product
            logits = logits[:, : self.vocab_size]
            if self._scratch is None:
                self._scratch = scratch_for(self.vocab_size, logits.device)
            if labels is not None:
                label_logprobs.append(label_scores(logits, torch.from_numpy(labels[here])))
            selection.add(here, logits, self._scratch)
        if not self.gets_logits:
            return None
        self.seconds = [sum(each) for each in zip(self.seconds, selection.seconds, strict=True)]
        return [found.cpu() for found in selection.targets()], torch.cat(label_logprobs).cpu()

    def _clock(self, tensor: Tensor) -> float:
        if self.timed and tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        return time.perf_counter()

    def take(self, names: Sequence[str]) -> list[Collected]:
        """Removes and returns what was collected for these requests."""
        return [join(self._requests.pop(name).parts or [self._nothing()]) for name in names]

    def _nothing(self) -> Collected:
        """The result for a request that wants no position."""
        none, logits = np.zeros(0, np.int64), torch.zeros((0, self.vocab_size))
        targets = [sparse_targets(logits, rule, draws(rule, none, none)) for rule in self.rules]
        return Collected(targets, {}, {}, torch.zeros(0))


def _bits(packed: bytes, positions: np.ndarray, prompt_tokens: int, *, behind: bool) -> np.ndarray:
    """[n] bool: the bits of some positions; `behind` the prompt."""
    found = np.full(len(positions), behind)
    inside = positions < prompt_tokens
    if not packed:
        found[inside] = False
        return found
    found[inside] = np.unpackbits(np.frombuffer(packed, np.uint8), count=prompt_tokens)[positions[inside]] > 0
    return found


def _index(rows: np.ndarray, tensor: Tensor) -> Tensor:
    return upload([torch.from_numpy(rows)], tensor.device)[0]


def _split(tensors: dict[int, Tensor], stops: list[int], parts: int) -> list[dict[int, Tensor]]:
    """`tensor_split` of every layer, part by part."""
    split = {layer: tensor.tensor_split(stops) for layer, tensor in tensors.items()}
    return [{layer: each[i] for layer, each in split.items()} for i in range(parts)]


def join(parts: Sequence[Collected]) -> Collected:
    """The parts of one text, one behind the other."""
    by_rule = [ChunkTargets.cat(each) for each in zip(*(part.targets for part in parts), strict=True)]
    states, scales = _cat([part.states for part in parts]), _cat([part.scales for part in parts])
    return Collected(by_rule, states, scales, torch.cat([part.label_logprobs for part in parts]))


def _cat(parts: Sequence[dict[int, Tensor]]) -> dict[int, Tensor]:
    layers = {layer for part in parts for layer in part}
    return {layer: torch.cat([part[layer] for part in parts if layer in part]) for layer in sorted(layers)}
