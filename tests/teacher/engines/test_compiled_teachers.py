"""Caches of a teacher whose layers are compiled: the same targets within rounding, and a record of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.models.devices import compilation
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.engines.engine_config import EngineConfig
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from pipeline.teacher.writing.worker_config import WorkerConfig


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[CompileCounter]:
    caplog.set_level(logging.WARNING, "torch.__trace")  # else torch writes a trace for the log of the test
    counter = CompileCounter()
    monkeypatch.setattr(compilation, "BACKEND", counter)
    yield counter
    torch.compiler.reset()


def settings(teacher: Any, text: Path, output: Path, **options: Any) -> CacheTeacherConfig:
    return CacheTeacherConfig(
        teacher=teacher,
        data=DataConfig(data=str(text), sample_by="line", seq_len=48),
        output=str(output),
        targets=TargetRule(top_k=8),
        batch_size=4,
        device="cpu",
        rows_per_shard=8,
        **options,
    )


@pytest.mark.long
def test_targets_are_the_same_and_the_cache_says_that_layers_were_compiled(
    tmp_path: Path, teacher_dir: Path, tokenizer: PreTrainedTokenizerFast, text_file: Path, graphs: CompileCounter
) -> None:
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    cache_teacher(settings(str(teacher_dir), text_file, plain))
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32)
    cache_teacher(settings(model, text_file, compiled, tokenizer=tokenizer, compile=True))
    assert 0 < graphs.frame_count <= 10  # five for each layer, in two modes: attention of documents is not compiled
    assert not any("forward" in vars(module) for module in model.modules())
    assert cf.open_cache(compiled).metadata.capture["compiled"] is True
    assert "compiled" not in cf.open_cache(plain).metadata.capture
    for row, expected in zip(cf.open_cache(compiled), cf.open_cache(plain), strict=True):
        for name in ("entropy", "residual_logprob"):
            found, wanted = (getattr(each.targets, name) for each in (row, expected))
            np.testing.assert_allclose(found, wanted, atol=2e-2)  # as stored, in steps

    for shard in sorted((compiled / "shards").glob("*-00001.*")):
        shard.unlink()
    with pytest.raises(cf.MismatchError, match=r"capture\.compiled .*only rounding"):
        cache_teacher(settings(model, text_file, compiled, tokenizer=tokenizer))
    allowed = WorkerConfig(allow_rounding=True)
    cache_teacher(settings(model, text_file, compiled, tokenizer=tokenizer, workers=allowed))
    sidecar = json.loads((compiled / "shards/shard-00001.json").read_text())
    assert "capture.compiled" in json.dumps(sidecar)


@pytest.mark.parametrize(
    "options",
    [{"device_map": "auto"}, {"tensor_parallel": True}, {"running": EngineConfig(engine="vllm")}],
    ids=lambda options: next(iter(options)),
)
def test_what_places_layers_itself_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="`compile`: cannot be combined"):
        CacheTeacherConfig(teacher="teacher", data=DataConfig(data="text.txt"), output="cache", compile=True, **options)
