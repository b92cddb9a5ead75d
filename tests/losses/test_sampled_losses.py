"""Losses on sampled targets: unbiased by enumeration, linear in the samples, and refused where they would be biased.

That every policy equals its dense fp64 computation is in test_losses.py and test_fused.py, that means over real samples
converge in test_sampling.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cache_format as cf
from dense import random_targets
from head_sums import fused_sums, general_sums
from pipeline.losses import (
    IGNORE_INDEX,
    TAIL_POLICIES,
    UNBIASED,
    HeadOutput,
    SparseTargetBatch,
    fused_head_loss,
    sparse_kl,
)
from pipeline.teacher.targets.selection import sparse_targets
from sampled import numbers, random, sparse, teacher, threshold

N, V, D, K = 23, 31, 5, 6

every_kind = pytest.mark.parametrize("kind", ["reference", "fused", "general"])


def random_logits(n: int = N, vocab: int = V, *, seed: int = 1) -> Tensor:
    return 2 * torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_and_gradient(kind: str, z: Tensor, targets: SparseTargetBatch, **options: Any) -> tuple[Tensor, Tensor]:
    """Sum over counted positions and its gradient with respect to the logits, by any of the three ways to it."""
    z = z.clone().requires_grad_()
    if kind == "reference":
        loss = sparse_kl(z, targets, reduction="sum", **options)
    else:
        loss = head_output(kind, z, targets, **options).loss
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def head_output(kind: str, z: Tensor, targets: SparseTargetBatch, **options: Any) -> HeadOutput:
    """With an identity matrix for a weight: hidden states are the logits."""
    eye = torch.eye(z.shape[1], dtype=z.dtype)
    if kind == "fused":
        return fused_sums(z, eye, None, targets, chunk_size=7, **options)
    return general_sums(z, lambda h: h @ eye, targets, chunk_size=7, **options)


# ---- unbiased


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_is_that_of_the_student_less_the_weights(kind: str, temperature: float) -> None:
    """softmax(z/T) − w, times T: the student's part has no noise, so its factor is 1 and not Σw."""
    targets, z = replace(random_targets(N, V, K, masked=0.0), temperature=temperature), random_logits()
    w = torch.zeros(N, V, dtype=torch.float64)
    w.scatter_add_(1, targets.ids, targets.logprobs.exp())
    assert ((w.sum(dim=1) - 1).abs() > 0.01).all()
    _, gradient = loss_and_gradient(kind, z, targets, tail="sampled", temperature=temperature)
    torch.testing.assert_close(gradient, temperature * ((z / temperature).softmax(1) - w), rtol=1e-11, atol=1e-13)


@pytest.mark.long
@every_kind
def test_realized_is_unbiased_over_the_labels_that_the_teacher_would_write(kind: str) -> None:
    """The expectation over every label of the vocabulary, exactly, is the divergence of the full distributions."""
    p = random_logits(1, V, seed=4).softmax(1)[0]
    z = random_logits(1, V, seed=5)
    chosen = p.topk(K).indices.sort().values
    rest = p.clone()
    rest[chosen] = 0.0
    everything = SparseTargetBatch(
        ids=chosen.expand(V, K),
        logprobs=p[chosen].log().expand(V, K),
        residual_logprob=rest.sum().log().expand(V),
        entropy=torch.special.entr(p).sum().expand(V),
        labels=torch.arange(V),
    )
    results = [loss_and_gradient(kind, z, everything[i : i + 1], tail="realized") for i in range(V)]
    losses, gradients = torch.stack([loss for loss, _ in results]), torch.cat([gradient for _, gradient in results])
    q = z.log_softmax(1)[0]
    full = F.kl_div(q, p.log(), log_target=True, reduction="sum")
    torch.testing.assert_close(p @ losses, full, rtol=1e-12, atol=0)
    torch.testing.assert_close(p @ gradients, q.exp() - p, rtol=1e-11, atol=1e-14)
    # Not by chance: the labels matter, and the policies that give them the residual are off.
    assert losses.std() > 0.1
    for tail in ("label", "bucket"):
        biased = torch.stack([loss_and_gradient(kind, z, everything[i : i + 1], tail=tail)[0] for i in range(V)])
        assert abs(p @ biased - full) > 0.01


@every_kind
def test_several_samples_together_are_the_mean_of_each_alone(kind: str) -> None:
    z = random_logits(N, 200)
    for rule in (threshold(0.06, samples=3), random(9, samples=4)):
        targets = sparse(sparse_targets(teacher(200).expand(N, 200), rule, numbers(rule, N)))
        together = loss_and_gradient(kind, z, SparseTargetBatch.from_sparse(targets), tail="sampled")
        alone = [
            loss_and_gradient(kind, z, SparseTargetBatch.from_sparse(targets.sample(i)), tail="sampled")
            for i in range(rule.samples)
        ]
        for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
            torch.testing.assert_close(whole, torch.stack(parts).mean(dim=0), rtol=1e-6, atol=1e-7)
        assert torch.stack([loss for loss, _ in alone]).std() > 0


