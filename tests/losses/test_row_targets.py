"""The targets of one row, straight from a cache, as both losses take them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import cache_format as cf
from dense import dense_losses
from pipeline.losses import SparseTargetBatch, fused_head_loss, sparse_kl

V = 31


def logits_of(positions: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2.0 * torch.randn(positions, V, generator=generator, dtype=torch.float64)


def sample_row(length: int = 8, *, seed: int = 0, vocab: int = V) -> cf.CacheRow:
    """A row whose teacher is nearly sure of every next token, and right; two documents, a mask with gaps."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(0, vocab, length)
    loss_mask = np.ones(length, bool)
    loss_mask[[0, length // 2 - 1, length - 1]] = False  # a prompt token and the ends of the documents
    counts = np.where(loss_mask, 2, 0)
    following = np.roll(input_ids, -1)[loss_mask]
    ids = np.sort(np.stack([following, (following + 1) % vocab], axis=1), axis=1)
    return cf.CacheRow(
        row=seed,
        input_ids=input_ids,
        loss_mask=loss_mask,
        segment_lengths=np.array([length // 2, length - length // 2]),
        targets=cf.SparseTargets(
            counts=counts,
            ids=ids.reshape(-1),
            logprobs=np.log(np.where(ids == following[:, None], 0.9, 0.05)).astype(np.float32).reshape(-1),
            exact_counts=counts,
            residual_logprob=np.where(loss_mask, np.log(0.05), 0.0).astype(np.float32),
            entropy=np.zeros(length, np.float32),
        ),
    )


def test_takes_the_targets_of_a_cache_row_as_they_are() -> None:
    row, logits = sample_row(), logits_of(8)
    batch = SparseTargetBatch.from_rows([row])
    counted = batch.loss_mask
    expected = dense_losses(logits, batch, kd_weight=0.3, tail="label")
    found = sparse_kl(logits, row.targets, labels=torch.from_numpy(row.label_ids), kd_weight=0.3, tail="label")
    assert found.item() == pytest.approx(expected.sum() / counted.sum().item(), rel=1e-6)
    masked = sparse_kl(logits, row.targets, loss_mask=torch.from_numpy(row.loss_mask))
    assert masked.item() == pytest.approx(dense_losses(logits, batch).sum() / counted.sum().item(), rel=1e-6)
    for options in ({"kd_weight": 0.5}, {"tail": "label"}, {"tail": "realized"}):
        with pytest.raises(ValueError, match="needs labels"):
            sparse_kl(logits, row.targets, loss_mask=row.loss_mask, **options)  # type: ignore[arg-type]


def test_the_fused_loss_takes_the_targets_of_a_cache_row_too() -> None:
    """With a head of more rows than the vocabulary, and every argument of `sparse_kl`."""
    row, vocab = sample_row(), V
    hidden = torch.randn(8, 6, dtype=torch.float64)
    weight, bias = torch.randn(vocab + 3, 6, dtype=torch.float64), torch.randn(vocab + 3, dtype=torch.float64)
    logits = (hidden @ weight.T + bias)[:, :vocab]
    options: list[dict[str, Any]] = [
        {"loss_mask": row.loss_mask},
        {"labels": row.label_ids, "kd_weight": 0.3, "tail": "label"},
        {"labels": torch.from_numpy(row.label_ids), "loss_mask": torch.arange(8) > 3, "kd_weight": 0.3},
        {"loss_mask": row.loss_mask, "temperature": 2.0, "capture_temperature": 2.0},
    ]
    for each in options:
        expected = sparse_kl(logits, row.targets, **each)
        found = fused_head_loss(hidden, weight, bias, row.targets, vocab_size=vocab, **each)
        assert found.item() == pytest.approx(expected.item(), rel=1e-9), each
    batch = SparseTargetBatch.from_rows([row])
    found = fused_head_loss(hidden, weight, bias, batch, vocab_size=vocab, loss_mask=torch.arange(8) > 3)
    assert found.item() == pytest.approx(sparse_kl(logits, batch, loss_mask=torch.arange(8) > 3).item(), rel=1e-9)
    with pytest.raises(ValueError, match="needs labels"):
        fused_head_loss(hidden, weight, bias, row.targets, loss_mask=row.loss_mask, kd_weight=0.5)


def test_a_loss_token_without_entries_is_refused() -> None:
    """Its divergence would be 0, or whatever the tail says of nothing."""
    row, logits = sample_row(), logits_of(8)
    targets, head = row.targets, torch.eye(V, dtype=logits.dtype)
    for loss in (partial(sparse_kl, logits), partial(fused_head_loss, logits, head, None)):
        expected = loss(targets, loss_mask=row.loss_mask).item()
        assert loss(targets, labels=row.label_ids).item() == pytest.approx(expected, rel=1e-9), "their mask serves too"
        with pytest.raises(ValueError, match="no entries at 3 of the loss tokens, first at position 0. .* loss_mask="):
            loss(targets)
        none = np.zeros(8, np.int64)
        hidden = replace(targets, counts=none, exact_counts=none, ids=none[:0], logprobs=np.zeros(0, np.float32))
        with pytest.raises(ValueError, match="Hidden targets are computed from the states"):
            loss(hidden, loss_mask=row.loss_mask)
        with pytest.raises(ValueError, match="a loss mask of 5 values for 8 positions"):
            loss(SparseTargetBatch.from_rows([row]), loss_mask=row.loss_mask[:5])
