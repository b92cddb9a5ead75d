"""The fused head by the Triton kernels, against its definition in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dense import captured_for, random_targets
from head_sums import fused_sums, general_sums
from kernels_here import DEVICE, kernels_in_use
from pipeline.losses import IGNORE_INDEX, POSITION_WEIGHTINGS, TAIL_POLICIES, HeadOutput, SparseTargetBatch, sparse_kl
from pipeline.losses.divergence_sum import DIVERGENCES
from pipeline.models.devices.kernels import TILE
from textbook import relative_errors

N, D, K = 6, 8, 5
WEIGHTED = [("forward-kl:0.3,js(0.1):0.5", weighting) for weighting in POSITION_WEIGHTINGS]


class Problem:
    """Hidden states, head and bias in fp64, and targets, of N positions."""

    def __init__(self, vocab: int, *, n: int = N, scale: float = 0.5, **targets: Any) -> None:
        generator = torch.Generator().manual_seed(vocab)
        shapes = (n, D), (vocab, D), (vocab,)
        self.leaves = [torch.randn(*each, generator=generator, dtype=torch.float64) for each in shapes]
        self.leaves[1] *= scale
        self.targets = random_targets(n, vocab, min(K, vocab), seed=vocab, **targets)

    def reference(self, **options: Any) -> list[Tensor]:
        """Loss and gradients in fp64, through all logits."""
        leaves = [each.clone().requires_grad_() for each in self.leaves]
        logits = F.linear(*leaves)
        return derived(sparse_kl(logits, self.of(**options), **options), leaves)

    def by_kernels(self, *, bias: bool = True, kernels: bool = True, **options: Any) -> list[Tensor]:
        targets = self.of(**options)
        leaves = [each.to(DEVICE, torch.float32).requires_grad_() for each in self.leaves[: 3 if bias else 2]]
        scale = 1 / max(1, int(targets.loss_mask.sum()))
        with kernels_in_use(plain=not kernels):
            output = fused_sums(*leaves[:2], leaves[2] if bias else None, targets, scale=scale, **options)
            return derived(output.loss, leaves)

    def of(self, *, tail: str = "bucket", temperature: float = 1.0, **_: Any) -> SparseTargetBatch:
        return captured_for(self.targets, tail, temperature)


def derived(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [each.cpu() for each in (loss.detach(), *torch.autograd.grad(loss, leaves))]


@pytest.mark.parametrize("vocab", [3, 5, 33])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", TAIL_POLICIES)
def test_loss_and_gradients(vocab: int, temperature: float, tail: str) -> None:
    options = {"tail": tail, "temperature": temperature, "kd_weight": 0.6}
    problem = Problem(vocab)
    assert max(relative_errors(problem.by_kernels(chunk_size=4, **options), problem.reference(**options))) < 1e-5


@pytest.mark.parametrize("divergence, weighting", [*((each, "uniform") for each in DIVERGENCES), *WEIGHTED])
def test_every_divergence(divergence: str, weighting: str) -> None:
    """Whatever it is: its derivatives reach the logits through the same two passes."""
    options = {"divergence": divergence, "position_weighting": weighting, "temperature": 1.5, "kd_weight": 0.7}
    problem = Problem(70)
    assert max(relative_errors(problem.by_kernels(**options), problem.reference(**options))) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_several_tiles_and_logits_far_from_zero(temperature: float) -> None:
    """Most of the vocabulary underflows, in some tiles all of it."""
    problem = Problem(2 * TILE + 9, n=3, scale=6.0, masked=0.0)
    options = {"temperature": temperature, "kd_weight": 0.5}
    assert max(relative_errors(problem.by_kernels(**options), problem.reference(**options))) < 2e-5


def sums_by(problem: Problem, *, kernels: bool, **options: Any) -> HeadOutput:
    leaves = [each.to(DEVICE, torch.float32) for each in problem.leaves]
    with kernels_in_use(plain=not kernels):
        return fused_sums(*leaves, problem.of(**options), **options)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sums_and_no_gradient(temperature: float) -> None:
    problem = Problem(90)
    options = {"temperature": temperature, "kd_weight": 0.5, "position_weighting": "student-entropy"}
    torch.testing.assert_close(sums_by(problem, kernels=True, **options), sums_by(problem, kernels=False, **options))
    with torch.inference_mode():
        without = sums_by(problem, kernels=True, **options)
    torch.testing.assert_close(without, sums_by(problem, kernels=False, **options))
    assert not without.loss.requires_grad


def test_agreement_where_the_entries_are_the_likeliest_tokens() -> None:
    """The largest logit is then among those that the kernels do not see."""
    problems = [Problem(vocab, n=1, masked=0.0) for vocab in range(60, 68)]
    for problem in problems:
        problem.leaves[2][problem.targets.ids.flatten()] += 20.0
    found, plain = ([int(sums_by(each, kernels=by).agreement) for each in problems] for by in (True, False))
    assert found == plain and 0 in plain


def test_no_loss_tokens_and_one() -> None:
    for n in (1, 4):
        problem = Problem(40, n=n, masked=0.0)
        for counted in (0, 1):
            problem.targets.labels[counted:] = IGNORE_INDEX
            problem.targets.labels[:counted] = 3
            found, expected = problem.by_kernels(kd_weight=0.5), problem.reference(kd_weight=0.5)
            assert max(relative_errors(found, expected)) < 1e-5
            assert counted or all((each == 0).all() for each in found)


def test_minus_infinity_is_a_token_that_the_student_rules_out() -> None:
    """Outside of the entries, as a head that masks tokens writes it."""
    problem = Problem(40, masked=0.0)
    named = torch.cat([problem.targets.ids.flatten(), problem.targets.labels])
    problem.leaves[2][[i for i in range(40) if i not in named][:3]] = -torch.inf
    found, expected = problem.by_kernels(kd_weight=0.5), problem.reference(kd_weight=0.5)
    assert all(each.isfinite().all() for each in found)
    assert max(relative_errors(found, expected)) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_not_a_number_stays_one(temperature: float) -> None:
    """Training notices by it that it has diverged."""
    for value in (torch.nan, torch.inf):
        problem = Problem(40, masked=0.0)
        problem.leaves[2][17] = value
        assert all(each.isnan().any() for each in problem.by_kernels(kd_weight=0.5, temperature=temperature))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_in_bfloat16_is_as_exact_as_the_plain_one(bias: bool, temperature: float) -> None:
    """The kernel rounds it where the plain way rounds it in a pass of its own; Triton's interpreter cuts it instead."""
    problem = Problem(301, n=8)
    options = {"temperature": temperature, "kd_weight": 0.5, "bias": bias}
    rounded = [each.bfloat16().double() for each in problem.leaves]
    problem.leaves = rounded if bias else [*rounded[:2], torch.zeros_like(rounded[2])]
    truth = problem.reference(temperature=temperature, kd_weight=0.5)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found, plain = (problem.by_kernels(kernels=kernels, **options) for kernels in (True, False))
    errors, plain_errors = (relative_errors(each, truth[: len(each)]) for each in (found, plain))
    assert all(a < 2.5 * b + 1e-6 for a, b in zip(errors, plain_errors, strict=True))
    assert max(errors) < 0.02


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_head_of_its_own(temperature: float) -> None:
    problem = Problem(60)
    found = []
    for plain in (False, True):
        leaves = [each.to(DEVICE, torch.float32).requires_grad_() for each in problem.leaves]
        with kernels_in_use(plain=plain):
            own = lambda h, of=leaves: 3 * torch.tanh(F.linear(h, *of[1:]))  # noqa: E731
            output = general_sums(leaves[0], own, problem.targets, temperature=temperature, kd_weight=0.5)
            found.append(derived(output.loss, leaves))
    assert max(relative_errors(*found)) < 1e-5
