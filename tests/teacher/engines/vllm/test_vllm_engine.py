"""The vLLM engine with a real vLLM: `make test-vllm`."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

import cache_format as cf
from generating import load, logprobs_of
from pipeline.errors import ConfigError, ModelError
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.engines.answers import AnswerSettings, Request
from pipeline.teacher.engines.engine_config import EngineConfig
from pipeline.teacher.engines.interface import RowRequest
from pipeline.teacher.engines.vllm.vllm_collector import StepTargets
from pipeline.teacher.engines.vllm.vllm_engine import VllmEngine
from pipeline.teacher.engines.vllm.vllm_opening import open_vllm
from pipeline.teacher.generation.generate import generate_cache
from pipeline.teacher.generation.generation_config import GenerationConfig
from pipeline.teacher.plan import plan_cache
from pipeline.teacher.targets.hidden_rule import HiddenRule
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.text.packing import TokenRow
from pipeline.teacher.verification import verify_against_teacher
from pipeline.teacher.verify_config import TeacherCheckConfig
from tiny import completions, english, write_jsonl

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

V = 400
COMMON: dict[str, Any] = {  # vLLM's attention on a CPU takes heads of 64 numbers and more
    "vocab_size": V,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**COMMON, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**COMMON, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**COMMON, sliding_window=16),
    "mixture of experts": MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "soft-capping": Gemma2Config(**COMMON, sliding_window=16, final_logit_softcapping=6.0, attn_logit_softcapping=None),
}
TOP, TAIL = TargetRule(top_k=8), TargetRule(kind="threshold", tail_threshold=0.05)


@pytest.fixture(scope="module", autouse=True)
def small_cache() -> Iterator[None]:
    import numba  # noqa: F401, as when packed targets were decoded before vLLM is loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("teachers"), {}
    for name, config in ARCHITECTURES.items():
        found[name] = folder / name.replace(" ", "-")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            AutoModelForCausalLM.from_config(config).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(english(60), encoding="utf-8")
    return path


def config_of(teacher: Path, data: Path, output: Path, **options: Any) -> CacheTeacherConfig:
    """A few shards of packed rows, by vLLM unless `running` says otherwise."""
    options = {"running": EngineConfig(engine="vllm"), "rows_per_shard": 16, **options}
    of_data = {"seq_len": 48, "sample_by": "line", **options.pop("of_data", {})}
    return CacheTeacherConfig(
        teacher=str(teacher), data=DataConfig(data=str(data), **of_data), output=str(output), **options
    )


def agrees(cache: Path, teacher: Path) -> bool:
    """Computed again by transformers, the numbers are those of the cache."""
    check = verify_against_teacher(TeacherCheckConfig(cache=str(cache), teacher=str(teacher), rows=12))
    return check.agrees and check.same_entries > 0.99


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_targets_are_those_of_transformers(
    architecture: str, teachers: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    cache_teacher(config_of(teachers[architecture], text, tmp_path / "cache"))
    cache = cf.open_cache(tmp_path / "cache")
    assert cache.metadata.capture["engine"] == "vllm" and cache.num_rows > 32
    assert agrees(tmp_path / "cache", teachers[architecture])


@pytest.mark.parametrize("architecture", ["llama", "soft-capping"])
def test_hidden_states_and_the_head_are_those_of_transformers(
    architecture: str, teachers: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    hidden = HiddenRule(layers="0,1,3", every=2, dtype="int8")
    cache_teacher(config_of(teachers[architecture], text, tmp_path / "states", hidden=hidden))
    cache_teacher(config_of(teachers[architecture], text, tmp_path / "full", targets=TargetRule(kind="hidden")))
    assert agrees(tmp_path / "states", teachers[architecture])
    assert agrees(tmp_path / "full", teachers[architecture])


def test_a_step_without_hidden_states(teachers: dict[str, Path], tmp_path: Path) -> None:
    """One document in a step, so that the second row has no chosen position in any."""
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in ("The miller and his wife", "Well")])
    options: dict[str, Any] = {
        "of_data": {"sample_by": "document", "packing": False},
        "running": EngineConfig(engine="vllm", engine_args={"max_num_seqs": 1}),
        "hidden": HiddenRule(layers="1,3", every=40, dtype="int8"),
    }
    cache_teacher(config_of(teachers["llama"], data, tmp_path / "cache", **options))
    rows = list(cf.open_cache(tmp_path / "cache").iter_rows())
    assert [row.hidden.mask.sum() for row in rows if row.hidden is not None] == [1, 0]
    assert agrees(tmp_path / "cache", teachers["llama"])


def test_a_teacher_with_prompts_of_its_own(teachers: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row["completion"], "teacher_prompt": hint + row["prompt"]}
        for row, hint in zip(completions(24), english(60).splitlines(), strict=False)
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    options: dict[str, Any] = {
        "of_data": {"sample_by": "document", "teacher_seq_len": 400},
        "hidden": HiddenRule(layers="1,3", every=2),
        "targets": TAIL,
    }
    cache_teacher(config_of(teachers["llama"], data, tmp_path / "cache", **options))
    cache = cf.open_cache(tmp_path / "cache")
    assert any(len(row.segment_lengths) > 1 for row in cache.iter_rows())
    assert agrees(tmp_path / "cache", teachers["llama"])

    options = {"of_data": {"sample_by": "document", "seq_len": 200, "teacher_seq_len": 400}}
    options["generation"] = GenerationConfig(max_new_tokens=8)
    generate_cache(config_of(teachers["llama"], data, tmp_path / "answers", **options))
    assert agrees(tmp_path / "answers", teachers["llama"])


def test_a_killed_run_is_continued(teachers: dict[str, Path], text: Path, tmp_path: Path) -> None:
    whole = config_of(teachers["llama"], text, tmp_path / "whole")
    cache_teacher(whole)
    config = config_of(teachers["llama"], text, tmp_path / "cache")
    seen = []

    def interrupt(progress: Any) -> None:
        seen.append(progress)
        if progress.rows >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_teacher(config, on_progress=interrupt)
    with pytest.raises(cf.MismatchError, match=r"capture\.engine"):
        cache_teacher(config_of(teachers["llama"], text, tmp_path / "cache", running=EngineConfig()))
    summary = cache_teacher(config)
    assert summary.resumed_rows == 16 and summary.finished
    rows = zip(
        cf.open_cache(tmp_path / "cache").iter_rows(), cf.open_cache(tmp_path / "whole").iter_rows(), strict=True
    )
    for one, other in rows:
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_allclose(one.targets.entropy, other.targets.entropy, atol=0.05)  # as stored
    assert agrees(tmp_path / "cache", teachers["llama"])


def test_answers_and_their_targets(teachers: dict[str, Path], tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "The miller " * n} for n in range(1, 5)])
    generation = GenerationConfig(max_new_tokens=12, answers_per_prompt=3, temperature=0.7)
    of_data = {"sample_by": "document"}
    config = config_of(teachers["qwen3"], prompts, tmp_path / "cache", of_data=of_data, generation=generation)
    summary = generate_cache(config)
    assert summary.answers == 12
    assert agrees(tmp_path / "cache", teachers["qwen3"])
    model = load(teachers["qwen3"])
    cache = cf.open_cache(tmp_path / "cache")
    for line, row in zip(cache.answers(), cache.iter_rows(), strict=True):
        expected = logprobs_of(model, row.input_ids, V)
        at = np.flatnonzero(row.loss_mask)
        np.testing.assert_allclose(line["token_logprobs"], expected[at, row.input_ids[at + 1]], atol=1e-3)


def test_rows_of_padding_are_neither_sampled_nor_counted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Half of the probability of this teacher is on rows of its output matrix that stand for no token."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        padded = LlamaConfig(**{**COMMON, "vocab_size": 2 * V, "initializer_range": 0.02}, tie_word_embeddings=False)
        AutoModelForCausalLM.from_config(padded).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "The miller " * n} for n in range(1, 5)])
    config = config_of(tmp_path / "teacher", prompts, tmp_path / "cache", of_data={"sample_by": "document"})
    generate_cache(config, GenerationConfig(max_new_tokens=12, answers_per_prompt=2))
    model, cache = load(tmp_path / "teacher"), cf.open_cache(tmp_path / "cache")
    for line, row in zip(cache.answers(), cache.iter_rows(), strict=True):
        assert row.input_ids.max() < V
        at, expected = np.flatnonzero(row.loss_mask), logprobs_of(model, row.input_ids, V)
        np.testing.assert_allclose(line["token_logprobs"], expected[at, row.input_ids[at + 1]], atol=1e-3)


def test_a_student_writes_and_the_teacher_scores(teachers: dict[str, Path], tmp_path: Path) -> None:
    """Two engines in one process, one after the other; the first leaves no model behind."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "The miller " * n} for n in range(1, 5)])
    generation = GenerationConfig(max_new_tokens=12, answers_per_prompt=2, writer=str(teachers["llama"]))
    of_data = {"sample_by": "document"}
    config = config_of(teachers["qwen3"], prompts, tmp_path / "cache", of_data=of_data, generation=generation)
    models: list[int] = []

    def stage(name: str) -> None:
        if name.startswith("scoring"):
            gc.collect()
            models.append(sum(type(each).__name__ == "LlamaForCausalLM" for each in gc.get_objects()))

    assert generate_cache(config, on_stage=stage).rows == 8
    assert models == [0] and agrees(tmp_path / "cache", teachers["qwen3"])
    model, cache = load(teachers["llama"]), cf.open_cache(tmp_path / "cache")
    for line, row in zip(cache.answers(), cache.iter_rows(), strict=True):
        expected, at = logprobs_of(model, row.input_ids, V), np.flatnonzero(row.loss_mask)
        np.testing.assert_allclose(line["token_logprobs"], expected[at, row.input_ids[at + 1]], atol=1e-3)


