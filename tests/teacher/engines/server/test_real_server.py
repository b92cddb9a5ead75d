"""A real `vllm serve`, on a CPU: `make test-servers`."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import cache_format as cf
from benchmarks.servers import stop_server, vllm_server
from pipeline.errors import ConfigError, ModelError
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.engines.server.server_config import ServerConfig
from pipeline.teacher.progress import CaptureProgress
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from runs import command
from tiny import english

pytestmark = [pytest.mark.servers, pytest.mark.timeout(1800)]

ARGUMENTS = ("--max-model-len", "64", "--max-logprobs", "50")


def write_teacher(path: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> Path:
    """vLLM's attention on a CPU takes heads of 64 numbers and more."""
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return write_teacher(tmp_path_factory.mktemp("models") / "teacher", tokenizer, seed=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(english(150), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def url(teacher: Path) -> Iterator[str]:
    with vllm_server(teacher, *ARGUMENTS) as (url, _):
        yield url


def config_of(url: str, teacher: Path, data: Path, output: Path, **options: Any) -> CacheTeacherConfig:
    of_data = {"sample_by": "line", "seq_len": 48, **options.pop("of_data", {})}
    options = {"targets": TargetRule(top_k=50), "rows_per_shard": 16, **options}
    return CacheTeacherConfig(
        teacher=url,
        tokenizer=str(teacher),
        data=DataConfig(data=str(data), **of_data),
        output=str(output),
        **options,
    )


def same(rows: list[cf.CacheRow], expected: list[cf.CacheRow], atol: float = 1e-3) -> None:
    assert len(rows) == len(expected) > 0
    for row, other in zip(rows, expected, strict=True):
        for name in ("input_ids", "loss_mask", "segment_lengths"):
            np.testing.assert_array_equal(getattr(row, name), getattr(other, name))
        for t in np.flatnonzero(row.loss_mask):
            (ids, logprobs), (other_ids, other_logprobs) = row.targets.at(t), other.targets.at(t)
            common, here, there = np.intersect1d(ids, other_ids, return_indices=True)
            assert len(common) >= 49  # rounding may swap the last two
            np.testing.assert_allclose(logprobs[here], other_logprobs[there], atol=atol)


def test_log_probabilities_are_those_of_transformers(
    url: str, teacher: Path, text: Path, tmp_path: Path, raw_rows: list[cf.CacheRow]
) -> None:
    cache_teacher(config_of(str(teacher), teacher, text, tmp_path / "here", device="cpu"))
    expected = list(raw_rows)
    raw_rows.clear()
    cache_teacher(config_of(url, teacher, text, tmp_path / "there"))
    same(raw_rows, expected)
    assert cf.open_cache(tmp_path / "there").metadata.capture["server_version"].startswith("0.")


def test_a_server_that_is_killed_and_started_again(
    teacher: Path, text: Path, tmp_path: Path, raw_rows: list[cf.CacheRow]
) -> None:
    cache_teacher(config_of(str(teacher), teacher, text, tmp_path / "here", device="cpu"))
    expected = list(raw_rows)
    raw_rows.clear()
    killed = threading.Event()
    finished: list[BaseException | None] = []

    def kill_early(progress: CaptureProgress) -> None:
        if progress.rows >= 8 and not killed.is_set():
            stop_server(process)
            killed.set()

    def run() -> None:
        try:
            config = config_of(url, teacher, text, tmp_path / "there", server=ServerConfig(concurrency=4))
            cache_teacher(config, on_progress=kill_early)
            finished.append(None)
        except BaseException as error:
            finished.append(error)

    with vllm_server(teacher, *ARGUMENTS) as (url, process):
        thread = threading.Thread(target=run)
        thread.start()
        assert killed.wait(300)
        port = int(url.rpartition(":")[2].removesuffix("/v1"))
        with vllm_server(teacher, *ARGUMENTS, port=port):
            thread.join(600)
    assert finished == [None]
    same(raw_rows, expected)


def test_what_the_server_does_not_give(url: str, teacher: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`top_k` 51: more than .* --max-logprobs 51"):
        cache_teacher(config_of(url, teacher, text, tmp_path / "a", targets=TargetRule(top_k=51)))
    with pytest.raises(ConfigError, match=r"`seq_len` 64: the server takes at most 64 tokens"):
        cache_teacher(config_of(url, teacher, text, tmp_path / "b", of_data={"seq_len": 64}))
    with pytest.raises(ConfigError, match=r"`model` other: .* has only"):
        cache_teacher(config_of(url, teacher, text, tmp_path / "c", server=ServerConfig(model="other")))


def test_plan_and_verify_by_the_command_line(
    url: str, teacher: Path, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    words = ["--data", text, "--sample-by", "line", "--seq-len", 48, "--top-k", 50]
    there = ["--teacher", url, "--tokenizer", teacher, *words, "--output", tmp_path / "there"]
    plan = json.loads(command("plan", *there, "--rows", 8, "--json").stdout)
    assert [rule["targets"]["k"] for rule in plan["rules"]] == [50, 16] and plan["sample_rows"] == 8
    assert plan["rules"][0]["tokens_per_s"] > 0 and not (tmp_path / "there").exists()
    made = json.loads(command("cache-teacher", *there, "--json").stdout)
    assert made["tokens"] == plan["tokens"]
    other = write_teacher(tmp_path / "other-teacher", tokenizer, seed=2)
    for path, name in ((teacher, "here"), (other, "other")):
        command("cache-teacher", "--teacher", path, *words, "--output", tmp_path / name)
    against = ["--against-teacher", url, "--tokenizer", teacher, "--rows", 8]
    for name in ("here", "there"):
        found = json.loads(command("verify", tmp_path / name, *against, "--json").stdout)
        assert found["ok"] and found["teacher"]["repeatable"] and found["teacher"]["positions"] > 100
    assert "does not match" in command("verify", tmp_path / "other", *against, status=1).stderr


def test_a_real_model(real_teacher: Path, tmp_path: Path, raw_rows: list[cf.CacheRow]) -> None:
    """SmolLM2, whose first token of every text has a hidden state forty times as long as the others."""
    (tmp_path / "text.txt").write_text(english(20), encoding="utf-8")
    cache_teacher(config_of(str(real_teacher), real_teacher, tmp_path / "text.txt", tmp_path / "here", device="cpu"))
    expected = list(raw_rows)
    raw_rows.clear()
    with vllm_server(real_teacher, *ARGUMENTS) as (url, _):
        cache_teacher(config_of(url, real_teacher, tmp_path / "text.txt", tmp_path / "there"))
        against = ["--against-teacher", url, "--tokenizer", real_teacher, "--rows", 4]
        for name in ("here", "there"):
            command("verify", tmp_path / name, *against)
    same(raw_rows, expected, atol=2e-3)


def test_logits_instead_of_log_probabilities(teacher: Path, text: Path, tmp_path: Path) -> None:
    with vllm_server(teacher, *ARGUMENTS, "--logprobs-mode", "raw_logits") as (url, _):
        with pytest.raises(ModelError, match=r"not log-probabilities .* --logprobs-mode raw_logprobs"):
            cache_teacher(config_of(url, teacher, text, tmp_path / "cache"))
