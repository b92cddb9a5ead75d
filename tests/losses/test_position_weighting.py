"""Weights of positions: by which entropy, without a gradient of their own, and the same however a batch is split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cache_format as cf
from dense import captured_for, random_targets
from head_sums import fused_sums, general_sums
from pipeline.losses import POSITION_WEIGHTINGS, fused_head_loss, sparse_kl
from runs import SGD, build_cache, distance, log_history, on_two_processes, train, weights
from textbook import randn
from tiny import conversations, write_jsonl

N, V, D, K, PADDING = 23, 61, 7, 6, 5
BY_ENTROPY = [name for name in POSITION_WEIGHTINGS if name != "uniform"]

every_weighting = pytest.mark.parametrize("weighting", BY_ENTROPY)
LOSSES = [
    ("forward-kl", "bucket"),
    ("forward-kl", "sampled"),
    ("forward-kl", "label"),
    ("js(0.1),logit-mse:0.1", "bucket"),
]


def expected_weights(weighting: str, logits: Tensor, entropy: Tensor) -> Tensor:
    """H / log V from explicit probabilities."""
    p = np.exp(logits.detach().numpy() - logits.detach().numpy().max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    own = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(axis=1)
    return (entropy if weighting == "teacher-entropy" else torch.from_numpy(own)) / np.log(logits.shape[1])


@pytest.mark.long
@every_weighting
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("divergence, tail", LOSSES)
def test_every_position_is_multiplied_by_its_entropy_and_so_is_its_gradient(
    weighting: str, temperature: float, divergence: str, tail: str
) -> None:
    """By the sum of the unweighted losses times constants: through a student's weight goes no gradient."""
    targets = captured_for(random_targets(N, V, K), tail, temperature)
    options = {"divergence": divergence, "tail": tail, "temperature": temperature, "kd_weight": 0.4}
    hidden, weight, bias = randn(N, D), randn(V + PADDING, D, seed=1, scale=0.3), randn(V + PADDING, seed=2)
    weight[V:] *= 5
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    logits = leaves[0] @ leaves[1][:V].T + leaves[2][:V]
    w = expected_weights(weighting, logits, targets.entropy)
    assert 0.1 < w.min() < 0.8 * w.max() < 0.8
    unweighted = sparse_kl(logits, targets, reduction="none", **options)
    loss = (w * unweighted).sum()
    expected = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    options |= {"position_weighting": weighting}
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        h, m, b = (x.to(dtype).requires_grad_() for x in (hidden, weight, bias))
        for loss in (
            sparse_kl(h @ m[:V].T + b[:V], targets, reduction="sum", **options),
            fused_sums(h, m, b, targets, vocab_size=V, chunk_size=7, **options).loss,
            general_sums(h, lambda x, m=m, b=b: F.linear(x, m, b), targets, vocab_size=V, chunk_size=7, **options).loss,
        ):
            for x, y in zip([loss.detach(), *torch.autograd.grad(loss, [h, m, b])], expected, strict=True):
                assert (x.double() - y).abs().max() < bound * y.abs().max()
    mean = fused_head_loss(hidden, weight[:V], bias[:V], targets, **options)
    torch.testing.assert_close(mean, expected[0] / targets.loss_mask.sum(), rtol=1e-11, atol=0)  # not over the weights


@every_weighting
def test_the_other_numbers_are_not_weighted(weighting: str) -> None:
    targets, logits, eye = random_targets(N, V, K), randn(N, V, scale=2.0), torch.eye(V).double()
    options = {"temperature": 2.0, "kd_weight": 0.4}
    plain = fused_sums(logits, eye, None, targets, **options)
    weighted = fused_sums(logits, eye, None, targets, position_weighting=weighting, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain[1:], weighted[1:], strict=True))
    assert weighted.loss < 0.9 * plain.loss


def test_from_one_for_a_uniform_student_to_nothing_for_a_certain_one() -> None:
    targets = replace(random_targets(3, V, K, masked=0.0), entropy=torch.tensor([0.0, np.log(V), 2 * np.log(V)]))
    logits = torch.zeros(3, V).double()
    logits[1, 5], logits[2, 5] = 800.0, 2e4  # all the others underflow
    z = logits.requires_grad_()
    options = {"reduction": "none", "kd_weight": 0.5}
    plain = sparse_kl(z, targets, **options)
    by_student = sparse_kl(z, targets, position_weighting="student-entropy", **options)
    torch.testing.assert_close(by_student, plain * torch.tensor([1.0, 0, 0]).double(), rtol=1e-12, atol=1e-12)
    by_teacher = sparse_kl(z, targets, position_weighting="teacher-entropy", **options)
    torch.testing.assert_close(by_teacher, plain * torch.tensor([0.0, 1, 1]).double(), rtol=1e-12, atol=1e-12)
    for weighting in BY_ENTROPY:
        loss = fused_sums(z, torch.eye(V).double(), None, targets, position_weighting=weighting, kd_weight=0.5).loss
        assert torch.autograd.grad(loss, z)[0].isfinite().all()