def test_rows_of_a_cache_are_taken_with_all_samples_together() -> None:
    rule = threshold(0.06, samples=3)
    targets = sparse(sparse_targets(teacher(200).expand(6, 200), rule, numbers(rule, 6)))
    mask = np.arange(6) < 5
    row = cf.CacheRow(0, np.arange(6), mask, np.array([6]), targets)
    found = SparseTargetBatch.from_rows([row], length=8, temperature=2.0)
    expected = SparseTargetBatch.from_sparse(targets, loss_mask=torch.from_numpy(mask), temperature=2.0)
    assert len(found) == 8 and found.temperature == expected.temperature == 2.0
    assert found.loss_mask.tolist() == [True] * 5 + [False] * 3
    for name in ("ids", "logprobs", "exact_counts", "residual_logprob", "entropy"):
        assert torch.equal(getattr(found, name)[:6], getattr(expected, name)), name
    # Some token is in two of the samples: then it is one entry, with twice the weight.
    assert found.valid.sum() < len(targets.ids)
    for ids, valid in zip(found.ids.tolist(), found.valid.tolist(), strict=True):
        there = [i for i, filled in zip(ids, valid, strict=True) if filled]
        assert len(there) == len(set(there))


# ---- what the other policies see


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", [tail for tail in TAIL_POLICIES if tail != "sampled"])
def test_what_is_not_linear_in_the_teacher_ignores_sampled_entries(kind: str, tail: str, temperature: float) -> None:
    targets, z = random_targets(N, V, K), random_logits()
    if tail == "realized":
        targets = replace(targets, temperature=temperature)
    without = replace(
        targets,
        ids=targets.ids[:, :K],
        logprobs=targets.exact.logprobs[:, :K],
        exact_counts=None,
        entropy=targets.entropy,
    )
    is_label = (targets.ids == targets.labels[:, None]) & targets.valid
    assert (is_label & ~targets.exact.valid).any()  # a label that is a sampled entry is no entry to these
    options = {"tail": tail, "temperature": temperature, "kd_weight": 0.7}
    for a, b in zip(*(loss_and_gradient(kind, z, t, **options) for t in (targets, without)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    if temperature == 1.0:
        sampled = loss_and_gradient(kind, z, targets, **{**options, "tail": "sampled"})[0]
        assert abs(sampled - loss_and_gradient(kind, z, targets, **options)[0]) > 0.1


@pytest.mark.parametrize("kind", ["fused", "general"])
@pytest.mark.parametrize("tail", TAIL_POLICIES)
def test_agreement_is_with_the_likeliest_exact_entry(kind: str, tail: str) -> None:
    """A sampled weight is no probability: at τ = .3 it is larger than that of the likeliest token."""
    targets = SparseTargetBatch(
        ids=torch.tensor([[0, 1, 2]] * 3),
        logprobs=torch.tensor([[0.25, 0.2, 0.3]] * 3).log(),
        exact_counts=torch.tensor([2, 2, 2]),
        residual_logprob=torch.tensor([0.55] * 3).log(),
        entropy=torch.ones(3),
        labels=torch.zeros(3, dtype=torch.int64),
    )
    z = 5 * torch.eye(3, 5)  # the student's choice is 0, 1, 2
    for i, expected in enumerate([1.0, 0.0, 0.0]):
        assert head_output(kind, z[i : i + 1], targets[i : i + 1], tail=tail).agreement == expected


@pytest.mark.parametrize("kind", ["fused", "general"])
def test_agreement_without_exact_entries_is_with_the_token_drawn_most_often(kind: str) -> None:
    targets = SparseTargetBatch(
        ids=torch.tensor([[1, 3, 4]] * 3),
        logprobs=torch.tensor([[2.0, 3.0, 0.0]] * 3).div(5).log(),
        exact_counts=torch.zeros(3, dtype=torch.int64),
        residual_logprob=torch.zeros(3),
        entropy=torch.ones(3),
        labels=torch.zeros(3, dtype=torch.int64),
    )
    z = 5 * torch.eye(6)[[1, 3, 4]]
    found = [head_output(kind, z[i : i + 1], targets[i : i + 1], tail="sampled").agreement.item() for i in range(3)]
    assert found == [0.0, 1.0, 0.0]


# ---- temperature


def functions(targets: SparseTargetBatch) -> list[Callable[..., Any]]:
    """Every public way to a loss."""
    z = random_logits()
    eye = torch.eye(V, dtype=torch.float64)
    return [
        lambda **options: sparse_kl(z, targets, **options),
        lambda **options: fused_head_loss(z, eye, None, targets, **options),
        lambda **options: fused_sums(z, eye, None, targets, **options),
        lambda **options: general_sums(z, lambda h: h, targets, **options),
    ]


@pytest.mark.parametrize("tail", TAIL_POLICIES)
@pytest.mark.parametrize("captured", [1.0, 2.0])
def test_a_temperature_that_the_targets_cannot_serve_is_refused(tail: str, captured: float) -> None:
    targets = replace(random_targets(N, V, K), temperature=captured)
    for temperature in (0.5, 1.0, 2.0, 4.0):
        serves = temperature == captured or (captured == 1.0 and tail not in UNBIASED)
        for loss in functions(targets):
            if serves:
                loss(tail=tail, temperature=temperature)
                continue
            with pytest.raises(ValueError, match=f"`temperature` {temperature}: .* captured at temperature {captured}"):
                loss(tail=tail, temperature=temperature)


def test_the_reason_is_the_sample_or_the_truncation() -> None:
    for captured, tail, reason in (
        (1.0, "sampled", "a sample cannot be converted"),
        (1.0, "realized", "a sample cannot be converted"),
        (2.0, "bucket", "truncated targets cannot be converted"),
    ):
        with pytest.raises(ValueError, match=rf"{reason} to another one. Use `temperature={captured}`"):
            sparse_kl(
                random_logits(), replace(random_targets(N, V, K), temperature=captured), tail=tail, temperature=3.0
            )


@every_kind
@pytest.mark.parametrize("tail", TAIL_POLICIES)
def test_targets_captured_at_two_and_used_at_two_are_the_tempered_divergence(kind: str, tail: str) -> None:
    """T²·KL(softmax(teacher/2) ‖ softmax(student/2)), from the logits of both; once with K = V, once sampled."""
    vocab, temperature = 60, 2.0
    logits, z = 2 * teacher(vocab).expand(N, vocab), random_logits(N, vocab)
    p, q = ((x.double() / temperature).log_softmax(1) for x in (logits, z))
    expected = temperature**2 * F.kl_div(q, p, log_target=True, reduction="sum")
    whole = threshold(1.0, head=vocab, temperature=temperature)
    labels = torch.arange(N)
    targets = sparse(sparse_targets(logits, whole, numbers(whole, N)))
    assert (targets.exact_counts == vocab).all()
    batch = SparseTargetBatch.from_sparse(targets, labels=labels, temperature=temperature)
    options = {"tail": tail, "temperature": temperature}
    found, gradient = loss_and_gradient(kind, z, batch, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, temperature * (q.exp() - p.exp()), rtol=1e-4, atol=1e-6)
    if kind == "reference":
        options |= {"labels": labels, "reduction": "sum"}
        straight = sparse_kl(z, targets, capture_temperature=temperature, **options)
        torch.testing.assert_close(straight, found, rtol=0, atol=0)
        with (
            pytest.raises(ValueError, match="captured at temperature 1.0")
            if tail in UNBIASED
            else pytest.raises(AssertionError)
        ):
            torch.testing.assert_close(sparse_kl(z, targets, **options), expected, rtol=1e-3, atol=0)


# ---- the batch itself


def test_slices_and_masks_keep_everything() -> None:
    targets = replace(random_targets(N, V, K), temperature=3.0)
    for index in (slice(4, 9), torch.tensor([5, 0, 11]), targets.loss_mask):
        part = targets[index]
        assert part.temperature == 3.0 and len(part) == len(targets.labels[index])
        for name in ("ids", "logprobs", "exact_counts", "residual_logprob", "entropy", "labels"):
            assert torch.equal(getattr(part, name), getattr(targets, name)[index])
    moved = targets.to(dtype=torch.bfloat16)
    assert moved.temperature == 3.0 and moved.entropy.dtype == torch.bfloat16
    assert torch.equal(moved.exact_counts, targets.exact_counts)
    assert targets.exact.exact.temperature == 3.0
    assert torch.equal(targets.exact.logprobs, targets.exact.exact.logprobs)


def test_a_batch_of_exact_entries_needs_no_entropy_but_for_an_estimate() -> None:
    """Then the value is not a number, and says so; the gradient, in which it has no part, is."""
    targets, z = random_targets(N, V, K, sampled=0), random_logits()
    bare = SparseTargetBatch(
        ids=targets.ids,
        logprobs=targets.logprobs,
        residual_logprob=targets.residual_logprob,
        labels=targets.labels,
    )
    for tail in TAIL_POLICIES:
        for kind in ("reference", "fused"):
            found, expected = (loss_and_gradient(kind, z, t, tail=tail) for t in (bare, targets))
            torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-15)
            assert found[0].isnan() if tail in UNBIASED else found[0] == expected[0]
    assert (bare.exact_counts == bare.ids.shape[1]).all()
    nothing = replace(bare, labels=torch.full((N,), IGNORE_INDEX))
    assert sparse_kl(z, nothing, tail="sampled") == 0.0
