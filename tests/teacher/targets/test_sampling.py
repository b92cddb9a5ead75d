"""Samples of the teacher's tail stand for all of it: unbiased, with the variance that theory says.

Three kinds of evidence:

    draw by draw     every draw is the token that an fp64 cumulative sum over the vocabulary gives
    by enumeration   a fine grid of starts gives every token, and every stretch of tokens, its probability
    by chance        over many places of the corpus, means of the loss and its gradient come near those of the full
                     distribution, as fast as 1/√n: Bernstein's bound with the exact variance

Shapes: n positions, V vocabulary, M samples, F functions of a token.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.losses import SparseTargetBatch, fused_head_loss, sparse_kl
from pipeline.teacher.targets.philox import uniforms
from pipeline.teacher.targets.rules import MAX_DRAWS, TargetRule
from pipeline.teacher.targets.selection import sparse_targets
from pipeline.teacher.targets.softmax import BLOCK
from sampled import (
    BELOW_ONE,
    ROUNDING,
    bernstein,
    check_draws,
    entries,
    mean_weights,
    moments,
    numbers,
    outside,
    random,
    rule_name,
    sampled_by_position,
    sparse,
    teacher,
    threshold,
)

# ---- draw by draw


@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("vocab, tau, head", [(50, 0.05, 1), (70, 0.3, 0), (1000, 0.013, 5), (49_152, 0.05, 1)])
def test_systematic_samples_are_those_of_a_cumulative_sum(vocab: int, tau: float, head: int, samples: int) -> None:
    """One sample has its points at (u + j)·τ; M start 1/M apart, and together they are one of τ/M, starting at M·u."""
    n = 24
    rule, logits = threshold(tau, head=head, samples=samples), teacher(vocab)
    start = numbers(rule, n)
    found = sparse_targets(logits.expand(n, vocab), rule, start)
    p = outside(logits, found)
    sure = []
    for i in range(samples):
        for ids, u in zip(sampled_by_position(found, i), start[:, 0].numpy(), strict=True):
            points = ((u + i / samples) % 1.0 + np.arange(math.ceil(p.sum() / tau) + 1)) * tau
            sure.append(check_draws(ids, p, points))
    for ids, u in zip(sampled_by_position(found), start[:, 0].numpy(), strict=True):
        points = (u * samples % 1.0 + np.arange(math.ceil(samples * p.sum() / tau) + 1)) * tau / samples
        sure.append(check_draws(ids, p, points))
    assert np.mean(sure) > 0.85


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("vocab, draws", [(2, 1), (50, 50), (1001, 12), (49_152, 50)])
def test_random_draws_are_those_of_a_cumulative_sum(vocab: int, draws: int, samples: int) -> None:
    n = 24
    rule, logits = random(draws, samples=samples), teacher(vocab)
    drawn = numbers(rule, n)
    found = sparse_targets(logits.expand(n, vocab), rule, drawn)
    p = logits.double().softmax(0).numpy()
    e = entries(found)
    sure = []
    for t in range(n):
        for i in range(samples):
            here = (e.position == t) & (e.sample == i)
            counts = np.rint(e.weights[here] * draws * samples).astype(int)
            points = np.sort(drawn[t, i * draws : (i + 1) * draws].numpy())
            sure.append(check_draws(np.repeat(e.ids[here], counts), p, points))
    assert np.mean(sure) > 0.85


@pytest.mark.parametrize("last_block", ["full", "ragged"])
@pytest.mark.parametrize(
    "rule", [random(40), random(7, samples=3), threshold(0.05), threshold(0.01, samples=2)], ids=rule_name
)
def test_the_largest_and_smallest_random_numbers_find_tokens_with_mass(rule: TargetRule, last_block: str) -> None:
    """Whatever sums round to: neither the first nor the last tokens have mass, and the numbers are next to 0 or 1."""
    vocab = 20 * BLOCK if last_block == "full" else 20 * BLOCK - 5
    first, last = 2 * BLOCK + 3, 15 * BLOCK + 6
    logits = 3 * torch.randn(400, vocab, generator=torch.Generator().manual_seed(0))
    logits[:, :first] = logits[:, last + 1 :] = -300.0
    for value in (0.0, 2.0**-53, BELOW_ONE - 2.0**-53, BELOW_ONE):
        found = sparse_targets(logits, rule, torch.full((400, rule.uniforms), value, dtype=torch.float64))
        ids = entries(found).ids
        assert first <= ids.min() and ids.max() <= last


def test_a_token_next_to_the_threshold_is_drawn_once() -> None:
    """Its p is below τ, and by the rounding of Σp above the distance of two points; one of them is at its start."""
    n, tau = 4000, 0.05
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, 200, generator=generator)
    logits[:, 0] = logits[:, 1:].logsumexp(1) + math.log(tau / (1 - tau))
    logits[:, 0] += 6e-7 * (torch.rand(n, generator=generator) - 0.5)
    rule = threshold(tau, head=0)
    found = sparse_targets(logits, rule, torch.zeros(n, 1, dtype=torch.float64))
    e = entries(found)
    assert 0.2 < (found.exact_counts == 0).float().mean() < 0.8  # as many on either side of τ
    assert np.bincount(e.position[e.ids == 0], minlength=n).tolist() == [1] * n


# ---- by enumeration


@pytest.mark.long
@pytest.mark.parametrize("head", [0, 1, 5])
@pytest.mark.parametrize("tau", [1.0, 1 / 3, 0.3, 0.05, 0.007])
@pytest.mark.parametrize("vocab", [7, BLOCK, BLOCK + 1, 100, 640])
def test_a_grid_of_starts_gives_every_token_its_probability(vocab: int, tau: float, head: int) -> None:
    for shape in ("softmax", "zipf"):
        check_grid(teacher(vocab, shape=shape), threshold(tau, head=head), 600)


@pytest.mark.parametrize(
    "vocab, tau, n", [(49_152, 0.05, 48), (49_152, 0.003, 24), (128_257, 0.05, 24), (262_144, 0.02, 16)]
)
def test_a_grid_of_starts_over_a_large_vocabulary(vocab: int, tau: float, n: int) -> None:
    check_grid(teacher(vocab), threshold(tau), n)
    check_grid(teacher(vocab, shape="zipf"), threshold(tau, head=0), n)


def check_grid(logits: Tensor, rule: TargetRule, n: int) -> None:
    """With starts (k + ½)/n the points are a grid of τ/n: n·p/τ of them, rounded up or down, on a stretch of length p.

    That holds for single tokens, and for all the tokens before any one of them, so that errors cannot add up either.
    """
    tau, vocab = rule.tail_threshold, len(logits)
    starts = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    found = sparse_targets(logits.expand(n, vocab), rule, starts[:, None])
    p, mean = outside(logits, found), mean_weights(found, vocab)
    assert np.abs(mean - p).max() <= tau / n + ROUNDING
    assert np.abs((mean - p).cumsum()).max() <= tau / n + ROUNDING
    # Exactly as many entries as points, over all starts.
    assert abs(found.sample_counts.sum().item() - n * p.sum() / tau) <= 1 + n * ROUNDING / tau


@pytest.mark.parametrize("samples", [2, 3, 8])
def test_each_of_several_samples_is_unbiased_alone(samples: int) -> None:
    n, vocab, tau = 600, 200, 0.06
    logits, rule = teacher(vocab), threshold(tau, samples=samples)
    starts = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    found = sparse_targets(logits.expand(n, vocab), rule, starts[:, None])
    p, e = outside(logits, found), entries(found)
    for i in range(samples):
        here = e.sample == i
        mean = samples * np.bincount(e.ids[here], e.weights[here], minlength=vocab) / n
        assert np.abs((mean - p).cumsum()).max() <= tau / n + ROUNDING


# ---- by chance


def bounds(rule: TargetRule, p: np.ndarray, functions: np.ndarray, n: int) -> np.ndarray:
    """[F] of the means of Σ w·f over n positions, for every f of [F, V]."""
    variance, largest, numbers = np.array([moments(rule, p, f) for f in functions]).T
    return bernstein(variance, largest, n * numbers) + ROUNDING * np.abs(functions).max(axis=1)


SAMPLING = [
    *(threshold(tau, head=head) for tau in (0.3, 0.05, 0.01) for head in (0, 1, 5)),
    threshold(0.05, samples=4),
    random(1),
    random(12),
    random(50),
    random(12, samples=3),
]


@pytest.mark.long
@pytest.mark.parametrize("fused", [False, True], ids=["sparse_kl", "fused"])
@pytest.mark.parametrize("rule", SAMPLING, ids=rule_name)
def test_loss_and_gradient_converge_to_those_of_the_full_distribution(rule: TargetRule, fused: bool) -> None:
    vocab, width, most = 60, 3, 4096
    logits = teacher(vocab)
    found = sparse_targets(logits.expand(most, vocab), rule, numbers(rule, most))
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    hidden = torch.randn(width, generator=generator, dtype=torch.float64)
    z = weight @ hidden

    p = logits.double().softmax(0)
    q = z.softmax(0)
    full_loss = float((p * (p.log() - q.log())).sum())
    full_gradient = (q - p).numpy()  # with respect to z
    tail = outside(logits, found)
    targets = SparseTargetBatch.from_sparse(sparse(found)).to(dtype=torch.float64)
    # What the means are of: the logits for the loss, every token for the gradient, directions for that of the states.
    functions = np.concatenate([z.numpy()[None], np.eye(vocab), weight.T.numpy()])
    previous = math.inf
    for n in (64, 512, most):
        allowed = bounds(rule, tail, functions, n)
        leaves = [x.clone().requires_grad_() for x in ((hidden, weight) if fused else (z,))]
        if fused:
            loss = fused_head_loss(leaves[0].expand(n, width), leaves[1], None, targets[:n], tail="sampled")
        else:
            loss = sparse_kl(leaves[0].expand(n, vocab), targets[:n], tail="sampled")
        gradient = [x.numpy() for x in torch.autograd.grad(loss, leaves)]
        assert abs(loss.item() - full_loss) <= allowed[0]
        of_token, of_state = allowed[1 : 1 + vocab], allowed[1 + vocab :]
        if fused:
            error = np.abs(gradient[1] - full_gradient[:, None] * hidden.numpy())
            assert (error <= of_token[:, None] * hidden.abs().numpy()).all()
            assert (np.abs(gradient[0] - full_gradient @ weight.numpy()) <= of_state).all()
        else:
            assert (np.abs(gradient[0] - full_gradient) <= of_token).all()
        assert allowed[0] < previous / 2.8  # eight times as many: √8 times as near
        previous = allowed[0]
    assert (of_token < tail / 2).any()  # near enough to miss a token that is never drawn


@pytest.mark.parametrize(
    "vocab, rule, n",
    [
        (5_000, threshold(0.05), 2048),
        (5_000, threshold(0.01, head=0), 1024),
        (5_000, random(50), 1024),
        (49_152, threshold(0.05), 512),
        (49_152, random(50), 512),
        (262_144, threshold(0.05), 192),
        (262_144, random(12), 192),
    ],
    ids=lambda x: str(x) if isinstance(x, int) else rule_name(x),
)
def test_means_over_a_large_vocabulary_converge(vocab: int, rule: TargetRule, n: int) -> None:
    """Of the student's logits, a random sign per token, the first half, one block and the likeliest token."""
    logits, chunk = teacher(vocab), 4_194_304 // vocab
    scratch = torch.empty(chunk, vocab)
    drawn = numbers(rule, n, row=7)
    total = np.zeros(vocab)
    for start in range(0, n, chunk):
        part = drawn[start : start + chunk]
        found = sparse_targets(logits.expand(len(part), vocab), rule, part, scratch)
        total += mean_weights(found, vocab) * len(part)
    p = outside(logits, found)
    rng = np.random.default_rng(0)
    place = np.arange(vocab)
    functions = [
        0.5 * logits.numpy() + rng.standard_normal(vocab),
        rng.choice([-1.0, 1.0], vocab),
        (place < vocab // 2).astype(float),
        (place // BLOCK == p.argmax() // BLOCK).astype(float),
        (place == p.argmax()).astype(float),
    ]
    for f in functions:
        assert abs(f @ total / n - p @ f) <= bounds(rule, p, f[None], n)[0]


@pytest.mark.parametrize("shape", ["softmax", "zipf"])
@pytest.mark.parametrize("tau", [0.2, 0.05, 0.02])
def test_threshold_varies_less_than_random_with_as_many_entries(tau: float, shape: str) -> None:
    """Each is what theory says: Σ p(τ − p) over what is sampled, and Σ p(1 − p)/N.

    Compared at the real N of as many different tokens, since no whole number of draws gives exactly as many.
    """
    vocab, n = 1000, 1500
    logits = teacher(vocab, shape=shape)
    p = logits.double().softmax(0).numpy()

    def error_and_entries(rule: TargetRule) -> tuple[float, float]:
        found = sparse_targets(logits.expand(n, vocab), rule, numbers(rule, n))
        e = entries(found)
        dense = np.zeros((n, vocab))
        np.add.at(dense, (e.position, e.ids), e.weights)
        return ((dense - p) ** 2).sum(axis=1).mean(), len(e.ids) / n

    def tokens_in(draws: float) -> float:
        return (1 - (1 - p) ** draws).sum()

    def random_error(draws: float) -> float:
        return (p * (1 - p)).sum() / draws

    error, size = error_and_entries(threshold(tau))
    tail = np.where(p < min(tau, p.max()), p, 0.0)
    assert error == pytest.approx((tail * (tau - tail)).sum(), rel=0.05)

    more = next(draws for draws in range(1, MAX_DRAWS) if tokens_in(draws) >= size)
    for draws in (more - 1, more):
        assert error_and_entries(random(draws)) == pytest.approx((random_error(draws), tokens_in(draws)), rel=0.05)
    share = (size - tokens_in(more - 1)) / (tokens_in(more) - tokens_in(more - 1))
    ratio = error / random_error(more - 1 + share)
    assert ratio < (0.97 if tau == 0.2 else 0.8)


# ---- what makes a sample


@pytest.mark.parametrize("rule", [threshold(0.05, seed=3), random(20, seed=3)], ids=rule_name)
def test_seed_row_and_position_make_the_sample(rule: TargetRule) -> None:
    logits = teacher(500).expand(4, 500)
    seeds, rows, positions = [3, 4, 3, 3], [1, 1, 2, 1], [6, 6, 6, 7]
    drawn = [
        uniforms(s, np.array([r]), np.array([p]), rule.uniforms) for s, r, p in zip(seeds, rows, positions, strict=True)
    ]
    found = sparse_targets(logits, rule, torch.from_numpy(np.concatenate(drawn)))
    samples = [ids.tolist() for ids in sampled_by_position(found)]
    assert all(samples[0] != other for other in samples[1:])


def test_more_samples_leave_the_first_as_it_is() -> None:
    logits = teacher(500).expand(9, 500)
    for one, many in ((threshold(0.05), threshold(0.05, samples=4)), (random(20), random(20, samples=4))):
        found = [sparse_targets(logits, rule, numbers(rule, 9)) for rule in (one, many)]
        firsts = [sampled_by_position(each, 0) for each in found]
        assert all(np.array_equal(a, b) for a, b in zip(*firsts, strict=True))
        others = sampled_by_position(found[1], 1)
        assert any(not np.array_equal(a, b) for a, b in zip(firsts[1], others, strict=True))
