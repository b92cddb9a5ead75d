"""Sparse targets of a chunk of logits, against an fp64 log-softmax."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import ChunkTargets, sparse_targets
from pipeline.teacher.targets.softmax import BLOCK, top_k

SIZES = [(1, 1), (2, 1), (31, 31), (33, 1), (97, 97), (100, 7), (640, 5), (1000, 15), (1000, 16), (4999, 64), (5000, 1)]


def random_logits(n: int, vocab: int, *, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed))


def top_k_targets(logits: Tensor, k: int, scratch: Tensor | None = None) -> ChunkTargets:
    """Ids as int64, so that they can be used as indices. Every place is filled, every entry exact, nothing sampled."""
    found = sparse_targets(logits, TargetRule(top_k=k), scratch=scratch)
    assert found.ids.dtype == found.exact_counts.dtype == found.sample_counts.dtype == torch.int32
    assert found.sample_counts.shape == (len(logits), 0)
    assert (found.ids >= 0).all() and (found.exact_counts == found.ids.shape[1]).all()
    return found._replace(ids=found.ids.long())


def check(logits: Tensor, k: int, *, found: ChunkTargets | None = None) -> None:
    """A valid top-k in ascending order, and everything else as fp64 has it."""
    found = found or top_k_targets(logits, k)
    exact = logits.double().log_softmax(1)
    assert found.ids.shape == found.logprobs.shape == (len(logits), min(k, logits.shape[1]))
    assert [x.dtype for x in (found.logprobs, found.residual_logprob, found.entropy)] == 3 * [torch.float32]
    assert (found.ids.diff(dim=1) > 0).all()
    # Of equal logits any may be chosen, so values are compared, not ids.
    chosen = logits.gather(1, found.ids).sort(dim=1).values
    assert torch.equal(chosen, logits.topk(found.ids.shape[1], dim=1).values.sort(dim=1).values)

    torch.testing.assert_close(found.logprobs.double(), exact.gather(1, found.ids), rtol=2e-6, atol=2e-6)
    outside = exact.scatter(1, found.ids, -torch.inf)
    torch.testing.assert_close(found.residual_logprob.double(), outside.logsumexp(1), rtol=2e-6, atol=2e-6)
    p_log_p = torch.where(exact > -torch.inf, exact.exp() * exact, 0.0)
    torch.testing.assert_close(found.entropy.double(), -p_log_p.sum(1), rtol=1e-5, atol=1e-5)
    assert (found.logprobs <= 0).all() and (found.residual_logprob <= 1e-6).all() and (found.entropy >= 0).all()


@pytest.mark.parametrize("vocab, k", SIZES)
def test_against_float64(vocab: int, k: int) -> None:
    check(random_logits(9, vocab), k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_logits(dtype: torch.dtype) -> None:
    """In bfloat16 most of the largest logits are tied."""
    for vocab, k in SIZES:
        check(random_logits(5, vocab).to(dtype), k)


def test_more_entries_than_tokens() -> None:
    check(random_logits(3, 10), 64)
    assert torch.equal(top_k_targets(random_logits(3, 10), 64).ids, torch.arange(10).expand(3, -1))


def test_all_tokens_leave_nothing() -> None:
    assert (top_k_targets(random_logits(3, 10), 10).residual_logprob == -torch.inf).all()


@given(
    seed=st.integers(0, 1000),
    vocab=st.integers(1, 700),
    k=st.integers(1, 12),
    values=st.sampled_from([1, 2, 5, 1000]),
)
def test_ties(seed: int, vocab: int, k: int, values: int) -> None:
    """Few different logits, so that nearly everything is tied, across blocks and into the ragged end."""
    generator = torch.Generator().manual_seed(seed)
    check(torch.randint(values, (3, vocab), generator=generator).float() / 40, k)


@pytest.mark.parametrize("vocab", [BLOCK * 40, BLOCK * 40 + 13])
def test_the_largest_anywhere(vocab: int) -> None:
    """All in one block, spread one to a block, in the first and last places."""
    for places in (
        range(BLOCK, BLOCK + 9),
        range(5, vocab, vocab // 9),
        [0, 1, BLOCK - 1, BLOCK, vocab - 2, vocab - 1],
    ):
        places = list(places)
        logits = random_logits(1, vocab, scale=0.1)
        logits[0, places] += 10 + torch.arange(len(places))
        assert top_k_targets(logits, len(places)).ids[0].tolist() == sorted(places)
        assert sorted(top_k(logits, len(places))[1][0].tolist()) == sorted(places)
        check(logits, len(places))


def test_a_residual_far_below_one_keeps_its_digits() -> None:
    """m = 999·exp(-46 − 6.9): 1 − Σp has no digit of it in fp32, nor in fp64."""
    logits = torch.zeros(2, 1000)
    logits[:, 17] = 53.0
    logits[1, 18] = 52.0
    found = top_k_targets(logits, 2)
    m = 998 * torch.exp(-logits[:, 17].double()) / (1 + torch.exp(logits[:, 18] - logits[:, 17]).double())
    assert (m < 1e-19).all()
    torch.testing.assert_close(found.residual_logprob.double().exp(), m, rtol=1e-5, atol=0)
    # One-hot within fp32: entropy is what the tail has left, not a rounding of lse − Σp·z.
    assert found.entropy[0] < 1e-5 and found.entropy[1] == pytest.approx(0.5822, abs=1e-4)


@pytest.mark.parametrize("offset", [0.0, -3000.0, 3000.0])
def test_uniform_and_shifted(offset: float) -> None:
    """log V + nothing; and a constant added to all logits, up to what fp32 itself loses by it."""
    logits = torch.full((2, 49_152), offset)
    found = top_k_targets(logits, 64)
    log_v = torch.tensor(49_152.0).log()
    torch.testing.assert_close(found.logprobs, -log_v.expand(2, 64), rtol=0, atol=4e-4 if offset else 3e-6)
    torch.testing.assert_close(found.residual_logprob, torch.log1p(torch.tensor([-64 / 49_152] * 2)), rtol=1e-3, atol=0)
    torch.testing.assert_close(found.entropy, log_v.expand(2), rtol=0, atol=4e-4 if offset else 3e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 50, 999])
def test_a_logit_that_is_not_a_number_shows_in_the_entropy_of_its_row(value: float, place: int) -> None:
    logits = random_logits(3, 1000)
    clean = top_k_targets(logits, 4)
    logits[1, place] = value
    found = top_k_targets(logits, 4)
    assert found.entropy.isfinite().tolist() == [True, False, True]
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    logits[1] = value
    assert not top_k_targets(logits, 4).entropy[1].isfinite()


def test_logits_are_left_alone_and_scratch_is_worked_in() -> None:
    logits = random_logits(7, 500)
    before = logits.clone()
    scratch = torch.full((20, 500), torch.nan)
    found = top_k_targets(logits, 9, scratch)
    assert torch.equal(logits, before)
    assert not scratch[:7].isnan().any() and scratch[7:].isnan().all()
    for a, b in zip(found, top_k_targets(logits, 9), strict=True):
        assert torch.equal(a, b)


def test_a_row_does_not_depend_on_its_chunk() -> None:
    """To the last bit: this is what makes a cache independent of batch size and packing."""
    for vocab, k in ((1000, 5), (4999, 64), (100, 7)):
        logits = random_logits(12, vocab)
        whole = top_k_targets(logits, k)
        for rows in (slice(0, 1), slice(3, 8), slice(11, 12)):
            for a, b in zip(top_k_targets(logits[rows], k), whole, strict=True):
                assert torch.equal(a, b[rows])
        for a, b in zip(top_k_targets(logits.flip(0), k), whole, strict=True):
            assert torch.equal(a.flip(0), b)


def test_no_positions() -> None:
    found = top_k_targets(torch.zeros(0, 1000), 5)
    assert found.ids.shape == (0, 5) and found.entropy.shape == (0,)
