"""Training and evaluation on hidden targets, which give the full teacher distribution."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import cache_format as cf
from dense import document_logprobs
from full_runs import build_full
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.held_out import evaluate
from pipeline.losses import sparse_kl
from pipeline.losses.sparse_targets import SparseTargetBatch
from pipeline.models import teacher_head
from pipeline.models.head import open_head
from pipeline.models.teacher_head import TeacherHead
from pipeline.student.data.dataset import CacheDataset
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.forward import distillation_output, install_distillation_forward
from pipeline.student.training.train import train_student
from pipeline.student.validation.loss_checks import loss_for_cache
from runs import SGD, Stop, build_cache, distance, log_history, train, weights
from tiny import english, tiny_llama

VOCAB = 400


@pytest.fixture(scope="module")
def folder(teacher_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches with hidden targets for training and held out, and a cache of the held-out text with top-16 targets."""
    folder = tmp_path_factory.mktemp("full")
    (folder / "heldout.txt").write_text(english(12, seed=5))
    build_full(teacher_dir, text_file, folder / "train")
    build_full(teacher_dir, folder / "heldout.txt", folder / "heldout", dtype="float32")
    build_cache(folder / "sparse", teacher_dir, folder / "heldout.txt", seq_len=40)
    return folder


def opened(path: Path) -> cf.Cache:
    return cf.open_cache(path, hidden_layers=[]).with_states()


def dense_targets(rows: list[cf.CacheRow], teacher: Any) -> SparseTargetBatch:
    """The teacher's full distribution at each position in fp64, computed one document at a time."""
    logprobs = torch.from_numpy(np.concatenate([document_logprobs(teacher, row, VOCAB) for row in rows]))
    return SparseTargetBatch(
        ids=torch.arange(VOCAB).expand(len(logprobs), VOCAB),
        logprobs=logprobs,
        residual_logprob=torch.full((len(logprobs),), -torch.inf, dtype=torch.float64),
        labels=torch.from_numpy(np.concatenate([row.label_ids for row in rows])),
    )


# ---- the loss of a batch


@pytest.mark.parametrize("divergence, temperature", [("forward-kl", 1.0), ("reverse-kl", 2.0), ("tvd", 3.0)])
def test_loss_and_gradient_equal_those_of_both_models_logits(
    divergence: str, temperature: float, folder: Path, teacher_dir: Path, student_dir: Path
) -> None:
    """For rows of different lengths with several documents, against plain forward passes in fp64."""
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float64).eval()
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float64).eval()
    cache = opened(folder / "heldout")
    rows = [cache[i] for i in (0, 1, len(cache) - 1)]
    logits = []
    for row in rows:
        documents = np.split(np.asarray(row.input_ids, np.int64), np.cumsum(row.segment_lengths)[:-1])
        logits += [model(input_ids=torch.from_numpy(d)[None]).logits[0] for d in documents]
    options = {"kd_weight": 0.6, "temperature": temperature, "divergence": divergence}
    expected = sparse_kl(torch.cat(logits), dense_targets(rows, teacher), **options)
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    head, loss = open_head(model, VOCAB), loss_for_cache(cache, **options)
    install_distillation_forward(model, head, loss)
    batch, count = CacheDataset(cache).collate(rows), sum(int(row.loss_mask.sum()) for row in rows)
    output = model(scale=1 / count, **batch)
    output.loss.backward()
    assert output.count == count and output.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        largest = gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4 * largest, msg=name)
    by_row = distillation_output(head, batch, loss, by_row=True)
    whole = distillation_output(head, batch, loss)
    for name in ("loss", "kl", "ce", "agreement", "count"):
        assert getattr(by_row, name).sum().item() == pytest.approx(getattr(whole, name).item(), rel=1e-6)


