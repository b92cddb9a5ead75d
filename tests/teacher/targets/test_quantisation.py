"""What rounding to a codebook changes: less than .002 nats of KL, for every kind of targets with exact entries.

Through a written cache, against fp64: the exact entries and their residual as one class, before and after, as a loss
sees them. The real teacher's errors are in benchmarks/results/sizes.md; these distributions are made to be like it:
Zipf's law, from nearly flat to nearly sure.

Shapes: n positions, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import cache_format as cf
from pages import ROOT
from pipeline.teacher.targets.cache_rows import cache_row
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import draws, sparse_targets
from pipeline.teacher.text.packing import TokenRow
from sampled import rule_name, threshold

MOST_NATS = 0.002
N, V = 256, 20_000
RULES = [
    threshold(0.05),
    threshold(0.125),
    threshold(0.02),
    TargetRule(top_k=16),
    TargetRule(top_k=50),
    TargetRule(top_k=64),
    TargetRule(kind="top-p"),
]


def logits() -> torch.Tensor:
    """[N, V] log of r^-s for the r-th of a random order, times e^noise; s from 1 (mean entropy 6 nats) to 3 (.9)."""
    generator = torch.Generator().manual_seed(3)
    ranks = torch.stack([torch.randperm(V, generator=generator) for _ in range(N)]) + 1
    noise = torch.randn(N, V, generator=generator)
    return 0.7 * noise - torch.linspace(1.0, 3.0, N)[:, None] * ranks.log()


@pytest.mark.long
@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_rounding_costs_less_than_two_thousandths_of_a_nat(rule: TargetRule, tmp_path: Path) -> None:
    teacher = logits()
    metadata = cf.CacheMetadata(
        teacher={"name": "made up"},
        tokenizer={},
        vocab_size=V,
        alignment="same",
        targets=rule.to_json(),
        corpus={"rows": 1},
        codebooks=rule.codebooks(V),
        rows_per_shard=1,
        rows_per_record_batch=1,
    )
    everywhere = np.ones(N, bool)
    token_row = TokenRow(np.arange(N), everywhere, np.array([N]), labels=np.zeros(N, np.int64))
    with cf.CacheWriter(tmp_path / "cache", metadata) as writer:
        drawn = draws(rule, np.zeros(N, int), np.arange(N))
        writer.write([cache_row(0, token_row, everywhere, sparse_targets(teacher, rule, drawn))])
    targets = cf.open_cache(tmp_path / "cache")[0].targets

    log_p = teacher.double().log_softmax(1).numpy()
    found = []
    for t in range(N):
        ids, logprobs = (values[: targets.exact_counts[t]] for values in targets.at(t))
        p, q = np.exp(log_p[t, ids]), np.exp(logprobs.astype(np.float64))
        p, q = np.append(p, 1 - p.sum()), np.append(q, np.exp(np.float64(targets.residual_logprob[t])))
        found.append(float(np.sum(p * np.log(p / (q / q.sum())))))
    assert min(found) > -1e-6 and 1e-6 < np.mean(found) < MOST_NATS


def test_so_it_does_with_the_real_teacher() -> None:
    (rows,) = json.loads((ROOT / "benchmarks/results/sizes.json").read_text(encoding="utf-8"))["tables"].values()
    errors = {row["targets"]: row["KL of rounding, nats"] for row in rows}
    assert len(errors) == 9 and max(errors.values()) < MOST_NATS


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 8.0])
def test_the_mean_entropy_of_hot_samples_survives_rounding(temperature: float) -> None:
    """The KL to a student is estimated from it. Hot entropies are so alike that one rounding may move all of them."""
    logprobs = (logits().double() / temperature).log_softmax(dim=1)
    entropy = -(logprobs.exp() * logprobs).sum(dim=1).numpy()
    rule = TargetRule(kind="threshold", temperature=temperature, tail_threshold=0.05)
    book = rule.codebooks(V)["entropy"]
    assert len(book.values) == (64 if temperature == 1.0 else 256)
    assert abs(np.mean(book.decode(book.encode(entropy)) - entropy)) < 0.01
    assert len(TargetRule(top_k=16, temperature=temperature).codebooks(V)["entropy"].values) == 64