@every_weighting
def test_positions_that_do_not_count_may_have_no_entropy(weighting: str) -> None:
    targets, logits = random_targets(N, V, K), randn(N, V).requires_grad_()
    before = sparse_kl(logits, targets, position_weighting=weighting)
    expected = torch.autograd.grad(before, logits)[0]
    targets.entropy[~targets.loss_mask] = torch.nan
    after = sparse_kl(logits, targets, position_weighting=weighting)
    assert torch.equal(before, after) and torch.equal(torch.autograd.grad(after, logits)[0], expected)


def test_an_unknown_weighting_is_refused() -> None:
    targets, logits = random_targets(N, V, K), randn(N, V)
    with pytest.raises(
        ValueError, match="`position_weighting` entropy: expected one of uniform, teacher-entropy, student"
    ):
        sparse_kl(logits, targets, position_weighting="entropy")
    with pytest.raises(ValueError, match="`position_weighting` entropy"):
        fused_sums(logits, torch.eye(V).double(), None, targets, position_weighting="entropy")


# ---- in a run


OPTIONS: dict[str, Any] = {
    "divergence": "forward-kl:0.5,js(0.1):2",
    "kd_schedule": "linear:0.9:0.5",
    "max_steps": 4,
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def folder(teacher_dir: Path, student_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of rows of different lengths with masks, and a run over it with 8 rows a step at once, per weighting."""
    folder = tmp_path_factory.mktemp("weighting")
    data = write_jsonl(folder / "chat.jsonl", conversations(18))
    build_cache(folder / "cache", teacher_dir, data, packing=False)
    (folder / "arguments.json").write_text(json.dumps({**SGD, "learning_rate": 2.0}))
    for weighting in POSITION_WEIGHTINGS:
        run(folder, weighting, student_dir, position_weighting=weighting, batch_size=8)
    return folder


def run(folder: Path, name: str, student: Path, **options: Any) -> None:
    arguments = {"training_args": str(folder / "arguments.json"), **OPTIONS}
    train(folder / name, folder / "cache", student=student, **arguments, **options)


@pytest.mark.long
def test_a_weighting_trains_another_student(folder: Path, student_dir: Path) -> None:
    trained = {name: weights(folder / name) for name in POSITION_WEIGHTINGS}
    for name, other in (("uniform", "teacher-entropy"), ("teacher-entropy", "student-entropy")):
        assert distance(trained[name], weights(student_dir)) > 0.01
        assert distance(trained[name], trained[other]) > 1e-3
    first = {name: next(entry for entry in log_history(folder / name) if "kl" in entry) for name in POSITION_WEIGHTINGS}
    uniform = first["uniform"]
    assert uniform["soft"] == pytest.approx((uniform["loss"] - 0.1 * uniform["ce"]) / 0.9, rel=1e-5)
    for name in BY_ENTROPY:
        assert first[name]["kl"] == uniform["kl"] and 0.3 < first[name]["loss"] / uniform["loss"] < 0.95
        assert "soft" not in first[name]  # cannot be told from a weighted sum


@pytest.mark.long
@every_weighting
def test_accumulated_steps_are_those_of_one_batch(folder: Path, student_dir: Path, weighting: str) -> None:
    for size, steps in ((2, 4), (1, 8)):
        name = f"{weighting}-{size}"
        options = {"batch_size": size, "gradient_accumulation_steps": steps}
        run(folder, name, student_dir, position_weighting=weighting, **options)
        assert distance(weights(folder / name), weights(folder / weighting)) < 2e-6
        for a, b in zip(log_history(folder / name), log_history(folder / weighting), strict=True):
            assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-5)


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one(folder: Path, student_dir: Path) -> None:
    """With a mixture, a schedule and the student's entropy at once: all of them reach the wrapped module's forward."""
    assert len(cf.open_cache(folder / "cache")) % 2 == 0
    options = {**OPTIONS, "training_args": "arguments.json", "position_weighting": "student-entropy", "cache": "cache"}
    options |= {"student": str(student_dir), "output": "two", "batch_size": 2, "gradient_accumulation_steps": 2}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    on_two_processes(folder, "-m", "cli", "train-student", "--device", "cpu", *words)
    assert distance(weights(folder / "two"), weights(folder / "student-entropy")) < 2e-6
    one, two = ([e for e in log_history(folder / name) if "kl" in e] for name in ("student-entropy", "two"))
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "kl", "ce", "kd_weight"):
            assert a[name] == pytest.approx(b[name], rel=2e-6), name
