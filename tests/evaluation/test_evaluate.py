"""How far a student is from its teacher, against full distributions of both models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import cache_format as cf
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.held_out import Evaluation, evaluate
from pipeline.teacher.targets.rules import TargetRule
from runs import build_cache, dense_evaluation, dense_logits
from tiny import tiny_llama


@pytest.fixture(scope="module")
def folder(teacher_dir: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sparse`: 16 of 400 candidates; `full`: all of them."""
    folder = tmp_path_factory.mktemp("evaluate")
    build_cache(folder / "sparse", teacher_dir, chat_file)
    build_cache(folder / "full", teacher_dir, chat_file, top_k=400)
    build_cache(folder / "hidden", teacher_dir, chat_file, targets=TargetRule(kind="hidden"))
    return folder


def run(cache: Path, student: Path, **options: object) -> Evaluation:
    return evaluate(EvaluateConfig(cache=str(cache), student=str(student), device="cpu", **options))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).log_softmax(dim=-1).numpy()


@pytest.mark.long
def test_numbers_are_those_of_full_logits(folder: Path, student_dir: Path):
    cache = cf.open_cache(folder / "sparse")
    found = run(folder / "sparse", student_dir, batch_size=5)
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    for name, expected in dense_evaluation(model, list(cache.iter_rows()), 400).items():
        assert getattr(found, name) == pytest.approx(expected, rel=1e-5), name
    assert found.perplexity == pytest.approx(np.exp(found.ce))
    assert found.tokens == cache.num_loss_tokens


@pytest.mark.long
def test_with_all_candidates_it_is_the_divergence_of_the_two_models(folder: Path, teacher_dir: Path, student_dir: Path):
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in (teacher_dir, student_dir)
    )
    kl, agreement = [], []
    for row in cf.open_cache(folder / "full").iter_rows():
        counted = np.flatnonzero(row.loss_mask)
        p, q = (log_softmax(dense_logits(model, row, 400))[counted] for model in (teacher, student))
        kl.append((np.exp(p) * (p - q)).sum(axis=1))
        agreement.append(p.argmax(axis=1) == q.argmax(axis=1))
    found = run(folder / "full", student_dir)
    assert found.kl == pytest.approx(np.concatenate(kl).mean(), rel=5e-3)  # 112 values for a probability
    # The codebook makes near-equals equal, and either of them is the teacher's choice then.
    assert found.agreement == pytest.approx(np.concatenate(agreement).mean(), abs=0.02)
    # Fewer candidates see less of the divergence, never more.
    assert 0 < run(folder / "sparse", student_dir).kl < found.kl


def test_teacher_as_its_own_student(folder: Path, teacher_dir: Path):
    found = run(folder / "sparse", teacher_dir)
    assert 0 <= found.kl < 1e-3
    assert 0.9 < found.agreement < 1.0  # an entry that is equal to another is half of the teacher's choice
    assert run(folder / "hidden", teacher_dir).agreement == pytest.approx(1.0, abs=0.005)  # states are stored in half


def test_batch_size_and_padding_change_nothing(folder: Path, student_dir: Path):
    one, many = run(folder / "sparse", student_dir, batch_size=1), run(folder / "sparse", student_dir, batch_size=64)
    assert one.tokens == many.tokens
    for name in ("kl", "ce", "agreement"):
        assert getattr(one, name) == pytest.approx(getattr(many, name), rel=1e-6)


def test_first_rows_only(folder: Path, student_dir: Path):
    cache = cf.open_cache(folder / "sparse")
    seen: list[tuple[int, int]] = []
    options = EvaluateConfig(cache=cache.path, student=str(student_dir), device="cpu", max_rows=3, batch_size=2)
    found = evaluate(options, on_progress=lambda *place: seen.append(place))
    assert found.tokens == sum(int(row.loss_mask.sum()) for row in cache[:3])
    assert seen == [(2, 3), (3, 3)]
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    assert found.kl == pytest.approx(dense_evaluation(model, cache[:3], 400)["kl"], rel=1e-5)


def test_padding_of_the_embedding_is_no_candidate(folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    padded = tiny_llama(tmp_path / "padded", tokenizer, hidden=16, tie=False, pad_vocab=12, seed=6)
    found = run(folder / "sparse", padded)
    model = AutoModelForCausalLM.from_pretrained(padded, dtype=torch.float32)
    expected = dense_evaluation(model, list(cf.open_cache(folder / "sparse").iter_rows()), 400)
    assert found.ce == pytest.approx(expected["ce"], rel=1e-5)
    assert found.kl == pytest.approx(expected["kl"], rel=1e-5)


def test_nothing_counted_is_not_a_number():
    nothing = Evaluation.from_sums(0.0, 0.0, 0.0, 0.0, "full")
    assert nothing.tokens == 0 and np.isnan([nothing.kl, nothing.ce, nothing.perplexity, nothing.agreement]).all()


def test_hopeless_student_has_a_finite_perplexity():
    assert np.isfinite(Evaluation.from_sums(1.0, 1e6, 0.0, 1.0, "full").perplexity)


@pytest.mark.long
def test_a_remote_cache_is_read_once_over_the_network(folder: Path, student_dir: Path, tmp_path: Path, monkeypatch):
    """`--cache-dir`, of both commands: what was read lies there, and is not fetched again."""
    import shutil
    import uuid

    import fsspec
    from click.testing import CliRunner

    from cache_format.storage.remote import RemoteFile
    from cli import main

    (cache,) = [path for path in sorted(folder.iterdir()) if (path / "manifest.json").exists()][:1]
    url = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").put(str(cache), url, recursive=True)
    read, seen = RemoteFile.read, []
    monkeypatch.setattr(RemoteFile, "read", lambda self, *span: seen.append(span) or read(self, *span))

    def fetched(*words: object) -> int:
        seen.clear()
        result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return len(seen)

    options = ["--cache", url, "--student", student_dir, "--device", "cpu", "--cache-dir", tmp_path / "copies"]
    assert fetched("evaluate", *options) > 0
    assert fetched("evaluate", *options) == 0
    options += ["--max-steps", 2, "--dataloader-num-workers", 0]  # what another process reads is not seen here
    assert fetched("train-student", *options, "--output", tmp_path / "student") == 0
    shutil.rmtree(tmp_path / "copies")
    assert fetched("train-student", *options, "--output", tmp_path / "other") > 0
