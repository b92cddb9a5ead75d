"""Targets by any rule on any distribution: of the rule's kind, valid in a cache, and a function of the row alone.

How good a stand-in samples are is in test_sampling.py; top-K to the last digit in test_targets.py.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import cache_format as cf
from pipeline.teacher.targets.philox import uniforms
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import ChunkTargets, sparse_targets
from sampled import BELOW_ONE, entries, numbers, random, rule_name, sparse, teacher, threshold


def check_valid(logits: Tensor, rule: TargetRule, found: ChunkTargets) -> None:
    """Everything that `ChunkTargets` and the rule state, against fp64 probabilities."""
    n, vocab = logits.shape
    samples = rule.samples if rule.sampled else 0
    assert [x.dtype for x in found] == [torch.int32, torch.float32, torch.int32, torch.int32] + 2 * [torch.float32]
    assert found.ids.shape == found.logprobs.shape and found.sample_counts.shape == (n, samples)
    exact = (logits.double() / rule.temperature).log_softmax(1).numpy()
    p = np.exp(exact)
    e = entries(found)
    assert (e.ids < vocab).all() and (found.ids >= -1).all()
    assert (e.logprobs <= 0).all() and np.isfinite(e.logprobs).all()
    assert ((found.ids >= 0).sum(dim=1) <= rule.most_entries).all() and ((found.ids >= 0).sum(dim=1) > 0).all()

    # Ids ascend within the exact entries and within each sample; none is in both.
    same = (e.position[1:] == e.position[:-1]) & (e.sample[1:] == e.sample[:-1])
    assert (e.ids[1:] > e.ids[:-1])[same].all()
    head = np.zeros((n, vocab), bool)
    head[e.position[e.sample < 0], e.ids[e.sample < 0]] = True
    assert not head[e.position, e.ids][e.sample >= 0].any()
    assert np.array_equal(head.sum(axis=1), found.exact_counts.numpy())

    is_exact = e.sample < 0
    expected = exact[e.position, e.ids][is_exact]
    finite = logits[logits > -1e30]
    rounding = 3e-6 + 2e-7 * float(finite.abs().max()) / rule.temperature  # of z − lse in fp32
    assert np.allclose(e.logprobs[is_exact], np.minimum(expected, 0), rtol=3e-6, atol=rounding)
    assert (exact[e.position, e.ids][~is_exact] > -104).all()  # not a token of no mass: fp32 ends at e^-104
    residual = np.where(head, 0.0, p).sum(axis=1)
    assert np.allclose(np.exp(found.residual_logprob.double().numpy()), residual, rtol=1e-5, atol=1e-40)
    entropy = -(p * np.where(p > 0, exact, 0.0)).sum(axis=1)
    assert np.allclose(found.entropy.numpy(), entropy, rtol=1e-5, atol=5 * rounding)
    assert not any(torch.isnan(x).any() for x in (found.logprobs, found.residual_logprob, found.entropy))

    outside_most = np.where(head, -np.inf, exact).max(axis=1)
    head_least = np.where(head, exact, np.inf).min(axis=1)
    sizes = head.sum(axis=1)
    if rule.kind == "top-k":
        assert (sizes == min(rule.top_k, vocab)).all() and (head_least >= outside_most - 1e-5).all()
    elif rule.kind == "top-p":
        check_top_p(p, head, rule)
    elif rule.kind == "threshold":
        tau = rule.tail_threshold
        assert (head_least >= outside_most - 1e-5).all()
        assert (sizes >= min(rule.top_k, vocab)).all()
        assert (np.exp(outside_most) < tau * (1 + 1e-5)).all()  # all of τ and more are in the head,
        beyond = sizes > min(rule.top_k, vocab)
        assert (np.exp(head_least[beyond]) > tau * (1 - 1e-5)).all()  # and beyond K none of less
        points = residual / tau
        slack = 1e-5 * (1 + points)
        for counts in found.sample_counts.T.numpy():
            assert (counts >= np.floor(points - slack)).all() and (counts <= np.ceil(points + slack)).all()
    else:
        assert not head.any()
        for i in range(samples):
            weights = np.bincount(e.position[e.sample == i], e.weights[e.sample == i], minlength=n)
            assert np.allclose(weights * samples, 1.0, rtol=1e-6)

    drawn = e.logprobs[~is_exact]
    stored = rule.codebook().decode(rule.codebook().encode(drawn))
    assert np.allclose(stored, drawn, rtol=0, atol=1e-6)
    if rule.kind == "threshold":
        assert (drawn == np.float32(math.log(rule.tail_threshold / samples))).all()
    elif rule.kind == "random":
        counts = np.exp(stored.astype(float)) * rule.draws * samples
        assert np.allclose(counts, np.rint(counts), rtol=1e-6) and (np.rint(counts) >= 1).all()


def check_top_p(p: np.ndarray, head: np.ndarray, rule: TargetRule) -> None:
    sizes, kept = head.sum(axis=1), np.where(head, p, 0.0).sum(axis=1)
    least = np.where(head, p, np.inf).min(axis=1)
    assert (least >= np.where(head, 0.0, p).max(axis=1) * (1 - 1e-5)).all(), "not the most likely"
    assert ((kept >= rule.top_p - 1e-6) | (sizes == min(rule.max_entries, p.shape[1]))).all(), "too little mass"
    assert (kept - least < rule.top_p + 1e-6).all(), "one entry too many"


def check_stored(rule: TargetRule, vocab: int, *targets: ChunkTargets) -> None:
    """Through a cache and back, each as a row: the writer takes them; of sampled entries nothing is lost, of exact ones
    what the codebook states."""
    rows = []
    for found in targets:
        plain, n = sparse(found), len(found.ids)
        # Of n + 1 tokens, of which the last predicts nothing.
        more = {name: np.append(x, np.zeros((1, *x.shape[1:]), x.dtype), 0) for name, x in per_position(plain)}
        row = cf.CacheRow(
            row=len(rows),
            input_ids=np.zeros(n + 1, np.int64),
            loss_mask=np.arange(n + 1) < n,
            segment_lengths=np.array([n + 1]),
            targets=replace(plain, **more),
        )
        rows.append(row)
    codebook = rule.codebook()
    metadata = cf.CacheMetadata(
        teacher={"name": "none"},
        tokenizer={},
        vocab_size=vocab,
        alignment="next",
        targets=rule.to_json(),
        corpus={"rows": len(rows)},
        codebooks={**cf.default_codebooks(vocab), "target_logprobs": codebook},
    )
    with tempfile.TemporaryDirectory() as folder:
        with cf.CacheWriter(folder, metadata) as writer:
            writer.write(rows)
        read = [row.targets for row in cf.open_cache(folder).iter_rows()]
    for found, row, back in zip(targets, rows, read, strict=True):
        for name, values in per_position(row.targets):
            if values.dtype != np.float32:
                assert np.array_equal(getattr(back, name), values), name
        e = entries(found)
        drawn, exact = e.sample >= 0, e.sample < 0
        assert np.array_equal(back.ids, e.ids)
        assert np.allclose(back.logprobs[drawn], e.logprobs[drawn], rtol=0, atol=1e-6)
        roots = [np.exp(x[exact] / 2) for x in (back.logprobs, e.logprobs)]
        assert np.abs(roots[0] - roots[1]).max(initial=0) <= codebook.max_error + 1e-6


def per_position(targets: cf.SparseTargets) -> Iterator[tuple[str, np.ndarray]]:
    for name in ("counts", "exact_counts", "residual_logprob", "entropy", "sample_counts"):
        if getattr(targets, name) is not None:
            yield name, getattr(targets, name)


def hard_logits() -> Iterator[tuple[str, Tensor]]:
    """Distributions of which something is degenerate, [V]."""
    for vocab, place in ((100, 0), (100, 99), (64, 63), (1000, 500)):
        one_hot = torch.zeros(vocab)
        one_hot[place] = 200.0
        yield f"one-hot {place} of {vocab}", one_hot
    for vocab in (1, 2, 5, 20, 32, 33, 1000):
        yield f"uniform {vocab}", torch.full((vocab,), -3.0)
    yield "ties", torch.arange(200.0) % 3
    two = torch.full((300,), -150.0)
    two[[31, 299]] = 5.0
    yield "two tokens with mass", two
    # What is left of p beside the head: below the range of fp16 (6e-8), of fp32 (1e-45), and at its edge.
    for gap in (17.0, 30.0, 80.0, 88.0, 100.0, 103.0, 110.0):
        tail = torch.zeros(700)
        tail[3] = gap
        yield f"a tail of {gap}", tail
    yield "next to the lowest fp32", torch.tensor([0.0, 1.0, -5e37, -1e30] * 20)
    yield "nearly two halves", torch.tensor([0.0, 1e-7, -200.0] + [-300.0] * 60)
    yield "powers of two", -torch.arange(60.0) * math.log(2)


RULES = [
    TargetRule(top_k=1),
    TargetRule(top_k=64),
    TargetRule(kind="top-p"),
    TargetRule(kind="top-p", top_p=1.0, max_entries=3),
    *(threshold(tau, head=head) for tau in (1.0, 0.5, 0.05, 0.01) for head in (0, 1, 64)),
    threshold(0.05, samples=5),
    threshold(1.0, head=0, samples=3),
    threshold(0.05, temperature=3.0),
    random(1),
    random(50),
    random(255),
    random(20, samples=4),
    random(50, temperature=0.25),
]


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_degenerate_distributions(rule: TargetRule) -> None:
    drawn = numbers(rule, 6)
    if rule.uniforms:
        drawn[0], drawn[1], drawn[2] = 0.0, BELOW_ONE, 0.5
    targets = {}
    for name, logits in hard_logits():
        targets[name] = sparse_targets(logits.expand(6, -1), rule, drawn)
        try:
            check_valid(logits.expand(6, -1), rule, targets[name])
        except AssertionError as error:
            raise AssertionError(name) from error
    check_stored(rule, 1000, *targets.values())


def test_what_the_degenerate_ones_are() -> None:
    """One-hot: that token and nothing else. Uniform: the 1/τ tokens, or all of them where there are fewer."""
    one_hot = torch.zeros(3, 100)
    one_hot[:, 99] = 200.0
    for rule in (threshold(0.05), threshold(0.05, head=0), threshold(1.0, head=0), threshold(0.01, samples=3)):
        found = sparse_targets(one_hot, rule, numbers(rule, 3))
        assert found.ids.max(dim=1).values.tolist() == [99] * 3 and (found.ids >= 0).sum() == 3
        assert (found.exact_counts == 1).all() and (found.logprobs[found.ids >= 0] == 0).all()
    found = sparse_targets(one_hot, random(50), numbers(random(50), 3))
    assert (found.ids >= 0).sum() == 3 and (found.logprobs[found.ids >= 0] == 0).all()

    rule = threshold(0.05, head=0)
    many = sparse_targets(torch.zeros(3, 1000), rule, numbers(rule, 3))
    assert (many.sample_counts == 20).all() and (many.exact_counts == 0).all()
    few = sparse_targets(torch.zeros(3, 5), rule, numbers(rule, 3))  # p = .2 ≥ τ
    assert (few.sample_counts == 0).all() and (few.exact_counts == 5).all()
    alone = sparse_targets(torch.zeros(3, 1), rule, numbers(rule, 3))
    assert (alone.exact_counts == 1).all() and (alone.residual_logprob == -torch.inf).all()


rules = st.one_of(
    st.builds(lambda k, t: TargetRule(top_k=k, temperature=t), st.integers(1, 70), st.sampled_from([0.5, 1.0, 4.0])),
    st.builds(
        lambda p, k, t: TargetRule(kind="top-p", top_p=p, max_entries=k, temperature=t),
        st.floats(1e-3, 1.0),
        st.integers(1, 70),
        st.sampled_from([0.5, 1.0, 4.0]),
    ),
    st.builds(
        lambda tau, k, m, seed, t: threshold(tau, head=k, samples=m, seed=seed, temperature=t),
        st.floats(5e-3, 1.0),
        st.integers(0, 40),
        st.integers(1, 5),
        st.integers(0, 2**64 - 1),
        st.sampled_from([0.5, 1.0, 4.0]),
    ),
    st.builds(
        lambda n, m, seed, t: random(n, samples=m, seed=seed, temperature=t),
        st.integers(1, 80),
        st.integers(1, 5),
        st.integers(0, 2**64 - 1),
        st.sampled_from([0.5, 1.0, 4.0]),
    ),
)


@given(
    rule=rules,
    vocab=st.integers(1, 700),
    scale=st.sampled_from([0.0, 0.3, 3.0, 30.0, 300.0]),
    grid=st.sampled_from([0, 1, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
@example(rule=threshold(0.998), vocab=40, scale=300.0, grid=0, dtype=torch.float32, seed=0)
def test_any_rule_on_any_logits(
    rule: TargetRule, vocab: int, scale: float, grid: int, dtype: torch.dtype, seed: int
) -> None:
    """grid: few different logits, so that nearly everything is tied."""
    logits = scale * torch.randn(4, vocab, generator=torch.Generator().manual_seed(seed))
    if grid:
        logits = (logits * grid / max(scale, 1.0)).round()
    logits = logits.to(dtype)
    found = sparse_targets(logits, rule, numbers(rule, 4, row=seed))
    check_valid(logits.float(), rule, found)
    if vocab > 1:
        check_stored(rule, vocab, found)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_a_logit_that_is_not_a_number_shows_in_the_entropy_of_its_row(rule: TargetRule, value: float) -> None:
    logits = 3 * torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    drawn = numbers(rule, 3)
    clean = sparse_targets(logits, rule, drawn)
    for place in (0, 50, 499):
        broken = logits.clone()
        broken[1, place] = value
        found = sparse_targets(broken, rule, drawn)
        assert found.entropy.isfinite().tolist() == [True, False, True]
        for a, b in zip(found, clean, strict=True):
            assert torch.equal(a[[0, 2]], b[[0, 2]])


# ---- the same, however it is computed


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_a_position_does_not_depend_on_its_chunk(rule: TargetRule) -> None:
    """To the last bit, from any chunking, order and subset: a cache does not depend on batch size and resuming."""
    for vocab in (100, 4999):
        logits = 3 * torch.randn(23, vocab, generator=torch.Generator().manual_seed(0))
        rows, positions = np.arange(23) // 5, np.arange(23) % 5
        order = torch.randperm(23, generator=torch.Generator().manual_seed(1))

        def targets(here: Tensor, scratch: Tensor | None = None) -> ChunkTargets:
            place = here.numpy()
            drawn = uniforms(rule.seed or 0, rows[place], positions[place], rule.uniforms)  # noqa: B023
            return sparse_targets(logits[here], rule, torch.from_numpy(drawn), scratch)  # noqa: B023

        whole = targets(torch.arange(23))
        for here in (*torch.arange(23).split(7), order, order[:9], torch.tensor([11])):
            scratch = torch.full((30, vocab), torch.nan)
            for a, b in zip(targets(here, scratch), whole, strict=True):
                assert torch.equal(a, b[here])


def test_uniform_numbers_of_another_shape_are_refused() -> None:
    logits = teacher(50).expand(4, 50)
    for rule, drawn in (
        (threshold(0.05), None),
        (threshold(0.05), torch.zeros(4, 2)),
        (random(5), torch.zeros(4, 1)),
        (random(5), torch.zeros(3, 5)),
    ):
        with pytest.raises(ValueError, match=r"expected \[n, "):
            sparse_targets(logits, rule, drawn)


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_no_positions(rule: TargetRule) -> None:
    found = sparse_targets(torch.zeros(0, 1000), rule, numbers(rule, 0))
    assert found.ids.shape == found.logprobs.shape and len(found.ids) == len(found.entropy) == 0
    some = sparse_targets(torch.zeros(2, 1000), rule, numbers(rule, 2))
    assert [x.shape[1:] for x in found] == [x.shape[1:] for x in some]


# ---- temperature and top-p


@pytest.mark.parametrize("make", [TargetRule, threshold, random], ids=["top-k", "threshold", "random"])
def test_a_temperature_is_that_of_the_softmax(make: Callable[..., TargetRule]) -> None:
    """Targets at T are those of logits/T, to the last bit; at T = 2 the exact entries are those of an fp64 softmax."""
    value = {TargetRule: {"top_k": 9}, threshold: {"tau": 0.05}, random: {"draws": 30}}[make]
    logits = 3 * torch.randn(5, 700, generator=torch.Generator().manual_seed(0))
    for temperature in (0.5, 2.0, 3.7):
        tempered, plain = make(**value, temperature=temperature), make(**value)
        drawn = numbers(plain, 5)
        found = sparse_targets(logits, tempered, drawn)
        for a, b in zip(found, sparse_targets(logits / temperature, plain, drawn), strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(found.entropy, sparse_targets(logits, plain, drawn).entropy)
        check_valid(logits, tempered, found)


def test_top_p_keeps_the_fewest_entries_that_reach_the_mass() -> None:
    logits = -torch.arange(1.0, 61.0)[None] * math.log(2)  # 1/2, 1/4, 1/8, …
    for mass, expected in ((0.01, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.99, 7)):
        found = sparse_targets(logits, TargetRule(kind="top-p", top_p=mass))
        assert entries(found).ids.tolist() == list(range(expected))
        assert found.exact_counts.item() == expected
    capped = sparse_targets(logits, TargetRule(kind="top-p", top_p=0.99, max_entries=4))
    assert entries(capped).ids.tolist() == [0, 1, 2, 3]
    assert capped.residual_logprob.exp().item() == pytest.approx(1 / 16, rel=1e-5)
    # Different positions keep different numbers.
    both = torch.cat([logits, torch.zeros(1, 60)])
    found = sparse_targets(both, TargetRule(kind="top-p", top_p=0.5 + 1e-3, max_entries=50))
    assert found.exact_counts.tolist() == [2, 31]