def test_plan_measures_it(teachers: dict[str, Path], text: Path, tmp_path: Path) -> None:
    plan = plan_cache(config_of(teachers["llama"], text, tmp_path / "cache"), sample_rows=8)
    assert len(plan.rules) == 6 and all(rule.tokens_per_s > 0 for rule in plan.rules)
    assert plan.position_loss is not None and plan.position_loss.first.beginning is not None
    assert not (tmp_path / "cache").exists()


def test_answers_do_not_depend_on_what_shares_the_steps(teachers: dict[str, Path]) -> None:
    engine_args = {"max_num_batched_tokens": 128, "max_num_seqs": 4}
    engine = open_vllm(
        str(teachers["llama"]), vocab_size=V, seq_len=100, dtype="auto", engine_args=engine_args, generates=True
    )
    settings = AnswerSettings(
        tokenizer=AutoTokenizer.from_pretrained(teachers["llama"]),
        rule=TOP,
        sampling=GenerationConfig(max_new_tokens=8),
        stop_tokens=frozenset([0]),
        max_length=128,
    )
    rng = np.random.default_rng(5)
    requests = [Request(i, 0, rng.integers(3, V, 20 + i, dtype=np.int32)) for i in range(6)]
    seen: list[int] = []
    answers = engine.generate(requests, settings, lambda each: seen.extend(one.document for one in each))
    together = {each.document: each.token_ids.tolist() for each in answers}
    assert sorted(seen) == sorted(together) == list(range(6))
    for request in requests[:3]:
        (alone,) = engine.generate([request], settings)
        assert alone.token_ids.tolist() == together[request.document]
    engine.close()


