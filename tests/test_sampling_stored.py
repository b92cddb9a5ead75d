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
from pipeline.losses import TargetBatch, sparse_kl
from pipeline.stats import cache_stats
from pipeline.teacher.packing import TokenRow
from pipeline.teacher.rows import cache_row
from pipeline.teacher.rules import TargetRule
from pipeline.teacher.targets import draws, sparse_targets
from sampled import ROUNDING, bernstein, moments, threshold

N, V, R, SEEDS = 120, 100, 48, 4
STATED = (0.0132, 0.0262)
"""Of `threshold` at τ = 1/20 and 1/8: how far √p of an exact entry is off at most, and p; in docs/measurements.md."""


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
        batch = TargetBatch.from_rows(cache[:]).to(dtype=torch.float64)
        sums.append(batch.logprobs.exp().sum(dim=1).numpy())
        # KL and the entropy that it holds: the cross-entropy, in which only weights are rounded.
        kl = sparse_kl(z.repeat(R, 1), batch, tail="sampled", reduction="none")
        losses.append((kl + batch.entropy).numpy())
        stats = cache_stats(cache)
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


def test_the_stated_bound_is_that_of_the_codebook() -> None:
    for tau in (1 / 8, 1 / 20):
        book = threshold(tau).codebook()
        p = np.linspace(tau, 1, 1_000_001)
        stored = np.exp(book.decode(book.encode(np.log(p))).astype(float))
        of_root, of_p = np.abs(np.sqrt(stored) - np.sqrt(p)).max(), np.abs(stored - p).max()
        assert 0.99 * STATED[0] < of_root <= STATED[0] + 5e-5 and of_root <= book.max_error
        assert 0.99 * STATED[1] < of_p <= STATED[1]
    for number in STATED:
        assert f"{number:.4f}".removeprefix("0") in text("docs/measurements.md")
