"""A number of tokens per forward pass: how rows are put together, how the number is found, and what caches record."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import cache_format as cf
from generating import load
from pipeline.errors import ConfigError
from pipeline.models.head import Head, open_head
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.engines import transformers_engine
from pipeline.teacher.engines.engine_config import tokens_per_pass
from pipeline.teacher.engines.interface import BatchSizeHalved, RowRequest
from pipeline.teacher.engines.token_budget import batches_within, find_budget
from pipeline.teacher.engines.transformers_engine import TransformersEngine
from pipeline.teacher.generation.generate import generate_cache
from pipeline.teacher.generation.generation_config import GenerationConfig
from pipeline.teacher.progress import CaptureProgress
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.packing import TokenRow
from pipeline.teacher.writing.shard_sizes import rows_together
from tiny import completions, write_jsonl

V = 400
RULE = TargetRule(kind="threshold", tail_threshold=0.05)


def row_requests(lengths: list[int]) -> list[RowRequest]:
    rng = np.random.default_rng(4)
    requests = []
    for i, length in enumerate(lengths):
        stored = np.ones(length, bool)
        row = TokenRow(rng.integers(3, V, length, dtype=np.int32), stored, np.array([length], np.int32))
        requests.append(RowRequest(index=i, row=row, place=i, stored=stored))
    return requests


def settings(teacher: Path, text: Path, output: Path, **options: Any) -> CacheTeacherConfig:
    alone = {"packing": False} if options.get("generation") is None else {}
    data = DataConfig(data=str(text), sample_by="line", seq_len=48, **alone)
    options = {"targets": RULE, "rows_per_shard": 16, "device": "cpu", **options}
    return CacheTeacherConfig(teacher=str(teacher), data=data, output=str(output), **options)


@pytest.fixture(scope="module")
def model(teacher_dir: Path) -> PreTrainedModel:
    return load(teacher_dir)


# -- batches ---------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 60), max_size=30), tokens=st.integers(1, 200), padded=st.booleans())
def test_a_batch_takes_at_most_so_many_tokens_and_no_row_is_lost(lengths: list[int], tokens: int, padded: bool) -> None:
    requests = row_requests(sorted(lengths, reverse=True))
    batches = list(batches_within(requests, tokens, padded=padded))
    assert [each.index for batch in batches for each in batch] == list(range(len(lengths)))
    for i, batch in enumerate(batches):
        takes = [batch[0].tokens if padded else each.tokens for each in batch]
        assert len(batch) == 1 or sum(takes) <= tokens
        if i + 1 < len(batches):  # the next row would not fit
            more = takes[0] if padded else batches[i + 1][0].tokens
            assert sum(takes) + more > tokens


def test_rows_do_not_depend_on_the_number_of_tokens(model: PreTrainedModel) -> None:
    requests, head = row_requests([7, 30, 1, 19, 30]), open_head(model, V, masked=False)
    by_rows, by_tokens = (
        TransformersEngine(head, device=torch.device("cpu"), batch_size=2, batch_tokens=tokens) for tokens in (None, 40)
    )
    seen: list[int] = []
    found = by_tokens.run(requests, [RULE], lambda batch: seen.append(len(batch))).rows()
    assert seen == [1, 1, 2, 1]
    for one, other in zip(by_rows.run(requests, [RULE]).rows(), found, strict=True):
        np.testing.assert_array_equal(one.targets.ids, other.targets.ids)
        np.testing.assert_allclose(one.targets.logprobs, other.targets.logprobs, atol=1e-4)


# -- the search ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "speeds, expected",
    [
        ({100: 10.0, 200: 19.0, 400: 30.0, 800: 30.5, 1000: 99.0}, 400),  # stops where it is hardly faster
        ({100: 10.0, 200: 9.0, 400: 99.0}, 100),
        ({100: 10.0, 200: 20.0, 400: 40.0, 800: 80.0, 1000: 100.0}, 1000),  # at most
        ({100: 10.0, 200: 20.0}, 200),  # 400 do not fit
    ],
)
def test_the_number_is_doubled_until_it_is_no_use(speeds: dict[int, float], expected: int) -> None:
    def speed(tokens: int) -> float:
        if tokens not in speeds:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return speeds[tokens]

    assert find_budget(speed, fewest=100, most=1000) == expected


def test_a_search_does_not_hide_errors() -> None:
    def never(tokens: int) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def broken(tokens: int) -> float:
        if tokens > 1:
            raise ZeroDivisionError
        return 1.0

    with pytest.raises(torch.OutOfMemoryError):
        find_budget(never, fewest=1, most=8)
    with pytest.raises(ZeroDivisionError):
        find_budget(broken, fewest=1, most=8)


class Device:
    """A clock by which a pass takes 1 s and 1 s per 24 tokens; passes over more than `memory` tokens do not fit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, memory: int = 10**9) -> None:
        self.now, self.memory, self.passes = 0.0, memory, Counter[int]()
        states = Head.hidden_states

        def run(head: Head, input_ids: Tensor, *given: Any, **named: Any) -> Tensor:
            self.now += 1 + input_ids.numel() / 24
            self.passes[input_ids.numel()] += 1
            if input_ids.numel() > self.memory:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return states(head, input_ids, *given, **named)

        monkeypatch.setattr(Head, "hidden_states", run)
        monkeypatch.setattr(transformers_engine.time, "perf_counter", lambda: self.now)


