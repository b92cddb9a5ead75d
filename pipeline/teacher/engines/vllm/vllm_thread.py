"""The thread that owns vLLM: requests go in, results of vLLM and of the collector come out.

It steps for as long as there are unfinished requests. Everything else that vLLM is asked for happens between two steps.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pipeline.errors import ModelError
from pipeline.models.loading import reason
from pipeline.teacher.engines.vllm.vllm_collector import KEY, Collected, Wanted

if TYPE_CHECKING:
    from vllm import LLMEngine, RequestOutput, SamplingParams

T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """A request to vLLM, and what to do with what it gives."""

    name: str
    token_ids: list[int]
    params: SamplingParams
    done: Callable[[RequestOutput, Collected], None]
    failed: Callable[[BaseException], None]


class VllmThread:
    """Owns vLLM: every call of it runs in one thread.

    Args:
        arguments: for vLLM's `EngineArgs`.

    Raises: what vLLM raises when it cannot load the model.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._inbox: queue.SimpleQueue[Callable[[LLMEngine], None] | None] = queue.SimpleQueue()
        self._names = itertools.count()
        self._documents: dict[str, Document] = {}
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._own, args=(arguments,), name="vllm", daemon=True)
        self._thread.start()
        try:
            self._ready.result()
        except BaseException:
            self._inbox.put(None)  # Ctrl-C: the thread ends when it has loaded the model
            raise

    def _own(self, arguments: dict[str, Any]) -> None:
        try:
            from vllm import EngineArgs, LLMEngine

            let_llvmlite_be_read()
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
                    engine.abort_request([*engine.output_processor.request_states], internal=True)
        engine.engine_core.shutdown()

    def _step(self, engine: LLMEngine) -> None:
        finished = [output for output in engine.step() if output.finished]
        if not finished:
            return
        names = [output.request_id for output in finished]
        found = next(each for each in engine.collective_rpc("distill_take", args=(names,)) if each is not None)
        for output, collected in zip(finished, found, strict=True):
            self._documents.pop(output.request_id).done(output, collected)

    def call(self, function: Callable[[LLMEngine], T]) -> T:
        """Runs it in vLLM's thread, between two steps."""
        result: Future[T] = Future()
        self._inbox.put(lambda engine: settle(result, lambda: function(engine)))
        return result.result()

    def rpc(self, method: str, *arguments: Any) -> list[Any]:
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

    def document(
        self,
        token_ids: np.ndarray,
        stored: np.ndarray,
        done: Callable[[RequestOutput, Collected], None],
        failed: Callable[[BaseException], None],
        *,
        place: int,
        start: int = 0,
        with_states: np.ndarray | None = None,
        **sampling: Any,
    ) -> Document:
        """A request for the targets of a text. Args: stored, with_states: bool [tokens]; the rest as in `Wanted`."""
        from vllm import SamplingParams

        wanted = Wanted(
            name=f"distill-{next(self._names)}",
            place=place,
            start=start,
            stored=np.packbits(stored).tobytes(),
            with_states=b"" if with_states is None else np.packbits(with_states).tobytes(),
        )
        options = {"max_tokens": 1, "detokenize": False, **sampling}
        params = SamplingParams(**options, extra_args={KEY: list(wanted)})
        return Document(wanted.name, np.asarray(token_ids).tolist(), params, done, failed)

    def submit(self, documents: Sequence[Document]) -> None:
        def job(engine: LLMEngine) -> None:
            for document in documents:
                self._documents[document.name] = document
                try:
                    engine.add_request(document.name, {"prompt_token_ids": document.token_ids}, document.params)
                except Exception as error:
                    del self._documents[document.name]
                    document.failed(ModelError(f"vLLM refuses a document of {len(document.token_ids)} tokens: {error}"))

        self._inbox.put(job)


def let_llvmlite_be_read() -> None:
    """Give llvmlite's library an empty `__dict__`.

    On a CPU, vLLM 0.32 reads the `__dict__` of every value in every module. llvmlite, which numba loads, takes that for
    a function of its library, and vLLM fails with "'_lib_fn_wrapper' object has no attribute 'get'".
    """
    if (ffi := sys.modules.get("llvmlite.binding.ffi")) is not None:
        getattr(ffi.lib, "_fntab", {})["__dict__"] = {}


def settle(future: Future[T], compute: Callable[[], T]) -> None:
    try:
        future.set_result(compute())
    except BaseException as error:
        future.set_exception(error)


def fail(future: Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
