"""What a cache makes of unbiased targets: the mean is off by the rounding of exact entries, and by nothing else.

Against fp64 arithmetic that knows only the levels in the manifest: every exact probability takes the nearest level in
its square root, sampled weights are in the codebook. What is left is chance, for which Bernstein's bound allows.

Shapes: n positions, V vocabulary, R rows of a cache, which hold the same positions and differ in what is drawn.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import cache_format as cf
from pages import text
from pipeline.inspection import cache_statistics
from pipeline.losses import SparseTargetBatch, sparse_kl
from pipeline.teacher.targets.cache_rows import cache_row
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import draws, sparse_targets
from pipeline.teacher.text.packing import TokenRow
from sampled import ROUNDING, bernstein, moments, threshold

N, V, R, SEEDS = 120, 100, 48, 4
STATED = {0.05: 0.0165, 0.95: 0.0068}
"""Of `threshold` at τ = 1/20 and 1/8: most that an exact p above so much is off; in docs/measurements.md."""


def distributions() -> torch.Tensor:
    """[N, V] logits: from nearly even ones to one token with all but a thousandth."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(N, V, generator=generator) * torch.linspace(0.5, 4.0, N)[:, None]
    sure = torch.arange(N) % 4 == 0
    logits[sure, 3] = logits[sure].logsumexp(1) + torch.linspace(1.0, 7.0, int(sure.sum()))
    return logits


def write(path: Path, rule: TargetRule, logits: torch.Tensor, encoding: str) -> cf.Cache:
    """R rows of the same N positions."""
    metadata = cf.CacheMetadata(
        teacher={"name": "made up"},
        tokenizer={},
        vocab_size=V,
        alignment="same",  # so that every position can count
        targets=rule.to_json(),
        corpus={"rows": R},
        codebooks={**cf.default_codebooks(V), "target_logprobs": rule.codebook()},
        rows_per_shard=R,
        rows_per_record_batch=R,
        encoding=encoding,
    )
    everywhere = np.ones(N, bool)
    token_row = TokenRow(np.arange(N) % V, everywhere, np.array([N]), labels=np.zeros(N, np.int64))
    with cf.CacheWriter(path, metadata) as writer:
        for row in range(R):
            drawn = draws(rule, np.full(N, row), np.arange(N))
            writer.write([cache_row(row, token_row, everywhere, sparse_targets(logits, rule, drawn))])
    return cf.open_cache(path)


def nearest(p: np.ndarray, cache: cf.Cache) -> np.ndarray:
    """The level of the manifest's codebook that is nearest in √p, fp64."""
    levels = np.exp(np.array([float(v) for v in cache.manifest.raw["codebooks"]["target_logprobs"]["values"]]))
    return levels[np.abs(np.sqrt(p)[..., None] - np.sqrt(levels)).argmin(axis=-1)]


@pytest.mark.long
@pytest.mark.parametrize(
    "rule, encoding",
    [(threshold(0.05), "columns"), (threshold(0.125), "packed"), (threshold(0.05, samples=3), "packed")],
    ids=["1/20", "1/8", "1/20, three samples"],
)
def test_means_through_a_cache_are_off_by_the_rounding_of_exact_entries_alone(
    rule: TargetRule, encoding: str, tmp_path: Path
) -> None:
    """Two comparisons by chance, each wrong with probability 1e-11 (`FALSE_ALARM`), some seven standard deviations."""
    logits = distributions()
    p = logits.double().softmax(1).numpy()
    z = torch.randn(N, V, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    exact = (p >= rule.tail_threshold) | (p == p.max(axis=1, keepdims=True))
    sums, losses = [], []
    for seed in range(SEEDS):
        seeded = threshold(rule.tail_threshold, samples=rule.samples, seed=seed)
        cache = write(tmp_path / f"cache-{seed}", seeded, logits, encoding)
        batch = SparseTargetBatch.from_rows(cache[:]).to(dtype=torch.float64)
        sums.append(batch.logprobs.exp().sum(dim=1).numpy())
        # KL and the entropy that it holds: the cross-entropy, in which only weights are rounded.
        kl = sparse_kl(z.repeat(R, 1), batch, tail="sampled", reduction="none")
        losses.append((kl + batch.entropy).numpy())
        stats = cache_statistics(cache)
        assert stats["weight_sum_mean"] == pytest.approx(sums[-1].mean(), abs=1e-6)
        assert stats["weight_sum_standard_error"] == pytest.approx(sums[-1].std(ddof=1) / math.sqrt(R * N), rel=1e-3)

    change = np.where(exact, nearest(p, cache) - p, 0.0)  # [N, V]
    full = (z.logsumexp(1) - (torch.from_numpy(p) * z).sum(1)).numpy()
    n = N * R * SEEDS
    for found, expected, functions in (
        (np.concatenate(sums), 1 + change.sum(axis=1), np.ones((N, V))),
        (np.concatenate(losses), full - (change * z.numpy()).sum(axis=1), z.numpy()),
    ):
        outside = np.where(exact, 0.0, p)
        variance, largest, _ = np.array([moments(rule, *each) for each in zip(outside, functions, strict=True)]).T
        allowed = bernstein(variance.mean(), largest.max(), n) + ROUNDING * np.abs(functions).max()
        assert abs(found.mean() - expected.mean()) <= allowed
        assert allowed < 0.003 * np.abs(functions).max()
    bias = change.sum(axis=1)
    assert bias[exact.sum(axis=1) == 1].max() > 0.01  # there is something to see
    bound = cache.metadata.codebooks["target_logprobs"].max_error
    assert (np.abs(bias) <= (exact * bound * (np.sqrt(p) + np.sqrt(nearest(p, cache)))).sum(axis=1) + 1e-7).all()


@pytest.mark.parametrize("tau", [1 / 8, 1 / 20])
def test_the_stated_bounds_are_those_of_the_codebook(tau: float) -> None:
    book = threshold(tau).codebook()
    for above, stated in STATED.items():
        p = np.linspace(max(above, tau), 1, 1_000_001)
        off = np.abs(rounded(p, book) - p).max()
        assert 0.99 * stated < off <= stated
        assert np.abs(np.sqrt(rounded(p, book)) - np.sqrt(p)).max() <= book.max_error
        assert f"{stated:.4f}".removeprefix("0") in text("docs/measurements.md")


def test_errors_cancel_where_the_teacher_is_sure() -> None:
    """Of levels uniform in √p the last but one is .974: nearly all that is above .95 would become too large."""
    logit = np.linspace(3, 12, 1_000_001)  # p from .953
    p = 1 / (1 + np.exp(-logit))
    books = threshold(0.05).codebook(), cf.sqrt_probability_codebook(64)
    found = {book.name: (rounded(p, book) - p).mean() for book in books}
    assert abs(found["arcsine"]) < 0.0003 and found["sqrt-probability"] > 0.0015


def rounded(p: np.ndarray, book: cf.Codebook) -> np.ndarray:
    return np.exp(book.decode(book.encode(np.log(p))).astype(np.float64))
