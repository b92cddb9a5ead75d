"""The thread that owns vLLM, and the answers made of its outputs, with a vLLM made by hand."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import ModelError
from pipeline.teacher.engines.answers import Request
from pipeline.teacher.engines.vllm.vllm_answers import answer_of
from pipeline.teacher.engines.vllm.vllm_collector import Collected
from pipeline.teacher.engines.vllm.vllm_thread import Document, VllmThread
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import draws, sparse_targets


class Failing:
    """An engine whose every step fails; it knows requests under names of its own."""

    def __init__(self) -> None:
        self.output_processor = SimpleNamespace(request_states={})
        self.engine_core = SimpleNamespace(shutdown=lambda: None)
        self.aborted: list[tuple[list[str], bool]] = []

    @classmethod
    def from_engine_args(cls, arguments: Any) -> Failing:
        return cls()

    def has_unfinished_requests(self) -> bool:
        return bool(self.output_processor.request_states)

    def add_request(self, name: str, prompt: Any, params: Any) -> None:
        self.output_processor.request_states[f"{name}-internal"] = prompt

    def step(self) -> list[Any]:
        raise RuntimeError("out of memory")

    def abort_request(self, names: list[str], internal: bool = False) -> None:
        self.aborted.append((names, internal))
        for name in names:
            self.output_processor.request_states.pop(name if internal else f"{name}-internal", None)


def test_requests_of_a_failed_step_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("vllm")
    module.EngineArgs, module.LLMEngine = dict, Failing
    monkeypatch.setitem(sys.modules, "vllm", module)
    thread, errors = VllmThread({}), []
    params: Any = None
    thread.submit([Document(name, [1, 2], params, lambda *_: None, errors.append) for name in ("a", "b")])
    aborted, left = [], True
    for _ in range(1000):  # each between two steps
        aborted, left = thread.call(lambda engine: (engine.aborted, engine.has_unfinished_requests()))  # type: ignore[attr-defined]
        if not left:
            break
    thread.close()
    assert aborted == [(["a-internal", "b-internal"], True)] and not left
    assert [str(error) for error in errors] == ["out of memory"] * 2


def test_logits_that_are_not_finite_name_the_row_of_the_prompt() -> None:
    rule, at = TargetRule(top_k=2), np.arange(3)
    logits = torch.randn((3, 8))
    logits[1] = torch.nan
    targets = sparse_targets(logits, rule, draws(rule, np.zeros(3, np.int64), at))
    own = [{token: SimpleNamespace(logprob=-1.0)} for token in (4, 5, 6)]
    written = SimpleNamespace(token_ids=[4, 5, 6], finish_reason="length", stop_reason=None, logprobs=own)
    output: Any = SimpleNamespace(outputs=[written])
    settings: Any = None
    with pytest.raises(ModelError, match="row 7, position 3: the teacher's logits hold NaN"):
        answer_of(
            Request(7, 0, np.array([1, 2, 3], np.int32)), output, Collected([targets], {}, {}, torch.zeros(0)), settings
        )
