"""The loss on whole distributions: every divergence and temperature against the textbook and against K = V entries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_fused import LargestTensor
from torch import Tensor
from torch.nn import functional as F

from head_sums import fused_sums, general_sums
from pipeline.losses import DivergenceSum, FullTargets, SparseTargetBatch, sparse_kl
from pipeline.losses import full_targets as full
from textbook import OF_DISTRIBUTIONS, OF_ENTRIES, SPECS, check_heads, randn, relative_errors, terms, with_gradients

N, V, D, WIDTH, PADDING = 23, 61, 7, 5, 4
ALL = ("forward-kl", *SPECS)
every_divergence = pytest.mark.parametrize("spec", ALL)


class Problem:
    """A student with a padded head, and a teacher of another width whose states are stored in another order."""

    def __init__(self, positions: int = N, *, dtype: torch.dtype = torch.float64, like_student: bool = False) -> None:
        self.hidden, self.weight, self.bias = (
            randn(positions, D),
            0.5 * randn(V + PADDING, D, seed=1),
            randn(V + PADDING, seed=2),
        )
        self.weight[V:] *= 5  # loud, so that whoever lets them in is heard
        states, matrix = (
            (self.hidden, self.weight[:V])
            if like_student
            else (randn(positions, WIDTH, seed=3), randn(V, WIDTH, seed=4))
        )
        offset = self.bias[:V] if like_student else 0.0
        self.teacher_logits = states @ matrix.T + offset
        order = torch.randperm(positions, generator=torch.Generator().manual_seed(5))
        place = torch.empty_like(order)
        place[order] = torch.arange(positions)
        labels = torch.randint(V, (positions,), generator=torch.Generator().manual_seed(6))
        labels[::4] = -100
        log_p = self.teacher_logits.log_softmax(dim=1)
        self.targets = FullTargets(
            states=states[order].to(dtype),
            scales=None,
            place=place,
            labels=labels,
            entropy=-(log_p.exp() * log_p).sum(dim=1),
            head=lambda each: each @ matrix.to(each.dtype).T + offset,
        )
        # The same as a list of all tokens, which nothing is outside of.
        self.entries = SparseTargetBatch(
            ids=torch.arange(V).expand(positions, V),
            logprobs=log_p,
            residual_logprob=torch.full((positions,), -torch.inf, dtype=torch.float64),
            labels=labels,
            entropy=self.targets.entropy,
        )
        self.count = int(self.targets.loss_mask.sum())

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        return [x.detach().to(dtype).requires_grad_() for x in (self.hidden, self.weight, self.bias)]


def textbook(spec: str, p_logits: np.ndarray, z: np.ndarray, temperature: float) -> float:
    """Σ weight·T²·D of one position, of total variation T·D, from two vectors of logits."""
    p, q = (np.exp(x / temperature - (x / temperature).max()) for x in (p_logits, z))
    p, q = p / p.sum(), q / q.sum()
    total = 0.0
    for name, parameters, weight in terms(spec):
        if name in OF_ENTRIES:
            value = OF_ENTRIES[name](np.log(p), z / temperature)
        else:
            value = OF_DISTRIBUTIONS[name](p, q, *parameters)
        total += weight * temperature ** (1 if name == "tvd" else 2) * value
    return total


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@every_divergence
def test_values_are_those_of_the_textbook_at_every_temperature(spec: str, temperature: float) -> None:
    problem = Problem()
    z = (problem.hidden @ problem.weight[:V].T + problem.bias[:V]).numpy()
    expected = sum(
        textbook(spec, problem.teacher_logits[i].numpy(), z[i], temperature)
        for i in torch.nonzero(problem.targets.loss_mask).flatten().tolist()
    )
    leaves = problem.leaves(torch.float64)
    found = fused_sums(*leaves, problem.targets, divergence=spec, temperature=temperature, vocab_size=V)
    assert found.loss.item() == pytest.approx(expected, rel=1e-10)
    kl = fused_sums(*leaves, problem.targets, temperature=temperature, vocab_size=V)
    assert found.kl.item() == pytest.approx(kl.loss.item() / temperature**2, rel=1e-10)  # logged, whatever is trained
    assert found.count.item() == problem.count


@pytest.mark.long
@every_divergence
def test_loss_and_gradients_equal_those_of_all_tokens_as_entries(spec: str) -> None:
    """`sparse_kl` with K = V, whose gradients are autograd's, in fp64; a linear head and one that caps its logits."""
    problem = Problem()
    bounds = {torch.float32: 2e-5, torch.float64: 1e-10}
    check_heads(problem.leaves, problem.entries, problem.targets, V, bounds, divergence=spec)