def test_documents_shorter_than_the_probe(teachers: dict[str, Path]) -> None:
    engine = open_vllm(str(teachers["llama"]), vocab_size=V, seq_len=6, dtype="auto", engine_args={})
    assert [len(row.targets.counts) for row in engine.run(requests_of([[6], [2, 3]]), [TOP]).rows()] == [6, 5]
    engine.close()


# -- one engine, used directly ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowded(teachers: dict[str, Path]) -> Iterator[VllmEngine]:
    """Steps of 32 tokens, and so little memory for keys and values that documents are preempted."""
    engine_args = {"max_num_batched_tokens": 32, "max_num_seqs": 8, "num_gpu_blocks_override": 8, "block_size": 32}
    engine = open_vllm(str(teachers["llama"]), vocab_size=V, seq_len=128, dtype="auto", engine_args=engine_args)
    yield engine
    engine.close()


def requests_of(lengths: list[list[int]]) -> list[RowRequest]:
    rng = np.random.default_rng(4)
    requests = []
    for i, segments in enumerate(lengths):
        stored = np.arange(sum(segments)) % 2 == 0
        row = TokenRow(rng.integers(3, V, sum(segments), dtype=np.int32), stored, np.array(segments, np.int32))
        requests.append(RowRequest(index=i, row=row, place=i, stored=stored))
    return requests


def test_neither_steps_nor_preemption_change_targets(crowded: VllmEngine, teachers: dict[str, Path]) -> None:
    requests = requests_of([[100, 7], [1, 1, 90], [120], [3], [60, 60], [128], [110]])
    running, again = crowded.run(requests, [TOP, TAIL]), crowded.run(requests[:2], [TOP, TAIL])
    model = load(teachers["llama"])
    for row, request in zip(running.rows(0), requests, strict=True):
        start = 0
        for length in request.row.segment_lengths:
            expected = logprobs_of(model, row.input_ids[start : start + length], V)
            for t in range(length):
                ids, logprobs = row.targets.at(start + t)
                assert len(ids) == (8 if request.stored[start + t] else 0)
                np.testing.assert_allclose(logprobs, expected[t, ids], atol=1e-3)
            start += length
    for one, other in zip(again.rows(1), running.rows(1)[:2], strict=True):
        np.testing.assert_array_equal(one.targets.ids, other.targets.ids)