def test_student_equal_to_its_teacher_has_zero_loss(folder: Path, teacher_dir: Path, student_dir: Path) -> None:
    for path, bound, agreement in ((folder / "train", 1e-6, 0.99), (folder / "heldout", 1e-8, 1.0)):  # float16, float32
        found = evaluate(EvaluateConfig(cache=str(path), student=str(teacher_dir), device="cpu"))
        assert abs(found.kl) < bound and found.agreement >= agreement
        assert found.tokens == cf.open_cache(path).num_loss_tokens
    found = evaluate(EvaluateConfig(cache=str(folder / "heldout"), student=str(student_dir), device="cpu"))
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float64).eval()
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float64).eval()
    kl, count = 0.0, 0
    for row in cf.open_cache(folder / "heldout").iter_rows():
        p, q = (document_logprobs(each, row, VOCAB)[row.loss_mask] for each in (teacher, model))
        kl, count = kl + (np.exp(p) * (p - q)).sum(), count + len(p)
    assert found.kl == pytest.approx(kl / count, rel=1e-5)
    sparse = evaluate(EvaluateConfig(cache=str(folder / "sparse"), student=str(student_dir), device="cpu"))
    assert sparse.kl < found.kl and sparse.ce == pytest.approx(found.ce, rel=1e-6)  # a lower bound


@pytest.mark.long
def test_masked_students(masked_dir: Path, tmp_path: Path) -> None:
    cache = build_full(masked_dir / "bert", masked_dir / "text.txt", tmp_path / "cache")
    teacher = evaluate(EvaluateConfig(cache=str(cache), student=str(masked_dir / "bert"), device="cpu"))
    assert abs(teacher.kl) < 1e-5 and teacher.agreement == 1.0
    options = {"student_layers": 1, "learning_rate": 3e-3, "eval_cache": str(cache), "eval_steps": 4, "max_steps": 8}
    train(tmp_path / "student", cache, student=masked_dir / "bert", **options)
    held_out = [entry["eval_kl"] for entry in log_history(tmp_path / "student") if "eval_kl" in entry]
    assert held_out[1] < held_out[0]
    with pytest.raises(ConfigError, match="`hidden_loss` mse: .* no hidden states"):  # it has only inputs of the head
        train(tmp_path / "other", cache, student=masked_dir / "bert", hidden_loss="mse")


# ---- runs


def run(output: Path, folder: Path, student: Path, **options: Any) -> Path:
    """Eight rows per optimizer step with plain SGD, whose updates show the scale of the gradient."""
    given = {"max_steps": 3, "learning_rate": 0.05, "seed": 5, "logging_steps": 1}
    train(output, folder / "train", student=student, arguments=SGD, **{**given, **options})
    return output


def test_gradient_accumulation_does_not_change_the_scale(folder: Path, student_dir: Path, tmp_path: Path) -> None:
    one = run(tmp_path / "one", folder, student_dir, batch_size=8)
    four = run(tmp_path / "four", folder, student_dir, batch_size=2, gradient_accumulation_steps=4)
    hot = run(tmp_path / "hot", folder, student_dir, batch_size=8, temperature=4.0)
    assert distance(weights(one), weights(four)) < 2e-6 < 1e-4 < distance(weights(one), weights(hot))


def test_other_options_work_with_hidden_targets(folder: Path, student_dir: Path, tmp_path: Path) -> None:
    """A sum of divergences, schedules, position weighting, hidden-state distillation and early stopping."""
    options: dict[str, Any] = {
        "divergence": "reverse-kl:0.5,js(0.3)",
        "temperature_schedule": "linear:4:1",
        "kd_schedule": "linear:1:0.5",
        "position_weighting": "student-entropy",
        "hidden_loss": "cosine",
        "layer_map": "last",
        "eval_cache": str(folder / "heldout"),
        "eval_steps": 1,
        "early_stopping": ("kl:99%:1", "ce:noise:1"),
        "early_stopping_mode": "any",
        "logging_steps": 1,
        "max_steps": 5,
    }
    train(tmp_path / "student", folder / "train", student=student_dir, **options)
    entries = log_history(tmp_path / "student")
    assert [entry["temperature"] for entry in entries if "temperature" in entry]
    held_out = [entry for entry in entries if "eval_kl" in entry]
    assert 2 <= len(held_out) < 5 and all(math.isfinite(each["eval_soft"]) for each in held_out)
    assert all("eval_features" in each for each in held_out)


