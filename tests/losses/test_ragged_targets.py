"""Ragged targets are the padded ones, whichever rows, samples and id types they come from."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

import cache_format as cf
from cache_samples import VOCAB, sample_row
from pipeline.losses import DistillLoss, RaggedTargets, SparseTargetBatch, fused_head
from pipeline.losses.sparse_targets import IGNORE_INDEX


def padded(rows: list[cf.CacheRow], length: int) -> SparseTargetBatch:
    """The definition, a position at a time."""
    width = max(1, max(int(row.targets.merged().counts.max(initial=0)) for row in rows))
    n = len(rows) * length
    ids, logprobs = torch.zeros(n, width, dtype=torch.int64), torch.full((n, width), -torch.inf)
    residual, entropy = torch.zeros(2, n)
    exact_counts, labels = torch.zeros(n, dtype=torch.int64), torch.full((n,), IGNORE_INDEX)
    for i, row in enumerate(rows):
        targets = row.targets.merged()
        for t in range(len(row.input_ids)):
            at, (its_ids, its_logprobs) = i * length + t, targets.at(t)
            ids[at, : len(its_ids)] = torch.tensor(its_ids.astype(np.int64))
            logprobs[at, : len(its_ids)] = torch.tensor(np.array(its_logprobs))
            exact_counts[at], labels[at] = int(targets.exact_counts[t]), int(row.label_ids[t])
            residual[at], entropy[at] = float(targets.residual_logprob[t]), float(targets.entropy[t])
    return SparseTargetBatch(
        ids=ids, logprobs=logprobs, residual_logprob=residual, labels=labels, exact_counts=exact_counts, entropy=entropy
    )


def same(found: SparseTargetBatch, expected: SparseTargetBatch) -> None:
    for field in fields(SparseTargetBatch):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(theirs, torch.Tensor):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), field.name
        else:
            assert ours == theirs


def with_ids(row: cf.CacheRow, dtype: type, add: int = 0) -> cf.CacheRow:
    return replace(row, targets=replace(row.targets, ids=(row.targets.ids + add).astype(dtype)))


@pytest.mark.parametrize(("dtype", "add"), [(np.uint16, 65_000), (np.uint32, 200_000), (np.int64, 0)])
def test_rectangle_of_rows_of_different_lengths(dtype: type, add: int) -> None:
    rows = [with_ids(sample_row(n, tokens=n, samples=2), dtype, add) for n in (8, 5, 12)]
    found = RaggedTargets.from_rows(rows, 13)
    same(found.rectangular(), padded(rows, 13))
    assert torch.equal(found.loss_tokens, found.loss_mask.nonzero().squeeze(1)) and len(found) == 39
    same(found[found.loss_tokens].rectangular(), padded(rows, 13)[found.loss_tokens])
    same(found[13:26].rectangular(), padded(rows, 13)[13:26])


def test_rows_without_entries() -> None:
    row = sample_row(1, tokens=6)
    nothing = np.zeros_like(row.targets.counts)
    empty = replace(row.targets, counts=nothing, exact_counts=nothing, ids=np.zeros(0, np.uint16), logprobs=np.zeros(0))
    rows = [replace(row, targets=empty)]
    same(RaggedTargets.from_rows(rows).rectangular(), padded(rows, 6))


def test_loss_is_that_of_padded_targets() -> None:
    rows = [sample_row(n, tokens=n) for n in (8, 5, 12)]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(36, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, 4, generator=generator).double()
    ragged = RaggedTargets.from_rows(rows, 12)
    for targets in (ragged, ragged.to("cpu"), ragged.with_labels(ragged.labels)):
        leaf, other = (hidden.clone().requires_grad_() for _ in range(2))
        found = fused_head(leaf, weight, None, targets, DistillLoss(kd_weight=0.7))
        expected = fused_head(other, weight, None, padded(rows, 12), DistillLoss(kd_weight=0.7))
        found.loss.backward()
        expected.loss.backward()
        assert torch.equal(leaf.grad, other.grad) and all(map(torch.equal, found, expected))