def test_logits_that_are_not_finite_stop_the_row(crowded: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    add = StepTargets.add
    monkeypatch.setattr(StepTargets, "add", lambda self, hidden, spans: add(self, hidden * np.nan, spans))
    with pytest.raises(ModelError, match="row 0, position 0"):
        crowded.run(requests_of([[5], [6]]), [TOP]).rows()
    monkeypatch.undo()
    assert len(crowded.run(requests_of([[5]]), [TOP]).rows()) == 1  # the engine goes on


def test_a_document_that_does_not_fit_is_an_error(crowded: VllmEngine) -> None:
    with pytest.raises(ModelError, match="a document of 400 tokens"):
        crowded.run(requests_of([[400]]), [TOP]).rows()


def test_the_sampled_tail_is_unbiased(teachers: dict[str, Path]) -> None:
    """Σw = 1 and Σw·f = Σp·f on average over 10^5 positions, within four standard errors."""
    length, texts, rows = 128, 16, 800
    engine_args = {"max_num_batched_tokens": 2048}
    engine = open_vllm(str(teachers["llama"]), vocab_size=V, seq_len=length, dtype="auto", engine_args=engine_args)
    rng, stored = np.random.default_rng(6), np.ones(length, bool)
    ids = rng.integers(3, V, (texts, length), dtype=np.int32)
    segments = np.array([length], np.int32)
    requests = [
        RowRequest(index=i, row=TokenRow(ids[i % texts], stored, segments), place=i, stored=stored) for i in range(rows)
    ]
    f = rng.normal(size=V)
    model = load(teachers["llama"])
    expected = np.stack([np.exp(logprobs_of(model, each, V)) @ f for each in ids])
    sums, errors = [], []
    for row in engine.run(requests, [TAIL]).rows():
        position = np.repeat(np.arange(length), row.targets.counts)
        weights = np.exp(row.targets.logprobs.astype(np.float64))
        sums.append(np.bincount(position, weights, length) - 1.0)
        errors.append(np.bincount(position, weights * f[row.targets.ids], length) - expected[row.row % texts])
    engine.close()
    for found in (np.concatenate(sums), np.concatenate(errors)):
        assert len(found) > 10**5 and found.std() > 0.01
        assert abs(found.mean()) < 4 * found.std() / np.sqrt(len(found))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_teacher_on_two_ranks(
    teachers: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, *_ = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{first}|{second}")  # else vLLM wants a NUMA node for each rank
    running = EngineConfig(engine="vllm", tensor_parallel_size=2)
    cache_teacher(config_of(teachers["soft-capping"], text, tmp_path / "cache", running=running))
    assert cf.open_cache(tmp_path / "cache").metadata.capture["tensor_parallel"] == 2
    assert agrees(tmp_path / "cache", teachers["soft-capping"])


# -- what is refused --------------------------------------------------------------------------------------------------


def test_hidden_states_other_than_vllms_own_are_refused(
    teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe at the start: here the states are off by one position."""
    add = StepTargets.add
    monkeypatch.setattr(StepTargets, "add", lambda self, hidden, spans: add(self, hidden.roll(1, 0), spans))
    before = threading.enumerate()
    with pytest.raises(ModelError, match="differ from vLLM's own"):
        open_vllm(str(teachers["llama"]), vocab_size=V, seq_len=64, dtype="auto", engine_args={})
    assert "vllm" not in [thread.name for thread in threading.enumerate() if thread not in before]


@pytest.mark.parametrize(
    ("engine_args", "message"),
    [
        ({"max_num_seq": 4}, "max_num_seq is not an argument"),
        ({"enable_prefix_caching": True}, "enable_prefix_caching is set by distill"),
    ],
)
def test_arguments_that_cannot_be(engine_args: dict[str, Any], message: str, teachers: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=message):
        open_vllm(str(teachers["llama"]), vocab_size=V, seq_len=64, dtype="auto", engine_args=engine_args)


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="vLLM cannot load it"):
        open_vllm(str(tmp_path), vocab_size=V, seq_len=64, dtype="auto", engine_args={})