@every_divergence
def test_gradient_by_finite_differences(spec: str) -> None:
    problem = Problem(5)
    leaves = [each[..., :3] if each.ndim == 2 else each for each in problem.leaves(torch.float64)]
    leaves = [each.detach().clone().requires_grad_() for each in leaves]
    options = {"divergence": spec, "temperature": 2.0, "kd_weight": 0.6, "chunk_size": 3, "vocab_size": V}
    assert torch.autograd.gradcheck(lambda *x: fused_sums(*x, problem.targets, **options).loss, leaves, fast_mode=True)


@every_divergence
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(spec: str) -> None:
    problem = Problem(like_student=True)
    leaves = problem.leaves(torch.float64)
    output = fused_sums(*leaves, problem.targets, divergence=spec, temperature=2.0, vocab_size=V)
    assert abs(output.loss.item()) < 1e-12 and output.agreement == output.count
    if "tvd" not in spec:  # whose gradient is a sign
        assert max(each.abs().max().item() for each in torch.autograd.grad(output.loss, leaves)) < 1e-8


@every_divergence
def test_no_divergence_is_negative_and_all_are_finite_for_certain_teachers(spec: str) -> None:
    problem = Problem()
    sure = problem.targets
    certain = FullTargets(
        **{**vars(sure), "head": lambda each: 400.0 * F.one_hot(sure.place[: len(each)] % V, V).to(each)}
    )
    for targets in (sure, certain):
        for dtype in (torch.float32, torch.float64):
            leaves = problem.leaves(dtype)
            found = fused_sums(*leaves, targets, divergence=spec, vocab_size=V, scale=1.0)
            assert found.loss >= 0 and all(each.isfinite().all() for each in with_gradients(found.loss, leaves))


@pytest.mark.parametrize("weighting", ["teacher-entropy", "student-entropy"])
def test_positions_are_weighted_as_with_entries(weighting: str) -> None:
    problem = Problem()
    options: dict[str, Any] = {"position_weighting": weighting, "kd_weight": 0.4, "temperature": 2.0}
    leaves = problem.leaves(torch.float64)
    z = leaves[0] @ leaves[1][:V].T + leaves[2][:V]
    expected = with_gradients(sparse_kl(z, problem.entries, **options), leaves)
    leaves = problem.leaves(torch.float64)
    found = fused_sums(*leaves, problem.targets, vocab_size=V, scale=1 / problem.count, **options)
    assert max(relative_errors(with_gradients(found.loss, leaves), expected)) < 1e-10


def test_masked_positions_contribute_nothing_at_all() -> None:
    problem = Problem()
    options: dict[str, Any] = {"temperature": 2.0, "kd_weight": 0.5, "divergence": "reverse-kl", "vocab_size": V}

    def found() -> list[Tensor]:
        leaves = problem.leaves(torch.float32)
        return with_gradients(fused_sums(*leaves, problem.targets, chunk_size=4, **options).loss, leaves)

    before = found()
    masked = ~problem.targets.loss_mask
    problem.hidden[masked] = torch.nan
    problem.targets.states[problem.targets.place[masked]] = torch.nan
    problem.targets.place[masked] = 10**9  # nowhere
    problem.targets.entropy[masked] = torch.nan
    for a, b in zip(found(), before, strict=True):
        assert torch.equal(a, b)


def test_nothing_counted_is_no_loss_and_a_gradient_of_zero() -> None:
    problem = Problem()
    problem.targets.labels.fill_(-100)
    for general in (False, True):
        hidden, weight, bias = leaves = problem.leaves(torch.float32)
        head = (lambda h, w=weight, b=bias: F.linear(h, w, b)) if general else None
        if head is not None:
            output = general_sums(hidden, head, problem.targets, vocab_size=V)
        else:
            output = fused_sums(hidden, weight, bias, problem.targets, vocab_size=V)
        assert output.loss == 0 and output.count == 0
        assert all((each == 0).all() for each in torch.autograd.grad(output.loss, leaves))


