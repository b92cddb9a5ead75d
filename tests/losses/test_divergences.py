"""Every divergence under every policy it can be taken under: against its published formula, against its fused twin, and
what it must be at its ends: zero, never negative, finite, with a gradient of the size that a temperature leaves.

The specifications themselves are in test_mixture.py, the forward KL's own ends in test_losses.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.nn import functional as F

from dense import extremes, random_targets
from head_sums import fused_sums, general_sums
from pipeline.losses import (
    DIVERGENCES,
    TAIL_POLICIES,
    UNBIASED,
    DivergenceSum,
    SparseTargetBatch,
    divergences,
    fused_head_loss,
    sparse_kl,
)
from textbook import CASES, OF_DISTRIBUTIONS, OF_ENTRIES, SPECS, alpha_beta, randn, textbook, with_gradients

N, V, D, K, PADDING = 23, 61, 7, 6, 5
TEMPERATURES = (1.0, 3.0)

ALLOWED = {
    "forward-kl": set(TAIL_POLICIES),
    "reverse-kl": {"bucket", "renormalise"},
    "js": {"bucket", "renormalise", "label"},
    "skew-forward-kl": {"bucket", "renormalise", "label"},
    "skew-reverse-kl": {"bucket", "renormalise", "label"},
    "tvd": {"bucket", "renormalise", "label"},
    "alpha-beta": {"bucket", "renormalise"},
    "logit-mse": {"bucket", "renormalise", "label"},
    "pairwise": {"bucket", "renormalise", "label"},
}

every_spec = pytest.mark.parametrize("spec", SPECS)
every_case = pytest.mark.parametrize("spec, tail", CASES)
every_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)


def full_targets(n: int = N, vocab: int = V, **options: Any) -> SparseTargetBatch:
    return random_targets(n, vocab, vocab, ragged=False, **options)


def teacher_logprobs(targets: SparseTargetBatch, vocab: int) -> Tensor:
    """[N, V] where the targets hold every token."""
    return torch.full((len(targets), vocab), -torch.inf, dtype=torch.float64).scatter(1, targets.ids, targets.logprobs)


# ---- the formulas


def test_the_formulas_by_hand() -> None:
    # p = (.8, .2), q = (.5, .5). KL(q‖p) = .5·log(.5/.8) + .5·log(.5/.2) = .2231436. m = (.65, .35):
    # ½·(.8·log(.8/.65) + .2·log(.2/.35)) + ½·(.5·log(.5/.65) + .5·log(.5/.35)) = ½·.0541883 + ½·.0471553 = .0506718.
    # ½·(.3 + .3) = .3. 4·(1 − √.4 − √.1) = .2052668. ½·(log²1.6 + log²2.5) = ½·(.2209034 + .8395887) = .5302460.
    # e = log q − log p = (−.4700036, .9162907): ((.9162907 + .4700036)/2)² = .4804530; .8·.2·1.3862944² = .3074899.
    log_p, log_q = (torch.tensor([x], dtype=torch.float64).log() for x in ([0.8, 0.2], [0.5, 0.5]))
    expected = {
        divergences.reverse_kl: 0.2231436,
        divergences.js: 0.0506718,
        divergences.tvd: 0.3,
        divergences.alpha_beta: 0.2052668,
        divergences.logit_mse: 0.4804530,
        divergences.pairwise: 0.3074899,
    }
    for function, value in expected.items():
        assert function(log_p, log_q).item() == pytest.approx(value, abs=1e-7), function.__name__
    assert divergences.alpha_beta(log_p, log_q, 0.0, 0.0).item() == pytest.approx(0.5302460, abs=1e-7)


@pytest.mark.long
@every_temperature
@every_case
def test_all_tokens_is_the_textbook_formula(spec: str, tail: str, temperature: float) -> None:
    """K = V: no tail, so every policy is the divergence of the full distributions."""
    targets, logits = full_targets(), randn(N, V, scale=2.0)
    found = sparse_kl(logits, targets, temperature=temperature, tail=tail, divergence=spec, reduction="none")
    expected = textbook(spec, logits, targets, temperature=temperature, tail=tail)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-11, atol=1e-13)


@every_temperature
@every_case
@pytest.mark.parametrize("quantised", [False, True])
def test_equals_the_dense_computation(spec: str, tail: str, temperature: float, quantised: bool) -> None:
    targets, logits = random_targets(N, V, K, quantised=quantised), randn(N, V, scale=2.0)
    options = {"temperature": temperature, "tail": tail, "reduction": "none"}
    found = sparse_kl(logits, targets, divergence=spec, **options)
    expected = textbook(spec, logits, targets, temperature=temperature, tail=tail)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-12)
    # Beside the hard label: a weighted mean of the two.
    mixed = sparse_kl(logits, targets, divergence=spec, kd_weight=0.4, **options)
    ce = F.cross_entropy(logits, targets.labels, reduction="none")
    torch.testing.assert_close(mixed, 0.4 * found + 0.6 * ce, rtol=1e-12, atol=1e-13)


def test_the_tables_hold_every_divergence() -> None:
    assert DIVERGENCES.keys() == ALLOWED.keys() == OF_DISTRIBUTIONS.keys() | OF_ENTRIES.keys()
    assert {term.name for spec in SPECS for term in DivergenceSum.parse(spec).terms} == DIVERGENCES.keys()
    for name, tails in ALLOWED.items():
        assert set(DivergenceSum.parse(name).tails) == tails, name


@pytest.mark.parametrize("alpha, beta", [(1.0, 1e-9), (1e-9, 1.0), (0.6, 1e-9), (1e-9, 0.6), (1e-6, 1e-6)])
def test_alpha_beta_is_continuous_at_its_limits_also_in_float32(alpha: float, beta: float) -> None:
    """The published sum loses every digit there: it divides a difference of numbers near one by αβ."""
    p, q = (randn(5, 9, seed=i, scale=2.0).log_softmax(1) for i in (1, 2))
    ends = [0.0 if x < 1e-3 else x for x in (alpha, beta)]
    expected = [alpha_beta(a, b, *ends) for a, b in zip(p.exp().numpy(), q.exp().numpy(), strict=True)]
    for dtype, rtol in ((torch.float64, 1e-4), (torch.float32, 1e-4)):
        q_leaf = q.to(dtype).requires_grad_()
        found = divergences.alpha_beta(p.to(dtype), q_leaf, alpha, beta)
        if alpha + beta > 1e-3 or dtype == torch.float64:
            np.testing.assert_allclose(found.detach().numpy(), expected, rtol=rtol)
        assert torch.autograd.grad(found.sum(), q_leaf)[0].isfinite().all()


def test_special_cases_of_one_another() -> None:
    p, q = (randn(9, 12, seed=i, scale=2.0).log_softmax(1) for i in (1, 2))
    d = divergences
    pairs = [
        (d.alpha_beta(p, q, 1.0, 0.0), d.forward_kl(p, q)),
        (d.alpha_beta(p, q, 0.0, 1.0), d.reverse_kl(p, q)),
        (d.reverse_kl(p, q), d.forward_kl(q, p)),
        (d.js(p, q, 0.3), d.js(q, p, 0.7)),
        (d.skew_reverse_kl(p, q, 0.2), d.skew_forward_kl(q, p, 0.2)),
        (d.js(p, q, 1e-7) / 1e-7, d.forward_kl(p, q)),
        (d.js(p, q, 1 - 1e-7) / 1e-7, d.reverse_kl(p, q)),
        (d.skew_forward_kl(p, q, 1e-9), d.forward_kl(p, q)),
        (d.pairwise(torch.zeros_like(q), q), d.logit_mse(torch.zeros_like(q), q)),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-12)
    near = p + 1e-4 * randn(9, 12, seed=3)
    near = near.log_softmax(1)
    torch.testing.assert_close(d.pairwise(p, near), 2 * d.forward_kl(p, near), rtol=1e-2, atol=0)
    torch.testing.assert_close(d.js(p, near, 0.3), 0.21 * d.forward_kl(p, near), rtol=1e-2, atol=0)


# ---- the ends


@every_temperature
@every_case
def test_zero_where_student_and_teacher_are_equal(spec: str, tail: str, temperature: float) -> None:
    targets = full_targets()
    student = (teacher_logprobs(targets, V) + torch.arange(N)[:, None]).requires_grad_()  # a constant changes nothing
    options = {"temperature": temperature, "tail": tail, "divergence": spec, "reduction": "none"}
    loss = sparse_kl(student, targets, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    # Total variation has a corner there: its gradient is a sign of rounding, times p.
    assert loss.abs().max() < 1e-11 and ("tvd" in spec or gradient.abs().max() < 1e-11)
    away = sparse_kl(student + 0.1 * randn(N, V), targets, **options)
    assert (away[targets.loss_mask] > 1e-9).all()


RANGES = {"tvd": 1.0, "js(0.1)": 0.3250830, "js(0.9)": 0.3250830}
RANGES |= {"skew-forward-kl(0.1)": math.log(10), "skew-reverse-kl(0.3)": -math.log(0.3)}


@pytest.mark.long
@settings(max_examples=30)
@extremes(TEMPERATURES)
def test_never_negative_within_its_range_and_always_finite(
    seed: int, vocab: int, share: float, scale: float, temperature: float, quantised: bool, dtype: torch.dtype
) -> None:
    targets = random_targets(4, vocab, max(1, int(share * vocab)), seed=seed, masked=0.0, quantised=quantised)
    logits = randn(4, vocab, seed=seed, scale=scale).to(dtype).requires_grad_()
    for spec, tail in CASES:
        loss = sparse_kl(logits, targets, temperature=temperature, tail=tail, divergence=spec, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isfinite().all() and gradient.isfinite().all(), (spec, tail)
        # Rounding of sums, against log-ratios as large as the logits; and what the floor adds to the teacher's sum.
        rounding = temperature**2 * (torch.finfo(dtype).eps * 40 * (10 + scale / temperature) + 2e-7)
        assert (loss >= -rounding).all(), (spec, tail)
        if spec in RANGES:
            largest = RANGES[spec] * temperature ** (1 if spec == "tvd" else 2)
            assert (loss <= largest * (1 + 1e-5)).all(), (spec, tail)


def hostile_targets(dtype: torch.dtype) -> SparseTargetBatch:
    """One-hot teacher; entries of probability zero; no entry at all; nothing outside the entries; all outside; one
    position that does not count, of NaN."""
    inf, nan = torch.inf, torch.nan
    rows = [
        ([2, 0, 0], [1.0, 0, 0], 0.0, 2, 3),
        ([1, 3, 4], [0.7, 0, 0.3], 0.0, 3, 3),
        ([0, 0, 0], [0, 0, 0], 1.0, 0, 3),
        ([0, 1, 2], [0.2, 0.3, 0.4], 0.1, 5, 2),
        ([5, 0, 0], [1e-30, 0, 0], 1.0, 1, 3),
        ([5, 6, 0], [nan, 0.2, 0.1], nan, -100, 3),
    ]
    ids, p, m, labels, counts = map(list, zip(*rows, strict=True))
    entropy = torch.tensor([0.0, 0.6, 1.9, 1.7, 1.8, inf], dtype=dtype)
    return SparseTargetBatch(
        ids=torch.tensor(ids),
        logprobs=torch.tensor(p, dtype=dtype).log(),
        exact_counts=torch.tensor(counts),
        residual_logprob=torch.tensor(m, dtype=dtype).log(),
        entropy=entropy,
        labels=torch.tensor(labels),
    )


@pytest.mark.long
@every_temperature
@every_case
def test_one_hot_teachers_and_absent_entries(spec: str, tail: str, temperature: float) -> None:
    targets = hostile_targets(torch.float64)
    keep = torch.tensor([0, 1, 3, 4] if tail == "renormalise" else [0, 1, 2, 3, 4])  # else there is nothing to rescale
    options = {"temperature": temperature, "tail": tail, "divergence": spec}
    for scale in (2.0, 60.0):
        logits = randn(6, 7, scale=scale)
        for dtype in (torch.float64, torch.float32):
            z = logits.to(dtype).requires_grad_()
            counted = targets[:5]
            fused = fused_sums(z[:5], torch.eye(7, dtype=dtype), None, counted, chunk_size=2, **options).loss
            plain = sparse_kl(z, targets, reduction="none", **options)
            assert plain[:5].isfinite().all() and torch.autograd.grad(fused, z)[0].isfinite().all()
            torch.testing.assert_close(
                fused, plain[:5].sum(), rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-6
            )
            if dtype == torch.float64 and scale == 2.0:
                expected = textbook(spec, logits[keep], targets[keep], temperature=temperature, tail=tail)
                np.testing.assert_allclose(plain[keep].detach().numpy(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("spec", [spec for spec, tail in CASES if tail == "renormalise"])
def test_a_position_without_any_class_is_zero(spec: str) -> None:
    nothing, logits = hostile_targets(torch.float64)[2:3], randn(1, 7).requires_grad_()
    loss = sparse_kl(logits, nothing, divergence=spec, tail="renormalise")
    assert loss.abs() < 1e-15 and (torch.autograd.grad(loss, logits)[0] == 0).all()


@every_case
def test_padding_of_the_entry_list_and_sampled_entries_change_nothing(spec: str, tail: str) -> None:
    targets, logits = random_targets(N, V, K), randn(N, V, scale=2.0).requires_grad_()
    wider = replace(
        targets,
        ids=torch.cat([torch.randint(V, (N, 3)), targets.ids, torch.randint(V, (N, 2))], dim=1),
        logprobs=F.pad(targets.logprobs, (3, 2), value=-torch.inf),
        exact_counts=targets.exact_counts + 3,
    )
    options = {"temperature": 2.0, "kd_weight": 0.4, "tail": tail, "divergence": spec}
    expected = with_gradients(sparse_kl(logits, targets, **options), [logits])
    for same in (wider, targets.exact):
        for a, b in zip(with_gradients(sparse_kl(logits, same, **options), [logits]), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


# ---- temperature


@every_spec
def test_the_gradient_keeps_its_size_at_high_temperatures(spec: str) -> None:
    """That is what T² is for, and T for total variation; by a power more or less it would grow or fall fourfold."""
    targets, logits = full_targets(), randn(N, V, scale=2.0).requires_grad_()
    norms = []
    for temperature in (200.0, 800.0):
        loss = sparse_kl(logits, targets, temperature=temperature, divergence=spec, tail="bucket")
        norms.append(torch.autograd.grad(loss, logits)[0].norm().item())
    assert norms[0] > 1e-4
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_logit_mse_does_not_depend_on_the_temperature() -> None:
    targets, logits = random_targets(N, V, K), randn(N, V, scale=2.0)

    def at(spec: str, temperature: float) -> Tensor:
        return sparse_kl(logits, targets, temperature=temperature, divergence=spec, reduction="none")

    torch.testing.assert_close(at("logit-mse", 1.0), at("logit-mse", 7.0), rtol=1e-12, atol=0)
    weighted = (at("pairwise", 1.0) - at("pairwise", 7.0)).abs()  # by probabilities, which do
    assert (weighted > 1e-3)[targets.loss_mask].any()


def test_targets_captured_at_two_and_used_at_two() -> None:
    """T²·D of softmax(teacher/2) and softmax(student/2): the entries are at T already, and are not tempered again."""
    logits, teacher = randn(N, V, scale=2.0), randn(N, V, seed=3, scale=2.0)
    full = SparseTargetBatch(
        ids=torch.arange(V).expand(N, V),
        logprobs=(teacher / 2).log_softmax(1),
        residual_logprob=torch.full((N,), -torch.inf, dtype=torch.float64),
        labels=torch.arange(N),
    )
    raw = replace(full, logprobs=teacher.log_softmax(1))
    for spec, tail in CASES:
        options = {"divergence": spec, "tail": tail, "temperature": 2.0, "reduction": "none"}
        found = sparse_kl(logits, replace(full, temperature=2.0), **options)
        expected = textbook(spec, logits, raw, tail=tail, temperature=2.0)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-12)


@every_spec
@pytest.mark.parametrize("tail", UNBIASED)
def test_a_sample_serves_only_what_is_linear_in_the_teacher(spec: str, tail: str) -> None:
    targets, logits, eye = random_targets(N, V, K), randn(N, V), torch.eye(V, dtype=torch.float64)
    for loss in (
        lambda: sparse_kl(logits, targets, tail=tail, divergence=spec),
        lambda: fused_head_loss(logits, eye, None, targets, tail=tail, divergence=spec),
        lambda: fused_sums(logits, eye, None, targets, tail=tail, divergence=spec),
        lambda: general_sums(logits, lambda h: h, targets, tail=tail, divergence=spec),
    ):
        with pytest.raises(
            ValueError, match=rf"`tail` {tail} with `divergence=.*because .*Use `tail=bucket` or `tail=renormalise`"
        ):
            loss()


@pytest.mark.parametrize("spec", ["reverse-kl", "alpha-beta(0.5,0.5)", "forward-kl:0.7,reverse-kl:0.3"])
def test_a_teacher_without_mass_on_most_tokens_has_no_logarithm_there(spec: str) -> None:
    with pytest.raises(ValueError, match=r"`tail` label with `divergence=.*which are then 0 .*Use `tail=bucket`"):
        sparse_kl(randn(N, V), random_targets(N, V, K), tail="label", divergence=spec)
    with pytest.raises(ValueError, match="`tail` buckets: expected one of sampled, realized, bucket"):
        sparse_kl(randn(N, V), random_targets(N, V, K), tail="buckets", divergence=spec)
