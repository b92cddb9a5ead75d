"""Teachers in vLLM, in this process: quantised, mixture-of-experts and tensor-parallel ones, at the speed of a prefill.

    documents ─▶ vLLM's scheduler: chunked prefill, preemption, a step at a time ─▶ `vllm_worker`: targets on the host
              ─▶ rows of the cache, as soon as all documents of a row are done

One thread (`vllm_thread`) owns vLLM. It steps for as long as there are unfinished requests, whichever record batch they
belong to, so the teacher does not wait for the end of one. A row of several packed documents is as many requests: there
is no padding and no attention between documents. Equal to the transformers engine within rounding, not byte for byte:
what shares a step with a document is up to the scheduler.

vLLM is an optional dependency; its private interfaces are used in `vllm_worker.hook` alone. `open_vllm` refuses
versions that were not tested and compares a few tokens with vLLM's own prompt log-probabilities before anything is
written.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

import cache_format as cf
from pipeline.errors import ConfigError, ModelError
from pipeline.models.head_export import head_file
from pipeline.models.loading import config_fingerprint
from pipeline.teacher.engines.answers import Answer, AnswerSettings, Request, place_of, token_set
from pipeline.teacher.engines.chunked_selection import chunk_positions
from pipeline.teacher.engines.engine_config import Tokens
from pipeline.teacher.engines.interface import Measured, OnAnswers, OnBatch, RowRequest, Timing
from pipeline.teacher.engines.vllm.vllm_answers import answer_of, sampling_options
from pipeline.teacher.engines.vllm.vllm_collector import Collected, join
from pipeline.teacher.engines.vllm.vllm_thread import Document, VllmThread, fail, settle
from pipeline.teacher.engines.vllm.vllm_version import installed
from pipeline.teacher.targets import hidden_states
from pipeline.teacher.targets.cache_rows import cache_row
from pipeline.teacher.targets.rules import TargetRule

if TYPE_CHECKING:
    from vllm import LLMEngine, RequestOutput


PROBE_TOKENS = 24
PROBE_TOLERANCE = 1e-3
"""Nats. Both are computed from the same hidden states, in float32."""

T = TypeVar("T")


@contextmanager
def closed_on_error(engine: VllmEngine) -> Iterator[None]:
    """Checks of a new engine: it holds the memory of its device until it is closed."""
    try:
        yield
    except BaseException:
        engine.close()
        raise


@dataclass
class _Row:
    """A row in progress: the targets of its documents, in their order."""

    request: RowRequest
    parts: list[Collected | None]
    done: Future[list[cf.CacheRow]] = field(default_factory=Future)  # by rule
    ended: float = 0.0
    reported: bool = False


@dataclass(frozen=True)
class _RunningRows:
    """See `RunningRows`."""

    pending: Sequence[_Row]
    engine: VllmEngine
    began: float
    on_batch: OnBatch

    def rows(self, rule: int = 0) -> list[cf.CacheRow]:
        found = []
        for row in self.pending:
            found.append(row.done.result()[rule])
            if not row.reported:  # here and not in vLLM's thread, so that what it raises reaches the caller
                row.reported = True
                self.on_batch([row.request])
        return found

    def measured(self) -> list[Measured]:
        """As if all rows were one batch: what shares a step is up to the scheduler."""
        parts = [part for row in self.pending for part in row.parts if part is not None]
        selection = self.engine.selection_seconds()
        seconds = max(row.ended for row in self.pending) - self.began
        timing = Timing(
            tokens=sum(row.request.tokens for row in self.pending),
            forward=max(seconds - sum(selection), 1e-9),
            selection=selection,
        )
        logprobs = torch.cat([part.label_logprobs for part in parts]).numpy()
        return [Measured(requests=[row.request for row in self.pending], timing=timing, label_logprobs=logprobs)]


@dataclass(frozen=True)
class _Head:
    """See `StoredHead`."""

    layer: int
    width: int
    spec: cf.HeadSpec
    contents: bytes


class VllmEngine:
    """See `TeacherEngine`.

    Args:
        arguments: of vLLM's `EngineArgs`.
        vocab_size: V, without rows of padding in the output matrix.
        store_head: export the head, for hidden targets.
        timed: measure what the rows cost.
    """

    usage = None

    def __init__(
        self, arguments: dict[str, Any], *, vocab_size: int, store_head: bool = False, timed: bool = False
    ) -> None:
        self.vocab_size, self.timed = vocab_size, timed
        self._hidden: cf.HiddenSpec | None = None
        self._rules: list[TargetRule] = []
        self.libraries: Sequence[str] = ("torch", "transformers", *(installed() or ())[:1])
        self.batch_tokens: Tokens | None = None
        self._vllm = VllmThread(arguments)
        with closed_on_error(self):
            self.batch_size: int = self.call(lambda engine: engine.vllm_config.scheduler_config.max_num_seqs)
            self.rows_in_flight = 2 * self.batch_size
            self._vllm.rpc("distill_install", vocab_size)
            self.stored_head = self._head() if store_head else None

    def call(self, function: Callable[[LLMEngine], T]) -> T:
        """Runs it in vLLM's thread, between two steps."""
        return self._vllm.call(function)

    def close(self) -> None:
        """Ends the thread; requests in progress are dropped."""
        self._vllm.close()

    def _use(self, rules: Sequence[TargetRule]) -> None:
        if list(rules) != self._rules:
            self._vllm.rpc("distill_rules", [rule.to_json() for rule in rules], self.timed)
            self._rules = list(rules)

    # -- the teacher --------------------------------------------------------------------------------------------------

    @property
    def revision(self) -> str | None:
        return getattr(self.call(lambda engine: engine.model_config.hf_config), "_commit_hash", None)

    @property
    def eos_token_ids(self) -> set[int]:
        settings = self.call(lambda engine: engine.model_config.try_get_generation_config())
        return token_set(settings.get("eos_token_id"))

    @property
    def hidden(self) -> cf.HiddenSpec | None:
        return self._hidden

    @hidden.setter
    def hidden(self, spec: cf.HiddenSpec | None) -> None:
        layers, dtype = ((), "float16") if spec is None else (spec.layers, spec.dtype)
        self._vllm.rpc("distill_states", layers, self.layers()[0], dtype)
        self._hidden = spec

    def _head(self) -> _Head:
        ranks = self._vllm.rpc("distill_head", self.vocab_size)
        if len(ranks) > 1:
            raise ConfigError(
                "`targets=hidden`: the head of this teacher is spread over several processes. Use `targets=threshold`."
            )
        weight, bias, scale, softcap = ranks[0]
        layer, width = self.layers()
        return _Head(layer, width, *head_file(weight, bias, layer=layer, logit_scale=scale, softcap=softcap))

    def layers(self) -> tuple[int, int]:
        config = self.call(lambda engine: engine.model_config.hf_text_config)
        return int(config.num_hidden_layers), int(config.hidden_size)

    def describe_teacher(self) -> dict[str, str]:
        ranks = self._vllm.rpc("distill_weights")
        config = self.call(lambda engine: engine.model_config.hf_config)
        return {
            "architecture": ranks[0]["architecture"],
            "dtype": ranks[0]["dtype"],
            "weights_fingerprint": _together([rank["weights"] for rank in ranks]),
            "config_fingerprint": config_fingerprint(config),
        }

    def describe(self) -> dict[str, Any]:
        device, ranks = self.call(
            lambda engine: (
                engine.vllm_config.device_config.device_type,
                engine.vllm_config.parallel_config.tensor_parallel_size,
            )
        )
        return {
            "engine": "vllm",
            "device": device,
            "threads": torch.get_num_threads() if device == "cpu" else None,
            "batch_size": self.batch_size,
            "chunk_positions": chunk_positions(self.vocab_size),
            **({"tensor_parallel": ranks} if ranks > 1 else {}),
        }

    def check(self) -> None:
        """Compares targets with vLLM's own prompt log-probabilities of the same pass. Raises: ModelError."""
        rule = TargetRule(top_k=min(8, self.vocab_size))
        self._use([rule])
        output, collected = self._probe(prompt_logprobs=rule.top_k)
        targets, theirs = collected.targets[0], output.prompt_logprobs or []
        worst = 0.0 if len(targets.ids) == len(theirs) == len(output.prompt_token_ids or ()) else math.inf
        # Theirs begin with that of the second token; the last position has none.
        for ids, logprobs, own in zip(targets.ids.tolist(), targets.logprobs.tolist(), theirs[1:], strict=False):
            for token, logprob in zip(ids, logprobs, strict=True):
                worst = max(worst, abs(logprob - own[token].logprob) if token in own else math.inf)
        if not worst <= PROBE_TOLERANCE:
            raise ModelError(
                f"`engine` vllm: log-probabilities differ from vLLM's own by {worst:.2g} nats (allowed "
                f"{PROBE_TOLERANCE}), so distill does not see the hidden states that it expects of this model in "
                f"{' '.join(installed() or ())}. Use `engine=transformers`."
            )

    def check_states(self) -> None:
        """Checks that the states of every layer to store are collected. Raises: ModelError."""
        if self._hidden is None:
            return
        self._use([TargetRule(top_k=1)])
        output, collected = self._probe(with_states=True)
        tokens = len(output.prompt_token_ids or ())
        missing = [layer for layer in self._hidden.layers if len(collected.states.get(layer, ())) != tokens]
        if missing:
            raise ModelError(
                f"`engine` vllm: found no hidden states of {named_layers(missing)}, so distill cannot store those of "
                f"this model in {' '.join(installed() or ())}. Use `engine=transformers`."
            )

    def _probe(self, *, with_states: bool = False, **sampling: Any) -> tuple[RequestOutput, Collected]:
        """What vLLM and the collector give for a few tokens, at all positions."""
        tokens = min(PROBE_TOKENS, self.call(lambda engine: engine.model_config.max_model_len) - 1)
        result: Future[tuple[RequestOutput, Collected]] = Future()
        everywhere = np.ones(tokens, bool)
        document = self._vllm.document(
            np.random.default_rng(3).integers(self.vocab_size, size=tokens),
            everywhere,
            lambda *found: result.set_result(found),
            partial(fail, result),
            place=0,
            with_states=everywhere if with_states else None,
            **sampling,
        )
        self._vllm.submit([document])
        return result.result()

    # -- targets ------------------------------------------------------------------------------------------------------

    def run(
        self, requests: Sequence[RowRequest], rules: Sequence[TargetRule], on_batch: OnBatch = lambda _: None
    ) -> _RunningRows:
        self._use(rules)
        rows = [_Row(request, [None] * len(request.read.segment_lengths)) for request in requests]
        began = time.perf_counter()
        if self.timed:
            self.selection_seconds()  # of what ran before
        self._vllm.submit([each for row in rows for each in self._documents_of(row)])
        return _RunningRows(rows, self, began, on_batch)

    def selection_seconds(self) -> list[float]:
        """Seconds that the selection of targets took since the last call, by rule."""
        ranks: list[list[float]] = self._vllm.rpc("distill_seconds")
        return [max(each) for each in zip(*ranks, strict=True)]

    def _documents_of(self, row: _Row) -> Iterator[Document]:
        """A request for every segment of what the teacher reads for a row."""
        request, start = row.request, 0
        token_ids = np.asarray(request.read.input_ids)
        positions, places = np.flatnonzero(request.stored), request.places(request.stored)
        stored, states = np.zeros(len(token_ids), bool), None
        stored[places] = True
        if request.with_states is not None:
            states = np.zeros(len(token_ids), bool)
            states[request.places(request.with_states)] = True
        for i, length in enumerate(np.asarray(request.read.segment_lengths).tolist()):
            here = slice(start, start + length)
            # Within a segment, the teacher's places are the row's positions plus a constant.
            first = int(np.searchsorted(places, start))
            ahead = int(places[first] - positions[first]) if first < len(places) else 0

            def done(_: RequestOutput, collected: Collected, i: int = i) -> None:
                row.parts[i] = collected
                if all(part is not None for part in row.parts):
                    row.ended = time.perf_counter()
                    settle(row.done, lambda: self._rows(row))

            yield self._vllm.document(
                token_ids[here],
                stored[here],
                done,
                partial(fail, row.done),
                place=request.place,
                start=start - ahead,
                with_states=None if states is None else states[here],
            )
            start += length

    def _rows(self, row: _Row) -> list[cf.CacheRow]:
        request = row.request
        all_targets, states, scales, _ = join([part for part in row.parts if part is not None])
        rows = [cache_row(request.index, request.row, request.stored, targets) for targets in all_targets]
        if request.with_states is None:
            return rows
        assert self._hidden is not None
        # A step in which no position is chosen collects no layer.
        no_states, no_scales = hidden_states.nowhere(self._hidden)
        states, scales = no_states | states, no_scales | scales
        (found,) = hidden_states.of_rows(states, scales, [request.with_states], [request.index])
        return [replace(each, hidden=found) for each in rows]

    def generate(
        self, requests: Sequence[Request], settings: AnswerSettings, on_answers: OnAnswers = lambda _: None
    ) -> list[Answer]:
        self._use([settings.rule])
        documents, answers = [], []
        for request in requests:
            answer = Future[Answer]()

            def done(output: RequestOutput, collected: Collected, request: Request = request, answer=answer) -> None:
                settle(answer, lambda: answer_of(request, output, collected, settings))

            documents.append(
                self._vllm.document(
                    request.read,
                    np.arange(len(request.read)) == len(request.read) - 1,  # and all that are generated
                    done,
                    partial(fail, answer),
                    place=int(place_of(np.array([request.document]), np.array([request.index]))[0]),
                    start=-request.ahead,
                    **sampling_options(request, settings),
                )
            )
            answers.append(answer)
        self._vllm.submit(documents)
        for answer in as_completed(answers):
            on_answers([answer.result()])
        return [answer.result() for answer in answers]


def named_layers(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def _together(fingerprints: Sequence[str]) -> str:
    """One fingerprint for the parts of a teacher that is spread over several workers."""
    return fingerprints[0] if len(fingerprints) == 1 else hashlib.sha256("".join(fingerprints).encode()).hexdigest()
