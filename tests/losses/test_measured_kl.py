"""`kl`, by which runs are compared: what the targets can say of the true divergence, whatever is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from transformers import AutoModelForCausalLM

import cache_format as cf
from cli import main
from dense import dense_losses, random_targets
from head_sums import fused_sums, general_sums
from pipeline.evaluation.evaluate_config import EvaluateConfig
from pipeline.evaluation.held_out import evaluate
from pipeline.losses import HeadOutput, SparseTargetBatch, sparse_targets
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.train import TrainSummary, train_student
from pipeline.student.validation.loss_checks import loss_for_cache, loss_for_held_out
from pipeline.teacher.targets.rules import TargetRule
from runs import build_cache, dense_evaluation, log_history
from sampled import random, threshold
from tiny import conversations, tiny_llama, tiny_tokenizer, write_jsonl

N, V, K = 29, 37, 6

RULES = {
    "top-k": TargetRule(top_k=4),
    "threshold": threshold(0.1),
    "other": threshold(0.1, samples=2, seed=5),
    "random": random(12),
    "tempered": threshold(0.1, temperature=2.0),
    "whole": TargetRule(top_k=400),
}


# ---- of logits


def output_of(by: str, z: Tensor, targets: SparseTargetBatch, **options: Any) -> HeadOutput:
    eye = torch.eye(z.shape[1], dtype=z.dtype)
    if by == "fused":
        return fused_sums(z, eye, None, targets, chunk_size=7, **options)
    return general_sums(z, lambda h: h @ eye, targets, chunk_size=7, **options)


def logits_and_targets() -> tuple[Tensor, SparseTargetBatch]:
    generator = torch.Generator().manual_seed(3)
    return 2 * torch.randn(N, V, generator=generator, dtype=torch.float64), random_targets(N, V, K, seed=2)


LOSSES = [
    ("forward-kl", "bucket", 1.0),
    ("forward-kl", "renormalise", 2.0),
    ("forward-kl", "label", 1.0),
    ("forward-kl", "realized", 1.0),
    ("reverse-kl", "bucket", 2.0),
    ("pairwise", "renormalise", 1.0),
    ("forward-kl:0.5,logit-mse:0.1", "bucket", 1.0),
    ("js,forward-kl:2", "label", 4.0),
]


@pytest.mark.long
@pytest.mark.parametrize("by", ["fused", "general"])
@pytest.mark.parametrize("divergence, tail, temperature", LOSSES)
@pytest.mark.parametrize("kl_tail", ["sampled", "bucket"])
def test_what_is_measured_is_its_own_and_changes_nothing_of_the_loss(
    by: str, divergence: str, tail: str, temperature: float, kl_tail: str
) -> None:
    z, targets = logits_and_targets()
    options = {"divergence": divergence, "tail": tail, "temperature": temperature, "kd_weight": 0.7}
    found = {}
    for measured in (None, kl_tail):
        leaf = z.clone().requires_grad_()
        output = output_of(by, leaf, targets, kl_tail=measured, **options)
        found[measured] = (output, torch.autograd.grad(output.loss, leaf)[0])
    (plain, gradient), (other, other_gradient) = found.values()
    assert torch.equal(gradient, other_gradient)
    for name in ("loss", "ce", "agreement", "count"):
        assert torch.equal(getattr(plain, name), getattr(other, name)), name
    at = 1.0 if kl_tail == "sampled" else temperature  # these were captured at 1, and a sample cannot be tempered
    expected = dense_losses(z, targets, tail=kl_tail, temperature=at).sum() / at**2
    torch.testing.assert_close(float(other.kl), float(expected), rtol=1e-11, atol=0)
    with torch.no_grad():
        assert torch.allclose(output_of(by, z, targets, kl_tail=kl_tail, **options).kl, other.kl, rtol=1e-14)


@pytest.mark.parametrize("by", ["fused", "general"])
def test_a_sample_drawn_at_another_temperature_is_measured_there(by: str) -> None:
    z, targets = logits_and_targets()
    targets = replace(targets, temperature=2.0)
    found = output_of(by, z, targets, tail="bucket", temperature=2.0, divergence="tvd", kl_tail="sampled").kl
    expected = dense_losses(z, targets, tail="sampled", temperature=2.0).sum() / 4
    torch.testing.assert_close(float(found), float(expected), rtol=1e-11, atol=0)


def test_agreement_is_the_same_whatever_is_trained() -> None:
    """Also where no entry is exact, and the weights of the sample are all there is."""
    z, targets = logits_and_targets()
    targets = replace(targets, exact_counts=torch.zeros_like(targets.exact_counts))
    z.scatter_(1, targets.ids[:, :1], 50.0)
    plain, other = (output_of("fused", z, targets, tail=tail, kl_tail="sampled") for tail in ("sampled", "realized"))
    assert torch.equal(plain.agreement, other.agreement) and plain.agreement > 3
    torch.testing.assert_close(plain.kl, other.kl)


def test_the_vocabulary_is_walked_over_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As often with a measure of its own as without."""
    walks = []
    inner = sparse_targets.exponentials
    monkeypatch.setattr(sparse_targets, "exponentials", lambda *parts: walks.append(1) or inner(*parts))
    z, targets = logits_and_targets()
    for measured in (None, "sampled"):
        output_of("fused", z, targets, tail="bucket", kl_tail=measured)
    assert len(walks) == 2 * -(-int(targets.loss_mask.sum()) // 7)


@pytest.mark.parametrize("tail, kl_tail", [("bucket", "label"), ("sampled", "bucket"), ("label", "realized")])
def test_other_measures_are_refused(tail: str, kl_tail: str) -> None:
    z, targets = logits_and_targets()
    with pytest.raises(ValueError, match=f"kl_tail={kl_tail} with `tail={tail}`: expected"):
        output_of("fused", z, targets, tail=tail, kl_tail=kl_tail)


# ---- of runs


@pytest.fixture(scope="module")
def folder(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for every rule, of the same rows."""
    folder = tmp_path_factory.mktemp("measured")
    data = write_jsonl(folder / "chat.jsonl", conversations(14))
    for name, rule in RULES.items():
        build_cache(folder / name, teacher_dir, data, targets=rule)
    return folder


def settings(output: Path, cache: Any, held_out: Path | None, student: Path, **options: Any) -> TrainStudentConfig:
    """One step that changes nothing, on 1000 rows at once: all of what is logged is of the same student."""
    file = output.with_name(f"{output.name}.json")
    file.write_text('{"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 1e-30}')
    many = {"batch_size": 1000, "max_steps": 1, "logging_steps": 1, "eval_steps": 1}
    cache = tuple(map(str, cache)) if isinstance(cache, tuple) else str(cache)
    return TrainStudentConfig(
        cache=cache,
        eval_cache=None if held_out is None else str(held_out),
        output=str(output),
        student=str(student),
        training_args=str(file),
        device="cpu",
        **{**many, **options},
    )


def run(output: Path, cache: Any, held_out: Path | None, student: Path, **options: Any) -> tuple[float, TrainSummary]:
    """The kl of the training log, and the summary."""
    summary = train_student(settings(output, cache, held_out, student, **options))
    (logged,) = [entry["kl"] for entry in log_history(output) if "kl" in entry]
    return logged, summary


def evaluated(cache: Path, student: Path, **options: Any) -> Any:
    return evaluate(EvaluateConfig(cache=str(cache), student=str(student), device="cpu", **options))


@pytest.mark.long
@pytest.mark.parametrize(
    "name, options",
    [
        ("threshold", {"divergence": "reverse-kl"}),
        ("threshold", {"tail": "renormalise"}),
        ("threshold", {"tail": "bucket", "temperature": 2.0}),
        ("threshold", {"divergence": "forward-kl:0.5,js", "kd_weight": 0.0}),
        ("other", {"divergence": "tvd", "tail": "label"}),
        ("random", {}),
        ("tempered", {"divergence": "js"}),
        ("top-k", {"tail": "renormalise"}),
    ],
)
def test_logged_and_held_out_kl_is_what_evaluate_says(
    name: str, options: dict[str, Any], folder: Path, student_dir: Path, tmp_path: Path
) -> None:
    cache = cf.open_cache(folder / name)
    logged, summary = run(tmp_path / "student", folder / name, folder / name, student_dir, **options)
    said = evaluated(folder / name, tmp_path / "student")
    assert logged == pytest.approx(said.kl, rel=1e-5) and summary.eval["kl"] == pytest.approx(said.kl, rel=1e-5)
    assert summary.eval["agreement"] == pytest.approx(said.agreement, abs=1e-9)
    tail, temperature = "bucket" if name == "top-k" else "sampled", cache.metadata.targets["temperature"]
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    expected = dense_evaluation(model, list(cache.iter_rows()), 400, tail=tail, temperature=temperature)
    assert said.kl == pytest.approx(expected["kl"], rel=1e-5)
    assert summary.kl_estimate_kind == said.kl_estimate_kind == ("lower bound" if name == "top-k" else "estimate")
    assert ("soft" in summary.eval) == bool(options.keys() & {"tail", "divergence"} and options.get("kd_weight") != 0)


@pytest.mark.long
def test_it_is_near_the_truth_where_there_is_a_sample_and_below_it_where_there_is_none(
    folder: Path, student_dir: Path
) -> None:
    truth, estimate, bound = (evaluated(folder / name, student_dir).kl for name in ("whole", "threshold", "top-k"))
    assert abs(estimate - truth) < 0.1 < truth - bound


def test_conditions_and_the_best_checkpoint_can_follow_it(folder: Path, student_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "arguments.json"
    file.write_text('{"metric_for_best_model": "eval_kl"}')
    options = {"divergence": "reverse-kl", "early_stopping": ("kl:1000:1",), "max_steps": 6, "learning_rate": 1e-2}
    config = settings(tmp_path / "student", folder / "threshold", folder / "threshold", student_dir, **options)
    summary = train_student(replace(config, training_args=str(file)))
    assert summary.stopped is not None and summary.steps == 2
    said = evaluated(folder / "threshold", tmp_path / "student").kl
    assert said == pytest.approx(min(each["kl"] for each in summary.evaluations), rel=1e-5)


@pytest.mark.long
def test_of_several_caches_it_is_sampled_only_if_all_of_them_are(
    folder: Path, student_dir: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    for names, tail in ((("threshold", "other"), "sampled"), (("threshold", "top-k"), "bucket")):
        rows = [list(cf.open_cache(folder / name).iter_rows()) for name in names]
        found = [dense_evaluation(model, each, 400, tail=tail) for each in rows]
        caches = tuple(folder / name for name in names)
        output = tmp_path / names[1]
        logged, summary = run(output, caches, folder / "threshold", student_dir, divergence="reverse-kl")
        assert logged == pytest.approx(np.mean([each["kl"] for each in found]), rel=1e-5), names
        assert summary.eval["kl"] == pytest.approx(evaluated(folder / "threshold", student_dir).kl, rel=1e-5)


@pytest.mark.long
def test_rows_in_another_tokenizers_tokens_have_no_sample(folder: Path, tmp_path: Path) -> None:
    student = tiny_llama(tmp_path / "foreign", tiny_tokenizer(330, seed=7), layers=1, hidden=16, seed=3)
    for method, options in (("project", {"divergence": "reverse-kl"}), ("uld", {})):
        output = tmp_path / method
        options |= {"cross_tokenizer": method}
        logged, summary = run(output, folder / "threshold", folder / "threshold", student, **options)
        said = evaluated(folder / "threshold", student, cross_tokenizer="project")
        assert logged == pytest.approx(said.kl, rel=1e-5) and summary.eval["kl"] == pytest.approx(said.kl, rel=1e-5)
        assert summary.kl_estimate_kind == said.kl_estimate_kind == "lower bound"


@pytest.mark.long
def test_a_lower_bound_is_called_one_once(folder: Path, student_dir: Path, tmp_path: Path) -> None:
    for name, times in (("top-k", 1), ("threshold", 0)):
        output, cache = tmp_path / name, folder / name
        words = ["train-student", "--cache", cache, "--eval-cache", cache, "--student", student_dir, "--output", output]
        words += ["--max-steps", "2", "--eval-steps", "1", "--device", "cpu"]
        compared = ["evaluate", "--cache", cache, "--student", student_dir, "--student", output, "--device", "cpu"]
        for command in (words, compared):
            result = CliRunner().invoke(main, [str(word) for word in command])
            assert result.exit_code == 0, result.output
            assert result.stdout.count("a lower bound") == times, command[0]


def test_the_policy_that_is_measured_by_is_the_caches_own(folder: Path) -> None:
    for name, kl_tail, tail in (("threshold", "sampled", "bucket"), ("top-k", "bucket", "label")):
        recipe = loss_for_cache(cf.open_cache(folder / name), kd_weight=0.5, tail=tail)
        assert recipe.kl_tail == kl_tail and not recipe.trains_kl
        assert loss_for_cache(cf.open_cache(folder / name), kd_weight=0.5).trains_kl
        assert loss_for_held_out(recipe, cf.open_cache(folder / "random")).kl_tail == "sampled"
        assert loss_for_held_out(recipe, cf.open_cache(folder / "top-k")).kl_tail == "bucket"
