"""Every divergence on the fused and on the general head: against its definition, `sparse_kl` on full logits in fp64.

What the definition itself is held to is in test_divergences.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dense import random_targets
from head_sums import fused_sums
from pipeline.losses import DivergenceSum, divergences, fused_head_loss
from pipeline.losses import divergence_sum as mixture_module
from pipeline.losses.reference import student_values
from textbook import CASES, check_heads, randn, with_gradients

N, V, D, K, PADDING = 23, 61, 7, 6, 5

every_case = pytest.mark.parametrize("spec, tail", CASES)


class Problem:
    """Hidden states, a padded head and targets; `leaves` gives them in a dtype as leaves of a graph."""

    def __init__(self, **targets: Any) -> None:
        self.hidden, self.weight, self.bias = (
            randn(N, D),
            0.5 * randn(V + PADDING, D, seed=1),
            randn(V + PADDING, seed=2),
        )
        self.weight[V:] *= 5  # loud, so that whoever lets them in is heard
        self.targets = random_targets(N, V, K, quantised=True, **targets)
        self.count = int(self.targets.loss_mask.sum())

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        return [x.detach().to(dtype).requires_grad_() for x in (self.hidden, self.weight, self.bias)]


@pytest.mark.long
@every_case
def test_fused_and_general_head_equal_the_reference(spec: str, tail: str) -> None:
    problem = Problem()
    bounds = {torch.float32: 1e-5, torch.float64: 1e-11}
    check_heads(problem.leaves, problem.targets, problem.targets, V, bounds, divergence=spec, tail=tail)


@every_case
def test_the_logged_numbers_are_those_of_the_forward_kl(spec: str, tail: str) -> None:
    problem = Problem()
    leaves = problem.leaves(torch.float64)
    options = {"tail": tail, "temperature": 2.0, "kd_weight": 0.3, "vocab_size": V}
    expected = fused_sums(*leaves, problem.targets, **options)
    found = fused_sums(*leaves, problem.targets, divergence=spec, **options)
    for name in ("kl", "ce", "agreement", "count"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert abs(found.loss - expected.loss) > 1e-3


def test_the_default_computes_one_divergence_and_no_other_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("forward_kl", "reverse_kl", "tvd"):
        inner = getattr(divergences, name)
        monkeypatch.setattr(divergences, name, lambda *a, n=name, f=inner: called.append(n) or f(*a))
    monkeypatch.setattr(mixture_module, "distributions", lambda *a: called.append("distributions"))
    problem = Problem()
    for options in ({}, {"divergence": "forward-kl"}, {"divergence": "forward-kl:1"}):
        fused_sums(*problem.leaves(torch.float64), problem.targets, vocab_size=V, **options)
    assert called == ["forward_kl"] * 3
    targets = random_targets(N, V, K).exact
    student = student_values(randn(N, V), targets)
    kl, soft = mixture_module.soft_losses(targets, student, "bucket", 2.0, V, DivergenceSum.parse("forward-kl"))
    assert soft is kl


@every_case
def test_gradient_by_finite_differences(spec: str, tail: str) -> None:
    leaves = [randn(*shape, seed=4).requires_grad_() for shape in ((4, 2), (7, 2), (7,))]
    targets = random_targets(4, 7, 3, seed=1)
    options = {"tail": tail, "divergence": spec, "temperature": 2.0, "kd_weight": 0.6}
    assert torch.autograd.gradcheck(
        lambda *x: fused_head_loss(*x, targets, chunk_size=3, **options), leaves, fast_mode=True
    )


@every_case
def test_masked_positions_contribute_nothing_at_all(spec: str, tail: str) -> None:
    problem = Problem()
    masked = ~problem.targets.loss_mask
    assert masked.any() and not masked.all()
    options = {"tail": tail, "temperature": 2.0, "kd_weight": 0.5, "divergence": spec, "vocab_size": V}

    def found() -> list[Tensor]:
        leaves = problem.leaves(torch.float32)
        return with_gradients(fused_sums(*leaves, problem.targets, chunk_size=4, **options).loss, leaves)

    before = found()
    problem.hidden[masked] = torch.nan
    problem.targets.logprobs[masked] = torch.nan
    problem.targets.residual_logprob[masked] = torch.nan
    for a, b in zip(found(), before, strict=True):
        assert torch.equal(a, b)