@pytest.mark.parametrize("memory, expected", [(10**9, 384), (200, 192)])
def test_the_first_run_finds_the_number(
    memory: int, expected: int, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Speeds are 16, 19.2, 21.3, 22.6, 23.3 ... tokens/s: 5 % faster up to 384 tokens, 8 rows of 48."""
    engine = TransformersEngine(
        open_head(model, V, masked=False), device=torch.device("cpu"), batch_size=8, batch_tokens="auto"
    )
    device = Device(monkeypatch, memory)
    found = engine.run(row_requests([48, 10, 40]), [RULE])
    assert engine.batch_tokens == expected and len(found.rows()) == 3
    assert device.passes[48] == device.passes[expected] == 3
    device.passes.clear()
    engine.run(row_requests([48, 10, 40]), [RULE])
    assert device.passes == {3 * 48: 1}  # and uses it


# -- out of memory ---------------------------------------------------------------------------------


def test_out_of_memory_halves_what_the_batch_took(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TransformersEngine(
        open_head(model, V, masked=False), device=torch.device("cpu"), batch_size=8, batch_tokens=32_768
    )
    Device(monkeypatch, memory=100)
    requests = row_requests([48, 48, 48, 48])
    with pytest.raises(BatchSizeHalved):
        engine.run(requests, [RULE])
    assert engine.batch_tokens == 96 and engine.batch_size == 8
    assert len(engine.run(requests, [RULE]).rows()) == 4
    Device(monkeypatch, memory=0)
    with pytest.raises(BatchSizeHalved):
        engine.run(requests, [RULE])
    with pytest.raises(torch.OutOfMemoryError):  # one row
        engine.run(requests, [RULE])


def test_one_of_several_processes_does_not_halve_alone(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TransformersEngine(
        open_head(model, V, masked=False), device=torch.device("cpu"), batch_size=8, batch_tokens=96, divisible=False
    )
    Device(monkeypatch, memory=0)
    with pytest.raises(ConfigError, match="`batch_tokens` 96: out of memory"):
        engine.run(row_requests([48, 48]), [RULE])


# -- caches ----------------------------------------------------------------------------------------


def recorded(path: Path) -> list[dict[str, Any]]:
    return [json.loads(p.read_text())["annotations"] for p in sorted(path.glob("shards/*.json"))]


def test_a_cache_records_what_was_asked_for_and_every_shard_what_was_found(
    teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A continued run uses the number that it finds there; targets are those of any other batches."""
    cache_teacher(settings(teacher_dir, text_file, tmp_path / "rows"))
    device = Device(monkeypatch)
    seen: list[CaptureProgress] = []
    found = settings(teacher_dir, text_file, tmp_path / "cache", batch_tokens="auto")
    cache_teacher(found, on_progress=seen.append)
    cache = cf.open_cache(tmp_path / "cache")
    assert cache.metadata.capture["batch_tokens"] == "auto" and "batch_size" not in cache.metadata.capture
    numbers = {each["batch_tokens"] for each in recorded(tmp_path / "cache")}
    assert len(numbers) == 1 and numbers == {each.batch_tokens for each in seen} and max(numbers) > 300
    for one, other in zip(cache.iter_rows(), cf.open_cache(tmp_path / "rows").iter_rows(), strict=True):
        np.testing.assert_array_equal(one.targets.ids, other.targets.ids)

    last = max((tmp_path / "cache" / "shards").glob("*.json"))
    last.unlink()
    (tmp_path / "cache" / "manifest.json").rename(tmp_path / "cache" / "manifest.partial.json")
    before = device.passes.copy()
    cache_teacher(found)
    assert recorded(tmp_path / "cache")[-1]["batch_tokens"] in numbers
    assert max((device.passes - before).values()) < 3  # no size was tried

    cache_teacher(settings(teacher_dir, text_file, tmp_path / "given", batch_tokens=max(numbers)))
    assert recorded(tmp_path / "given") == recorded(tmp_path / "cache")


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"batch_tokens": 64, "batch_size": 4}, "`batch_tokens` 64: found `batch_size` too"),
        ({"batch_tokens": 0}, "`batch_tokens` 0: expected 1 or more"),
        ({"batch_tokens": "many"}, "`batch_tokens` many: expected a number or auto"),
        ({"batch_tokens": "auto", "tensor_parallel": True}, "`batch_tokens` auto: .* `tensor_parallel`"),
        ({"batch_tokens": 64, "generation": GenerationConfig()}, "`batch_tokens` 64: `generate` takes"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        settings(tmp_path, tmp_path, tmp_path, **options)


def test_cuda_counts_tokens_unless_rows_are_asked_for(tmp_path: Path) -> None:
    def of(device: str, **options: Any) -> Any:
        return tokens_per_pass(settings(tmp_path, tmp_path, tmp_path, **options), device)

    assert (of("cuda"), of("cpu")) == ("auto", None)
    assert of("cuda", batch_size=8) is of("cuda", generation=GenerationConfig()) is None
    assert of("cuda", tensor_parallel=True) is None
    assert of("cpu", batch_tokens=64) == of("cuda", batch_tokens=64) == 64


def test_a_record_batch_holds_one_pass(tmp_path: Path) -> None:
    plain = rows_together(settings(tmp_path, tmp_path, tmp_path))
    assert rows_together(settings(tmp_path, tmp_path, tmp_path, batch_tokens="auto")) == plain == 2**15 // 48
    assert rows_together(settings(tmp_path, tmp_path, tmp_path, batch_tokens=2**17)) == 2**17 // 48


def test_answers_of_a_writer_are_scored_by_tokens_and_written_by_rows(
    teacher_dir: Path, student_dir: Path, tmp_path: Path
) -> None:
    config = CacheTeacherConfig(
        teacher=str(teacher_dir),
        data=DataConfig(data=str(write_jsonl(tmp_path / "prompts.jsonl", completions(4)))),
        output=str(tmp_path / "cache"),
        generation=GenerationConfig(writer=str(student_dir), max_new_tokens=6),
        batch_size=2,
        batch_tokens=99,
        device="cpu",
    )
    generate_cache(config)
    assert recorded(tmp_path / "cache") == [{"batch_tokens": 99}]
