"""Stage one with every kind of targets: each row is what its rule says, and samples do not depend on the batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_capture import ROWS_PER_SHARD, Killed, contents, load, settings

import cache_format as cf
from dense import document_logprobs
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.progress import CaptureProgress
from pipeline.teacher.targets import selection as targets_module
from pipeline.teacher.targets.philox import uniforms
from pipeline.teacher.targets.rules import TargetRule
from sampled import check_draws, random, rule_name, threshold

SAMPLING = [threshold(0.05, samples=2, seed=11), threshold(0.1, head=3, temperature=2.0), random(20, seed=11)]
RULES = [*SAMPLING, TargetRule(kind="top-p", top_p=0.6, max_entries=50), TargetRule(top_k=9, temperature=0.5)]


def check_targets(row: cf.CacheRow, logprobs: np.ndarray, metadata: cf.CacheMetadata, rule: TargetRule) -> float:
    """Exact entries within the codebook's bound; sampled ones those that seed, row and position draw from the teacher.

    Returns: the share of draws that leave no doubt, between the teacher in fp32 and in fp64.
    """
    targets, bound = row.targets, metadata.codebooks["target_logprobs"].max_error
    logprobs = logprobs / rule.temperature
    p = np.exp(logprobs - np.logaddexp.reduce(logprobs, axis=1, keepdims=True))
    sure = []
    for t in np.flatnonzero(row.loss_mask):
        ids, values = targets.at(int(t))
        exact = targets.exact_counts[t]
        assert np.abs(np.exp(values[:exact] / 2) - np.sqrt(p[t, ids[:exact]])).max(initial=0) <= bound + 1e-4
        outside = p[t].copy()
        outside[ids[:exact]] = 0.0
        residual = metadata.codebooks["residual_logprob"].max_error
        assert abs(np.exp(targets.residual_logprob[t] / 2) - np.sqrt(outside.sum())) <= residual + 1e-4
        entropy = metadata.codebooks["entropy"].max_error
        assert abs(np.sqrt(targets.entropy[t]) - np.sqrt(-(p[t] * np.log(p[t])).sum())) <= entropy + 1e-4
        drawn = uniforms(rule.seed or 0, np.array([row.row]), np.array([t]), rule.uniforms)[0]
        samples = rule.samples if rule.sampled else 0
        sizes = [len(ids) - exact] if targets.sample_counts is None else targets.sample_counts[t]
        ends = np.cumsum([exact, *sizes])
        for i in range(samples):
            here = slice(ends[i], ends[i + 1])
            weights = np.exp(values[here].astype(float)) * samples
            if rule.kind == "random":
                counts = np.rint(weights * rule.draws).astype(int)
                assert counts.sum() == rule.draws
                sure.append(check_draws(np.repeat(ids[here], counts), p[t], np.sort(drawn), 1e-4))
            else:
                tau = rule.tail_threshold
                assert np.allclose(weights, tau, rtol=1e-6)
                points = ((drawn[0] + i / samples) % 1 + np.arange(np.ceil(outside.sum() / tau) + 1)) * tau
                sure.append(check_draws(ids[here], outside, points, 1e-4))
        assert bool(len(ids) - exact) <= bool(samples)
    return float(np.mean(sure)) if sure else 1.0


@pytest.mark.long
@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_any_rule(rule: TargetRule, teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    cache_teacher(settings(teacher_dir, text_file, tmp_path / "cache", targets=rule))
    cache, model = cf.open_cache(tmp_path / "cache"), load(teacher_dir)
    assert dict(cache.metadata.targets) == {**rule.to_json(), "positions": "counted"}
    assert cache.metadata.sampled == rule.sampled and cache.metadata.num_samples == (rule.samples or 1)
    sure = [
        check_targets(row, document_logprobs(model, row, cache.metadata.vocab_size), cache.metadata, rule)
        for row in cache.rows(range(0, len(cache), 5))
    ]
    assert np.mean(sure) > 0.9
    assert cf.verify_cache(tmp_path / "cache").counted_tokens == cache.num_loss_tokens > 1500
    counts = np.concatenate([row.targets.counts[row.loss_mask] for row in cache.iter_rows()])
    assert counts.max() <= rule.most_entries and counts.min() >= 1


def test_a_sample_of_another_row_or_position_is_detected(
    teacher_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator that counts positions as they come would give other samples to another batch size."""
    rule, real = SAMPLING[0], targets_module.uniforms

    def as_they_come(seed: int, rows: np.ndarray, positions: np.ndarray, draws: int) -> np.ndarray:
        return real(seed, np.zeros_like(rows), np.arange(len(positions)), draws)

    monkeypatch.setattr(targets_module, "uniforms", as_they_come)
    cache_teacher(settings(teacher_dir, text_file, tmp_path / "cache", targets=rule))
    row = cf.open_cache(tmp_path / "cache")[7]
    metadata = cf.open_cache(tmp_path / "cache").metadata
    with pytest.raises(AssertionError):
        check_targets(row, document_logprobs(load(teacher_dir), row, metadata.vocab_size), metadata, rule)


@pytest.mark.long
@pytest.mark.parametrize("rule", SAMPLING, ids=rule_name)
def test_neither_batch_size_nor_shards_change_a_sample(
    rule: TargetRule, teacher_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """But for draws between two tokens, which the teacher's rounding in another batch may decide otherwise."""
    found = []
    for i, options in enumerate(({"batch_size": 8}, {"batch_size": 3, "rows_per_shard": 7})):
        cache_teacher(settings(teacher_dir, text_file, tmp_path / str(i), targets=rule, **options))
        rows = cf.open_cache(tmp_path / str(i)).iter_rows()
        found.append([tuple(row.targets.at(int(t))[0]) for row in rows for t in np.flatnonzero(row.loss_mask)])
    same = [a == b for a, b in zip(*found, strict=True)]
    assert len(same) > 1500 and np.mean(same) > 0.995


@pytest.mark.parametrize("rule", SAMPLING[:1] + SAMPLING[2:], ids=rule_name)
def test_a_sampling_run_that_was_killed_goes_on_to_the_same_bytes(
    rule: TargetRule, teacher_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    config = settings(teacher_dir, text_file, tmp_path / "cache", targets=rule)
    cache_teacher(replace(config, output=str(tmp_path / "whole")))

    def kill(progress: CaptureProgress) -> None:
        if progress.rows > 2 * ROWS_PER_SHARD:
            raise Killed

    with pytest.raises(Killed):
        cache_teacher(config, on_progress=kill)
    with pytest.raises(cf.MismatchError, match=r"targets.seed recorded 11, given 12"):
        cache_teacher(replace(config, targets=replace(rule, seed=12)))
    summary = cache_teacher(config)
    assert summary.resumed_rows > 0
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_another_seed_is_another_sample(teacher_dir: Path, text_file: Path, tmp_path: Path) -> None:
    rows = []
    for seed in (0, 1):
        cache_teacher(settings(teacher_dir, text_file, tmp_path / str(seed), targets=threshold(0.05, seed=seed)))
        rows.append(cf.open_cache(tmp_path / str(seed))[0].targets)
    assert np.array_equal(rows[0].exact_counts, rows[1].exact_counts)
    assert np.array_equal(rows[0].residual_logprob, rows[1].residual_logprob)
    assert rows[0].ids.tolist() != rows[1].ids.tolist()
