"""Caches of hidden targets, made by the code of stage one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.targets.hidden_rule import HiddenRule
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig


def full_settings(
    teacher: Path, data: Path, output: Path, *, dtype: str = "float16", layers: str | None = None, **options: Any
) -> CacheTeacherConfig:
    """Rows of up to 40 tokens, documents are lines."""
    text = DataConfig(data=str(data), seq_len=40, sample_by="line")
    options = {"hidden": HiddenRule(layers=layers, dtype=dtype), "rows_per_shard": 16, "batch_size": 4, **options}
    return CacheTeacherConfig(
        teacher=str(teacher), data=text, output=str(output), targets=TargetRule(kind="hidden"), device="cpu", **options
    )


def build_full(teacher: Path, data: Path, output: Path, **options: Any) -> Path:
    cache_teacher(full_settings(teacher, data, output, **options))
    return output