@pytest.mark.parametrize("train_on, held_out", [("train", "sparse"), ("sparse", "heldout")])
def test_held_out_targets_may_have_another_kind(
    train_on: str, held_out: str, folder: Path, student_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "student"
    options = {"eval_cache": str(folder / held_out), "eval_steps": 2, "max_steps": 2, "temperature": 2.0}
    summary = train(output, folder / train_on, student=student_dir, kd_weight=1.0, **options)
    entry = next(each for each in log_history(output) if "eval_kl" in each)
    assert entry["eval_loss"] == pytest.approx(4 * entry["eval_kl"], rel=1e-5)  # T²·KL
    loss = loss_for_cache(cf.open_cache(folder / held_out), kd_weight=1.0, temperature=2.0)
    assert loss.full == (held_out == "heldout")
    assert summary.eval["kl"] > 0


def test_hidden_state_loss_without_those_layers_in_the_held_out_cache(
    folder: Path, teacher_dir: Path, text_file: Path, student_dir: Path, tmp_path: Path
) -> None:
    """The held-out cache has states, but only as targets."""
    cache = build_full(teacher_dir, text_file, tmp_path / "cache", layers="1")
    options = {"hidden_loss": "cosine", "layer_map": "1:1", "eval_cache": str(folder / "heldout"), "eval_steps": 1}
    train(tmp_path / "student", cache, student=student_dir, max_steps=1, **options)
    entry = next(each for each in log_history(tmp_path / "student") if "eval_kl" in each)
    assert "eval_features" not in entry


def test_resume_is_exact(folder: Path, student_dir: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 6, "save_steps": 3, "learning_rate": 1e-2}
    train(tmp_path / "whole", folder / "train", student=student_dir, **options)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", folder / "train", student=student_dir, on_step=Stop(4), **options)
    train(tmp_path / "parts", folder / "train", student=student_dir, resume=True, **options)
    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0.0


@pytest.mark.long
def test_frozen_head_equal_to_the_teachers_is_shared(
    folder: Path, teacher_dir: Path, student_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student with fewer layers of the teacher: the head is in memory once."""
    shared = []
    inner = TeacherHead.share
    monkeypatch.setattr(TeacherHead, "share", lambda *given: shared.append(inner(*given)) or shared[-1])
    options: dict[str, Any] = {"max_steps": 3, "learning_rate": 1e-2, "freeze_embeddings": True, "kd_weight": 1.0}
    train(tmp_path / "frozen", folder / "train", student=teacher_dir, student_layers=1, **options)
    with monkeypatch.context() as patch:
        patch.setattr(TeacherHead, "share", lambda *given: False)
        train(tmp_path / "twice", folder / "train", student=teacher_dir, student_layers=1, **options)
    assert distance(weights(tmp_path / "frozen"), weights(tmp_path / "twice")) == 0.0
    train(tmp_path / "learning", folder / "train", student=teacher_dir, student_layers=1, max_steps=1)
    train(tmp_path / "other", folder / "train", student=student_dir, freeze_embeddings=True, max_steps=1)
    assert shared == [True, False, False]
    assert not teacher_head._loaded or all(each.weight.shape == (VOCAB, 32) for each in teacher_head._loaded.values())


def test_teacher_head_is_not_saved_with_the_student(folder: Path, student_dir: Path, tmp_path: Path) -> None:
    run(tmp_path / "student", folder, student_dir, max_steps=1)
    assert weights(tmp_path / "student").keys() == weights(student_dir).keys()
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]


def test_autocast_does_not_change_the_teachers_logits(folder: Path, student_dir: Path) -> None:
    cache = opened(folder / "heldout")
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32).eval()
    head, loss, seen = open_head(model, VOCAB), loss_for_cache(cache, kd_weight=1.0), []
    assert loss.full
    call = TeacherHead.__call__
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(TeacherHead, "__call__", lambda self, states: seen.append(call(self, states)) or seen[-1])
        distillation_output(head, CacheDataset(cache).collate(cache[:3]), loss)
    rows = cache[:3]
    exact = torch.cat(
        [torch.from_numpy(cache.head().logits(row.hidden.values(2)[row.loss_mask[row.hidden.mask]])) for row in rows]
    )
    assert torch.cat(seen).dtype == torch.float32
    torch.testing.assert_close(torch.cat(seen), exact, rtol=1e-5, atol=1e-5)


# ---- refusals


def test_options_for_sparse_targets_are_refused(folder: Path, student_dir: Path, tmp_path: Path) -> None:
    for options, words in (
        ({"tail": "bucket"}, "tail.? ?bucket"),
        ({"tail": "sampled"}, "tail.? ?sampled"),
        ({"cross_tokenizer": "project"}, "cross.tokenizer.*distill convert"),
        ({"resample": True}, "resample"),
    ):
        with pytest.raises(ConfigError, match=words):
            train(tmp_path / "student", folder / "train", student=student_dir, **options)
        assert not (tmp_path / "student").exists()


def test_damaged_head_is_refused_before_anything_is_written(folder: Path, student_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "train", tmp_path / "cache")
    train(tmp_path / "student", tmp_path / "cache", student=student_dir, max_steps=1)
    before = (tmp_path / "student/model.safetensors").read_bytes()
    file = tmp_path / "cache/head.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"oops")
    for action in (
        lambda: train(tmp_path / "student", tmp_path / "cache", student=student_dir, max_steps=1, overwrite=True),
        lambda: evaluate(EvaluateConfig(cache=str(tmp_path / "cache"), student=str(student_dir), device="cpu")),
    ):
        with pytest.raises(cf.FormatError, match=r"cache/head.safetensors: .*checksum"):
            action()
    assert (tmp_path / "student/model.safetensors").read_bytes() == before
    config = json.loads((tmp_path / "student/distill_config.json").read_text())
    assert config["cache"]["targets"]["head"]["bytes"] == file.stat().st_size


def test_dataset_has_a_state_for_each_loss_token(folder: Path) -> None:
    cache = opened(folder / "train")
    dataset = CacheDataset(cache)
    batch = dataset.collate([dataset[i] for i in range(5)])
    counted = torch.nonzero(batch["labels"].flatten() != -100).flatten()
    assert set(counted.tolist()) <= set(batch["hidden_index"].tolist())
    assert batch["targets"].states.dtype == torch.float16 and "hidden_2" not in batch  # moved to the device once


# ---- several caches


def settings(folder: Path) -> dict[str, Any]:
    return {"output": str(folder / "student"), "device": "cpu"}


def test_caches_with_one_head_can_be_mixed(folder: Path, teacher_dir: Path, student_dir: Path, tmp_path: Path) -> None:
    build_full(teacher_dir, folder / "heldout.txt", tmp_path / "more")
    caches = (f"{folder / 'train'}:0.5", f"{tmp_path / 'more'}:0.5")
    train_student(TrainStudentConfig(cache=caches, student=str(student_dir), max_steps=2, **settings(tmp_path)))
    record = json.loads((tmp_path / "student/distill_config.json").read_text())
    assert len(record["mixture"]) == 2


@pytest.mark.parametrize("other", ["sparse", "heldout", "stranger"])
def test_caches_with_other_targets_states_or_heads_are_not_mixed(
    other: str, folder: Path, tokenizer: Any, student_dir: Path, tmp_path: Path
) -> None:
    path = folder / other
    if other == "stranger":
        stranger = tiny_llama(tmp_path / "stranger", tokenizer, seed=8)
        path = build_full(stranger, folder / "heldout.txt", tmp_path / "cache")
    with pytest.raises(cf.MismatchError, match="hidden targets .* against"):
        caches = (str(folder / "train"), str(path))
        train_student(TrainStudentConfig(cache=caches, student=str(student_dir), **settings(tmp_path)))
    assert not (tmp_path / "student").exists()
