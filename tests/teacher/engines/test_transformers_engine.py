"""A teacher engine through its interface alone: what another implementation has to do as well."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import cache_format as cf
from generating import load, logprobs_of
from pipeline.errors import ConfigError, ModelError
from pipeline.models.head import Head, open_head
from pipeline.teacher.engines.answers import Answer, AnswerSettings, Request
from pipeline.teacher.engines.interface import BatchSizeHalved, RowRequest, TeacherEngine
from pipeline.teacher.engines.transformers_engine import TransformersEngine
from pipeline.teacher.generation.generation_config import GenerationConfig
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.packing import TokenRow

V = 400
LENGTHS = (7, 30, 1, 19, 30)
TOP, TAIL = TargetRule(top_k=8), TargetRule(kind="threshold", tail_threshold=0.05)


def row_requests(lengths: Sequence[int] = LENGTHS) -> list[RowRequest]:
    """Rows of one document each, numbered from 10, every other position stored."""
    rng = np.random.default_rng(4)
    requests = []
    for i, length in enumerate(lengths):
        stored = np.arange(length) % 2 == 0
        row = TokenRow(rng.integers(3, V, length, dtype=np.int32), stored, np.array([length], np.int32))
        requests.append(RowRequest(index=10 + i, row=row, place=10 + i, stored=stored))
    return requests


def prompts(lengths: Sequence[int] = (5, 9, 2)) -> list[Request]:
    rng = np.random.default_rng(5)
    texts = [rng.integers(3, V, length, dtype=np.int32) for length in lengths]
    return [Request(document, index, text) for document, text in enumerate(texts) for index in range(2)]


@pytest.fixture(scope="module")
def model(teacher_dir: Path) -> PreTrainedModel:
    return load(teacher_dir)


@pytest.fixture(scope="module")
def settings(teacher_dir: Path) -> AnswerSettings:
    return AnswerSettings(
        tokenizer=AutoTokenizer.from_pretrained(teacher_dir),
        rule=TOP,
        sampling=GenerationConfig(max_new_tokens=6),
        stop_tokens=frozenset([0]),
        max_length=64,
    )


def engine(model: PreTrainedModel, *, batch_size: int = 2, divisible: bool = True) -> TeacherEngine:
    return TransformersEngine(
        open_head(model, V, masked=False), device=torch.device("cpu"), batch_size=batch_size, divisible=divisible
    )


def test_rows_come_in_order_with_the_teachers_own_probabilities(model: PreTrainedModel) -> None:
    requests = row_requests()
    running = engine(model).run(requests, [TOP, TAIL])
    for rule, found in ((TOP, running.rows(0)), (TAIL, running.rows(1))):
        assert [row.row for row in found] == [request.index for request in requests]
        for row, request in zip(found, requests, strict=True):
            np.testing.assert_array_equal(row.input_ids, request.row.input_ids)
            expected = logprobs_of(model, row.input_ids, V)
            targets = row.targets
            np.testing.assert_array_equal(targets.counts > 0, request.stored)
            for t in np.flatnonzero(request.stored):
                ids, logprobs = targets.at(int(t))
                exact = int(targets.exact_counts[t])
                np.testing.assert_allclose(logprobs[:exact], expected[t, ids[:exact]], atol=1e-4)
                if rule is TOP:
                    assert set(ids) == set(np.argsort(-expected[t])[:8])
                rest = np.delete(np.exp(expected[t]), ids[:exact]).sum()
                np.testing.assert_allclose(np.exp(targets.residual_logprob[t]), rest, atol=1e-4)
                entropy = -(np.exp(expected[t]) * expected[t]).sum()
                np.testing.assert_allclose(targets.entropy[t], entropy, atol=1e-3)


def test_a_row_depends_neither_on_its_batch_nor_on_its_place_in_it(model: PreTrainedModel) -> None:
    requests = row_requests()
    together = engine(model, batch_size=8).run(requests, [TAIL]).rows()
    backwards = engine(model, batch_size=1).run(requests[::-1], [TAIL]).rows()[::-1]
    for one, other in zip(together, backwards, strict=True):
        np.testing.assert_array_equal(one.targets.ids, other.targets.ids)
        np.testing.assert_allclose(one.targets.logprobs, other.targets.logprobs, atol=1e-4)


def test_every_batch_is_reported_once(model: PreTrainedModel) -> None:
    requests, seen = row_requests(), []
    engine(model, batch_size=2).run(requests, [TOP], seen.append)
    assert [len(batch) for batch in seen] == [2, 2, 1]
    assert sorted(each.index for batch in seen for each in batch) == [request.index for request in requests]


def test_answers_have_the_probabilities_of_a_plain_pass(model: PreTrainedModel, settings: AnswerSettings) -> None:
    requests, reported = prompts(), []
    answers = engine(model, batch_size=4).generate(requests, settings, reported.append)
    assert sorted((a.document, a.index) for a in answers) == [(r.document, r.index) for r in requests]
    assert [len(each) for each in reported] == [4, 2]
    for answer in answers:
        expected = logprobs_of(model, answer.row.input_ids, V)
        at = np.arange(answer.prompt_tokens - 1, len(answer.row.input_ids) - 1)
        np.testing.assert_allclose(answer.logprobs, expected[at, answer.token_ids], atol=1e-4)
        np.testing.assert_array_equal(np.flatnonzero(answer.row.loss_mask), at)
        np.testing.assert_array_equal(np.flatnonzero(answer.row.targets.counts), at)


def test_answers_do_not_depend_on_the_batch(model: PreTrainedModel, settings: AnswerSettings) -> None:
    def token_ids(answers: Sequence[Answer]) -> dict[tuple[int, int], list[int]]:
        return {(a.document, a.index): a.token_ids.tolist() for a in answers}

    alone = [engine(model).generate([request], settings)[0] for request in prompts()]
    assert token_ids(alone) == token_ids(engine(model, batch_size=6).generate(prompts(), settings))


def test_descriptions_can_be_written_to_a_manifest(model: PreTrainedModel) -> None:
    found = engine(model, batch_size=3)
    assert found.vocab_size == V
    assert json.loads(json.dumps(found.describe()))["batch_size"] == 3
    assert {"architecture", "dtype", *cf.FINGERPRINTS} == set(found.describe_teacher())
    assert all(isinstance(value, str) and value for value in found.describe_teacher().values())


def test_logits_that_are_not_finite_are_an_error_on_the_host(teacher_dir: Path, settings: AnswerSettings) -> None:
    broken = load(teacher_dir)
    with torch.no_grad():
        broken.model.norm.weight[5] = torch.nan
    found = TransformersEngine(
        Head(model=broken, linear=True, vocab_size=V, masked=False), device=torch.device("cpu"), batch_size=2
    )
    with pytest.raises(ModelError, match="row 1[0-4]"):
        found.run(row_requests(), [TOP]).rows()
    with pytest.raises(ModelError, match="prompt [012]"):
        found.generate(prompts(), settings)


# -- out of memory ----------------------------------------------------------------------------------------------------


class Memory:
    """A device with memory for `rows` rows; `held` are the batches whose tensors are alive."""

    def __init__(self, rows: int, patch: pytest.MonkeyPatch) -> None:
        self.held: weakref.WeakSet[Tensor] = weakref.WeakSet()
        states = Head.hidden_states

        def limited(head: Head, input_ids: Tensor, position_ids: Tensor, **_: object) -> Tensor:
            self.held.add(input_ids)
            if len(input_ids) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return states(head, input_ids, position_ids)

        patch.setattr(Head, "hidden_states", limited)


def test_out_of_memory_halves_the_batch_and_frees_it_first(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the time of `clear_device_cache` nothing may hold the batch, or its memory stays taken."""
    memory = Memory(2, monkeypatch)
    held: list[int] = []
    module = "pipeline.teacher.engines.transformers_engine"
    monkeypatch.setattr(
        f"{module}.clear_device_cache", lambda **_: held.append(sum(len(each) > 2 for each in memory.held))
    )
    found = engine(model, batch_size=8)
    gc.disable()  # what only a collection frees is not freed in time either
    try:
        for size in (4, 2):
            with pytest.raises(BatchSizeHalved):
                found.run(row_requests(), [TOP])
            assert found.batch_size == size
    finally:
        gc.enable()
    assert held == [0, 0]
    assert [row.row for row in found.run(row_requests(), [TOP]).rows()] == [10, 11, 12, 13, 14]


def test_out_of_memory_with_one_row_is_the_error_itself(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    Memory(0, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        engine(model, batch_size=1).run(row_requests(), [TOP])


def test_one_of_several_processes_does_not_halve_alone(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    Memory(1, monkeypatch)
    found = engine(model, batch_size=2, divisible=False)
    with pytest.raises(ConfigError, match="`batch_size` 2: out of memory"):
        found.run(row_requests(), [TOP])
    assert found.batch_size == 2


def test_other_errors_are_left_alone(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> cf.CacheRow:
        raise ZeroDivisionError

    found = engine(model, batch_size=2)
    monkeypatch.setattr(Head, "hidden_states", broken)
    with pytest.raises(ZeroDivisionError):
        found.run(row_requests(), [TOP])
    assert found.batch_size == 2
