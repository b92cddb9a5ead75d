"""`plan` with a teacher on a server: its speed at as many requests at once as a run sends."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from test_server_engine import capture

from fake_servers import FakeServer
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.engines.server.server_config import ServerConfig
from pipeline.teacher.plan import Plan, plan_cache
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from runs import command

ROWS, LATENCY_S = 8, 0.05


def plan(fake: FakeServer, tokenizer: Path, data: Path, output: Path, **options: Any) -> Plan:
    config = CacheTeacherConfig(
        teacher=fake.url,
        tokenizer=str(tokenizer),
        data=DataConfig(data=str(data), seq_len=48, sample_by="line", max_documents=20),
        output=str(output),
        **{"targets": TargetRule(top_k=32), **options},
    )
    return plan_cache(config, sample_rows=ROWS, cost_per_hour=3.0)


def slowly(answer: Any, body: Any) -> Any:
    time.sleep(LATENCY_S)
    return answer


@pytest.mark.parametrize("concurrency", [1, 4])
def test_the_speed_is_that_of_the_server(concurrency: int, teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    with FakeServer(teacher_dir, "vllm", change=slowly) as server:
        began = time.perf_counter()
        found = plan(server, teacher_dir, text_file, tmp_path / "cache", server=ServerConfig(concurrency=concurrency))
        seconds = time.perf_counter() - began
        documents = sum(server.answered.values()) - 2  # the questions asked first
    least = found.sample_tokens / seconds
    most = found.sample_tokens / (documents * LATENCY_S / concurrency)
    assert found.sample_rows == ROWS and least < found.chosen.tokens_per_s < most
    assert server.most_in_work == concurrency
    assert found.chosen.seconds == pytest.approx(found.tokens / found.chosen.tokens_per_s)
    assert found.cost_per_million_tokens(found.chosen) == pytest.approx(3.0 / 3600 / found.chosen.tokens_per_s * 1e6)
    assert [rule.targets["k"] for rule in found.rules] == [32, 16]
    assert found.position_loss is None and not (tmp_path / "cache").exists()


@pytest.mark.long
def test_the_size_is_that_of_the_cache(teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    with FakeServer(teacher_dir, "sglang") as server:
        found = plan(server, teacher_dir, text_file, tmp_path / "cache", targets=TargetRule(top_k=8), rows_per_shard=8)
        made = capture(server.url, teacher_dir, text_file, tmp_path / "cache")
    assert found.tokens == made.tokens and [rule.targets["k"] for rule in found.rules] == [8]
    assert found.chosen.bytes["columns"] == pytest.approx(made.bytes, rel=0.25)
    assert found.chosen.exact_mass == pytest.approx(made.exact_mass, abs=0.05)


def test_the_command(teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    words = ["--data", text_file, "--seq-len", 48, "--top-k", 8, "--rows", 2, "--output", tmp_path / "cache"]
    with FakeServer(teacher_dir, "vllm") as server:
        said = command("plan", "--teacher", server.url, "--tokenizer", teacher_dir, *words).stdout
    assert "tokens/s" in said and "by batch" not in said and "top-k 8" in said