@pytest.mark.parametrize("chunk_size", [1, 5, N, 100])
def test_the_result_does_not_depend_on_the_chunks(chunk_size: int) -> None:
    problem = Problem()
    results = []
    for size in (7, chunk_size):
        leaves = problem.leaves(torch.float64)
        output = fused_sums(*leaves, problem.targets, kd_weight=0.7, vocab_size=V, chunk_size=size)
        results.append([*(each.detach() for each in output), *torch.autograd.grad(output.loss, leaves)])
    assert max(relative_errors(results[1], results[0])) < 1e-12


def test_integers_with_a_scale_are_the_numbers_that_they_stand_for() -> None:
    problem = Problem()
    scales = problem.targets.states.abs().amax(dim=1) / 127
    integers = (problem.targets.states / scales[:, None]).round()
    as_floats = FullTargets(**{**vars(problem.targets), "states": integers * scales[:, None]})
    as_stored = FullTargets(**{**vars(problem.targets), "states": integers.to(torch.int8), "scales": scales})
    first, second = (fused_sums(*problem.leaves(torch.float64), each, vocab_size=V) for each in (as_floats, as_stored))
    assert first.loss.item() == pytest.approx(second.loss.item(), rel=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("spec", ["forward-kl", "js(0.5):2,tvd:0.5,pairwise:0.1"])
def test_nothing_of_size_positions_times_vocabulary_exists(spec: str, general: bool) -> None:
    n, chunk_size = 600, 20
    problem = Problem(n, dtype=torch.float16)
    hidden, weight, bias = problem.leaves(torch.float32)
    allowed = max(chunk_size * V, (V + PADDING) * D, n * D)
    assert allowed < n * V / 8
    options: dict[str, Any] = {"divergence": spec, "temperature": 2.0, "kd_weight": 0.5, "chunk_size": chunk_size}
    with LargestTensor() as mode:
        if general:
            general_sums(
                hidden, lambda h: F.linear(h, weight[:V], bias[:V]), problem.targets, **options
            ).loss.backward()
        else:
            fused_sums(hidden, weight, bias, problem.targets, vocab_size=V, **options).loss.backward()
    assert mode.elements <= allowed


def test_a_function_of_ones_own_gets_whole_distributions(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_full_divergence.py").write_text(
        "def hellinger(log_p, log_q):\n"
        f"    assert log_p.shape[1] in ({V}, 3)\n"
        "    return ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square().sum(dim=1) / 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    problem = Problem()
    found = fused_sums(
        *problem.leaves(torch.float64), problem.targets, divergence="my_full_divergence.hellinger", vocab_size=V
    )
    expected = fused_sums(
        *problem.leaves(torch.float64), problem.targets, divergence="alpha-beta(0.5,0.5)", vocab_size=V
    )
    assert found.loss.item() == pytest.approx(expected.loss.item() / 4, rel=1e-6)
    assert str(DivergenceSum.parse("my_full_divergence.hellinger")) == "my_full_divergence.hellinger"


# ---- bugs that must show


def wrong_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    right = full.full_soft_losses
    monkeypatch.setattr(full, "full_soft_losses", lambda p, q, z, t, m: right(p, (z * t).log_softmax(1), z * t, t, m))


def states_of_other_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    def logits(self: FullTargets, dtype: torch.dtype) -> Tensor:
        return self.head(self.states[: len(self)].to(dtype))

    monkeypatch.setattr(FullTargets, "logits", logits)


def not_tempered(monkeypatch: pytest.MonkeyPatch) -> None:
    right = full.full_soft_losses
    monkeypatch.setattr(full, "full_soft_losses", lambda p, q, z, t, m: right((p * t).log_softmax(1), q, z, t, m))


@pytest.mark.parametrize(
    "bug", [wrong_temperature, states_of_other_positions, not_tempered], ids=lambda bug: bug.__name__
)
def test_bugs_show(bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    test_values_are_those_of_the_textbook_at_every_temperature("forward-kl", 3.0)
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        test_values_are_those_of_the_textbook_at_every_temperature("forward-kl", 3.0)
