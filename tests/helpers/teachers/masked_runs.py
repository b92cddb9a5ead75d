"""Masked teachers of each kind and their caches; the fixture `masked_dir` in conftest.py builds them once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, PreTrainedModel

from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from tiny import english
from tiny_masked import KINDS, tiny_masked


def build_masked(folder: Path) -> Path:
    """Builds teachers `bert`, `roberta` … with padded embeddings, their caches `bert-cache` … and `text.txt`."""
    (folder / "text.txt").write_text(english(60), encoding="utf-8")
    for i, kind in enumerate(KINDS):
        tiny_masked(folder / kind, kind, pad_vocab=8, seed=i)
        cache_teacher(settings(folder, kind, folder / f"{kind}-cache"))
    return folder


def settings(folder: Path, kind: str, output: Path, **options: Any) -> CacheTeacherConfig:
    """How to cache a teacher of `folder`: top-16 targets, rows of up to 32 tokens, documents are lines."""
    data = DataConfig(data=str(folder / "text.txt"), seq_len=32, sample_by="line")
    options = {"targets": TargetRule(top_k=16), "rows_per_shard": 16, **options}
    return CacheTeacherConfig(teacher=str(folder / kind), data=data, output=str(output), device="cpu", **options)


def load(path: Path) -> PreTrainedModel:
    return AutoModelForMaskedLM.from_pretrained(path, dtype=torch.float64).eval()
