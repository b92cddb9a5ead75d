"""Teachers in vLLM, in this process: quantised, mixture-of-experts and tensor-parallel ones, at the speed of a prefill.

    documents ─▶ vLLM's scheduler: chunked prefill, preemption, a step at a time ─▶ `vllm_worker`: targets on the host
              ─▶ rows of the cache, as soon as all documents of a row are done

One thread owns vLLM. It steps for as long as there are unfinished requests, whichever record batch they belong to, so
the teacher does not wait for the end of one. A row of several packed documents is as many requests: there is no padding
and no attention between documents. Equal to the transformers engine within rounding, not byte for byte: what shares a
step with a document is up to the scheduler.

vLLM is an optional dependency; its private interfaces are used in `vllm_worker.hook` alone. `open_vllm` refuses
versions that were not tested and compares a few tokens with vLLM's own prompt log-probabilities before anything is
written.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

import cache_format as cf
from pipeline.errors import ConfigError, ModelError
from pipeline.models.head_export import head_file
from pipeline.models.loading import config_fingerprint, reason
from pipeline.teacher.engines.interface import Measured, OnAnswers, OnBatch, RowRequest, Timing
from pipeline.teacher.engines.vllm_answers import answer_of, sampling_params
from pipeline.teacher.engines.vllm_version import installed
from pipeline.teacher.engines.vllm_worker import CHUNK_POSITIONS, KEY, Collected, Wanted, join
from pipeline.teacher.generation.answers import Answer, AnswerSettings, Request, token_set
from pipeline.teacher.targets import hidden_states
from pipeline.teacher.targets.cache_rows import cache_row
from pipeline.teacher.targets.rules import TargetRule

if TYPE_CHECKING:
    from vllm import LLMEngine, RequestOutput, SamplingParams


PROBE_TOKENS = 24
PROBE_TOLERANCE = 1e-3
"""Nats. Both are computed from the same hidden states, in float32."""

T = TypeVar("T")


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


@dataclass(frozen=True)
class _Document:
    """A request to vLLM, and what to do with what it gives."""

    token_ids: list[int]
    params: SamplingParams
    done: Callable[[RequestOutput, Collected], None]
    failed: Callable[[BaseException], None]


class VllmEngine:
    """See `TeacherEngine`. Owns the thread that owns vLLM.

    Args:
        arguments: of vLLM's `EngineArgs`.
        vocab_size: V, without rows of padding in the output matrix.
        store_head: export the head, for hidden targets.
        timed: measure what the rows cost.
    """

    def __init__(
        self, arguments: dict[str, Any], *, vocab_size: int, store_head: bool = False, timed: bool = False
    ) -> None:
        self.vocab_size, self.timed = vocab_size, timed
        self._hidden: cf.HiddenSpec | None = None
        self._inbox: queue.SimpleQueue[Callable[[LLMEngine], None] | None] = queue.SimpleQueue()
        self._names = itertools.count()
        self._documents: dict[str, _Document] = {}
        self._rules: list[TargetRule] = []
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._own, args=(arguments,), name="vllm", daemon=True)
        self._thread.start()
        self._ready.result()
        self.batch_size: int = self.call(lambda engine: engine.vllm_config.scheduler_config.max_num_seqs)
        self.rows_in_flight = 2 * self.batch_size
        self.libraries: Sequence[str] = ("torch", "transformers", *(installed() or ())[:1])
        self._rpc("distill_install", vocab_size)
        self.stored_head = self._head() if store_head else None

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _own(self, arguments: dict[str, Any]) -> None:
        try:
            from vllm import EngineArgs, LLMEngine

            engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        while True:
            with contextlib.suppress(queue.Empty):
                job = self._inbox.get(block=not engine.has_unfinished_requests())
                if job is None:
                    break
                job(engine)
                continue  # all that is waiting, before the next step
            try:
                self._step(engine)
            except BaseException as error:
                documents, self._documents = list(self._documents.values()), {}
                for document in documents:
                    document.failed(error)
                with contextlib.suppress(Exception):
                    engine.abort_request([*engine.output_processor.request_states])
        engine.engine_core.shutdown()

    def _step(self, engine: LLMEngine) -> None:
        finished = [output for output in engine.step() if output.finished]
        if not finished:
            return
        names = [output.request_id for output in finished]
        found = next(each for each in engine.collective_rpc("distill_take", args=(names,)) if each is not None)
        for output, collected in zip(finished, found, strict=True):
            self._documents.pop(output.request_id).done(output, collected)

    def call(self, function: Callable[[LLMEngine], Any]) -> Any:
        """Runs it in vLLM's thread, between two steps."""
        result: Future[Any] = Future()
        self._inbox.put(lambda engine: _settle(result, lambda: function(engine)))
        return result.result()

    def _rpc(self, method: str, *arguments: Any) -> list[Any]:
        """The answers of all workers. Raises: ModelError with what a worker complains of."""
        try:
            found: list[Any] = self.call(lambda engine: engine.collective_rpc(method, args=arguments))
        except RuntimeError as error:
            raise ModelError(f"`engine` vllm: {reason(error)}. Use `engine` transformers.") from error
        return found

    def close(self) -> None:
        """Ends the thread; requests in progress are dropped."""
        self._inbox.put(None)
        self._thread.join()

    def _submit(self, documents: Sequence[tuple[str, _Document]]) -> None:
        def job(engine: LLMEngine) -> None:
            for name, document in documents:
                self._documents[name] = document
                try:
                    engine.add_request(name, {"prompt_token_ids": document.token_ids}, document.params)
                except Exception as error:
                    del self._documents[name]
                    document.failed(ModelError(f"vLLM refuses a document of {len(document.token_ids)} tokens: {error}"))

        self._inbox.put(job)

    def _use(self, rules: Sequence[TargetRule]) -> None:
        if list(rules) != self._rules:
            self._rpc("distill_rules", [rule.to_json() for rule in rules], self.timed)
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
        self._rpc("distill_states", layers, self.layers()[0], dtype)
        self._hidden = spec

    def _head(self) -> _Head:
        ranks = self._rpc("distill_head", self.vocab_size)
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
        ranks = self._rpc("distill_weights")
        config = self.call(lambda engine: engine.model_config.hf_config)
        return {
            "architecture": ranks[0]["architecture"],
            "dtype": ranks[0]["dtype"],
            "weights_fingerprint": _together([rank["weights"] for rank in ranks]),
            "config_fingerprint": config_fingerprint(config),
        }

    def describe(self) -> dict[str, Any]:
        device = self.call(lambda engine: engine.vllm_config.device_config.device_type)
        return {
            "engine": "vllm",
            "device": device,
            "threads": torch.get_num_threads() if device == "cpu" else None,
            "batch_size": self.batch_size,
            "chunk_positions": CHUNK_POSITIONS,
        }

    def check(self) -> None:
        """Compares targets with vLLM's own prompt log-probabilities of the same pass. Raises: ModelError."""
        from vllm import SamplingParams

        rule = TargetRule(top_k=min(8, self.vocab_size))
        self._use([rule])
        token_ids = np.random.default_rng(3).integers(self.vocab_size, size=PROBE_TOKENS).tolist()
        name = f"distill-{next(self._names)}"
        wanted = Wanted(name=name, place=0, start=0, stored=np.packbits(np.ones(PROBE_TOKENS, bool)).tobytes())
        params = SamplingParams(
            max_tokens=1, prompt_logprobs=rule.top_k, detokenize=False, extra_args={KEY: list(wanted)}
        )
        result: Future[tuple[RequestOutput, Collected]] = Future()
        document = _Document(token_ids, params, lambda *found: result.set_result(found), partial(_fail, result))
        self._submit([(name, document)])
        output, collected = result.result()
        targets, theirs = collected.targets[0], output.prompt_logprobs or []
        worst = 0.0 if len(targets.ids) == len(theirs) == PROBE_TOKENS else math.inf
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

    # -- targets ------------------------------------------------------------------------------------------------------

    def run(
        self, requests: Sequence[RowRequest], rules: Sequence[TargetRule], on_batch: OnBatch = lambda _: None
    ) -> _RunningRows:
        self._use(rules)
        rows = [_Row(request, [None] * len(request.read.segment_lengths)) for request in requests]
        began = time.perf_counter()
        if self.timed:
            self.selection_seconds()  # of what ran before
        self._submit([each for row in rows for each in self._documents_of(row)])
        return _RunningRows(rows, self, began, on_batch)

    def selection_seconds(self) -> list[float]:
        """Seconds that the selection of targets took since the last call, by rule."""
        ranks: list[list[float]] = self._rpc("distill_seconds")
        return [max(each) for each in zip(*ranks, strict=True)]

    def _documents_of(self, row: _Row) -> Iterator[tuple[str, _Document]]:
        """A request for every segment of what the teacher reads for a row."""
        from vllm import SamplingParams

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
            name = f"distill-{next(self._names)}"
            # Within a segment, the teacher's places are the row's positions plus a constant.
            first = int(np.searchsorted(places, start))
            ahead = int(places[first] - positions[first]) if first < len(places) else 0
            wanted = Wanted(
                name=name,
                place=request.place,
                start=start - ahead,
                stored=np.packbits(stored[here]).tobytes(),
                with_states=b"" if states is None else np.packbits(states[here]).tobytes(),
            )
            params = SamplingParams(max_tokens=1, detokenize=False, extra_args={KEY: list(wanted)})

            def done(_: RequestOutput, collected: Collected, i: int = i) -> None:
                row.parts[i] = collected
                if all(part is not None for part in row.parts):
                    row.ended = time.perf_counter()
                    _settle(row.done, lambda: self._rows(row))

            yield name, _Document(token_ids[here].tolist(), params, done, partial(_fail, row.done))
            start += length

    def _rows(self, row: _Row) -> list[cf.CacheRow]:
        request = row.request
        all_targets, states, scales, _ = join([part for part in row.parts if part is not None])
        rows = [cache_row(request.index, request.row, request.stored, targets) for targets in all_targets]
        if request.with_states is None:
            return rows
        (found,) = hidden_states.of_rows(states, scales, [request.with_states], [request.index])
        return [replace(each, hidden=found) for each in rows]

    def generate(
        self, requests: Sequence[Request], settings: AnswerSettings, on_answers: OnAnswers = lambda _: None
    ) -> list[Answer]:
        self._use([settings.rule])
        documents, answers = [], []
        for request in requests:
            name, answer = f"distill-{next(self._names)}", Future[Answer]()

            def done(output: RequestOutput, collected: Collected, request: Request = request, answer=answer) -> None:
                _settle(answer, lambda: answer_of(request, output, collected, settings))

            params = sampling_params(name, request, settings)
            documents.append((name, _Document(np.asarray(request.read).tolist(), params, done, partial(_fail, answer))))
            answers.append(answer)
        self._submit(documents)
        for answer in as_completed(answers):
            on_answers([answer.result()])
        return [answer.result() for answer in answers]


def _together(fingerprints: Sequence[str]) -> str:
    """One fingerprint for the parts of a teacher that is spread over several workers."""
    return fingerprints[0] if len(fingerprints) == 1 else hashlib.sha256("".join(fingerprints).encode()).hexdigest()


def _settle(future: Future[T], compute: Callable[[], T]) -> None:
    try:
        future.set_result(compute())
    except BaseException as error:
        future.set_exception(error)


def _fail(future: Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
