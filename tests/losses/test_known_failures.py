"""Ways in which other tools get the loss wrong: the code passes each check, a deliberately broken variant does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_losses import CLASS_POLICIES, K, N, V, hostile_targets, random_logits
from test_row_targets import sample_row
from torch import Tensor

import cache_format as cf
from dense import random_targets
from head_sums import fused_sums
from pipeline.losses import (
    IGNORE_INDEX,
    TAIL_POLICIES,
    SparseTargetBatch,
    divergences,
    sparse_kl,
)
from pipeline.losses.tails import StudentValues
from pipeline.student.data.dataset import collate


def check_alignment(rows: list[cf.CacheRow]) -> None:
    """What a batch says at t is about the token at t + 1: label, target list and mask."""
    batch = collate(rows)
    targets = batch["targets"]
    length = batch["input_ids"].shape[1]
    for i, row in enumerate(rows):
        for t in range(length):
            n = i * length + t
            counts = t < len(row.input_ids) and bool(row.loss_mask[t])
            assert bool(targets.loss_mask[n]) == counts, "a position counts that should not, or the other way round"
            if counts:
                assert targets.labels[n] == row.input_ids[t + 1], "label"
                assert targets.ids[n, targets.logprobs[n].argmax()] == row.input_ids[t + 1], "target list"
    assert targets.loss_mask.sum() == sum(int(row.loss_mask.sum()) for row in rows)


ROWS = [sample_row(8, seed=0), sample_row(5, seed=1), sample_row(12, seed=2)]


def test_targets_labels_and_mask_share_their_index() -> None:
    check_alignment(ROWS)


def test_a_target_list_off_by_one_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SparseTargetBatch.from_rows

    def late(rows: list[cf.CacheRow], length: int, temperature: float) -> SparseTargetBatch:
        batch = right(rows, length, temperature)
        names = ("ids", "logprobs", "exact_counts", "residual_logprob", "entropy")
        return replace(batch, **{name: getattr(batch, name).roll(1, 0) for name in names})

    monkeypatch.setattr(SparseTargetBatch, "from_rows", late)
    with pytest.raises(AssertionError, match="target list"):
        check_alignment(ROWS)


def test_labels_that_are_not_shifted_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    unshifted = property(lambda row: np.where(row.loss_mask, row.input_ids, IGNORE_INDEX))
    monkeypatch.setattr(cf.CacheRow, "label_ids", unshifted)
    with pytest.raises(AssertionError, match="label"):
        check_alignment(ROWS)


def test_a_mask_taken_at_the_predicted_token_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(row: cf.CacheRow) -> np.ndarray:
        mask = np.append(row.loss_mask[1:], False)
        return np.where(mask, np.append(row.input_ids[1:], 0), IGNORE_INDEX)

    monkeypatch.setattr(cf.CacheRow, "label_ids", property(shifted))
    with pytest.raises(AssertionError, match="a position counts that should not"):
        check_alignment(ROWS)


def check_gradient_is_that_of_the_reported_loss(loss_of: Callable[[Tensor], Tensor]) -> None:
    """Along the gradient, the loss changes by its squared norm: central difference in fp64."""
    x = random_logits(N, V).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(x), x)
    with torch.no_grad():
        step = 1e-5 * gradient / gradient.norm()
        slope = (loss_of(x + step) - loss_of(x - step)) / 2e-5
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=1e-6), "gradient and loss disagree"


def fused_on_logits(z: Tensor, targets: SparseTargetBatch, temperature: float, kd_weight: float = 1.0) -> Tensor:
    """The fused head with an identity matrix for a weight: its hidden states are the logits."""
    weight = torch.eye(z.shape[1], dtype=z.dtype)
    return fused_sums(z, weight, None, targets, temperature=temperature, kd_weight=kd_weight, chunk_size=5).loss


@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
def test_the_square_of_the_temperature_is_in_loss_and_gradient(temperature: float) -> None:
    targets = random_targets(N, V, K)
    check_gradient_is_that_of_the_reported_loss(lambda z: sparse_kl(z, targets, temperature=temperature))
    check_gradient_is_that_of_the_reported_loss(lambda z: fused_on_logits(z, targets, temperature, 0.7))


def test_the_square_of_the_temperature_in_the_loss_alone_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = random_targets(N, V, K)

    def reported_only(z: Tensor) -> Tensor:
        kl = sparse_kl(z, targets, temperature=2.0) / 4
        return kl + 3 * kl.detach()

    with pytest.raises(AssertionError, match="disagree"):
        check_gradient_is_that_of_the_reported_loss(reported_only)

    def without_square(*arguments: object) -> tuple[Tensor, Tensor | None]:
        terms, d_logits = computed(*arguments)  # type: ignore[arg-type]
        return terms, None if d_logits is None else d_logits / 4

    computed = SparseTargetBatch.loss_and_dlogits
    monkeypatch.setattr(SparseTargetBatch, "loss_and_dlogits", without_square)
    with pytest.raises(AssertionError, match="disagree"):
        check_gradient_is_that_of_the_reported_loss(lambda z: fused_on_logits(z, targets, 2.0))


def check_padded_rows_take_no_part(loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A head with 7 rows of padding, whose logits are the largest, must give what the cut head gives."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(N, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(V + 7, 8, generator=generator, dtype=torch.float64)
    weight[V:] *= 5
    weight.requires_grad_()
    expected = sparse_kl(hidden @ weight[:V].T, random_targets(N, V, K), kd_weight=0.5, reduction="sum")
    loss = loss_of(hidden, weight)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12), "padding is in the softmax"
    (gradient,) = torch.autograd.grad(loss, weight)
    assert (gradient[V:] == 0).all()


def test_padded_vocabulary() -> None:
    targets = random_targets(N, V, K)
    check_padded_rows_take_no_part(
        lambda hidden, weight: fused_sums(hidden, weight, None, targets, kd_weight=0.5, vocab_size=V).loss
    )


def test_a_padded_vocabulary_left_in_is_detected() -> None:
    targets = random_targets(N, V, K)
    with pytest.raises(AssertionError, match="padding is in the softmax"):
        check_padded_rows_take_no_part(
            lambda hidden, weight: fused_sums(hidden, weight, None, targets, kd_weight=0.5).loss
        )


def check_is_a_divergence(loss_of: Callable[[Tensor, SparseTargetBatch], Tensor]) -> None:
    """Never negative, also for a student that puts all its mass on the entries."""
    targets = random_targets(N, V, K, masked=0.0)
    for on_entries in (0.0, 3.0, 30.0):
        student = random_logits()
        student.scatter_add_(1, targets.ids, on_entries * targets.valid.double())
        assert (loss_of(student, targets) >= -1e-12).all(), "negative"


@pytest.mark.parametrize("tail", CLASS_POLICIES)
def test_the_truncated_divergence_is_not_negative(tail: str) -> None:
    check_is_a_divergence(lambda z, targets: sparse_kl(z, targets, tail=tail, reduction="none"))


def test_a_sum_over_the_entries_alone_is_detected() -> None:
    def truncated(z: Tensor, targets: SparseTargetBatch) -> Tensor:
        log_q = z.log_softmax(1).gather(1, targets.ids)
        log_p = targets.logprobs
        return torch.where(targets.valid, log_p.exp() * (log_p - log_q), 0.0).sum(1)

    with pytest.raises(AssertionError, match="negative"):
        check_is_a_divergence(truncated)


def check_absent_entries_are_finite(by: str, tails: tuple[str, ...] = TAIL_POLICIES) -> None:
    targets = hostile_targets()
    for tail in tails:
        logits = random_logits(5, 7).requires_grad_()
        if by == "reference":
            loss = sparse_kl(logits, targets, tail=tail, kd_weight=0.5)
        else:
            loss = fused_sums(logits, torch.eye(7).double(), None, targets, tail=tail, kd_weight=0.5).loss
        assert loss.isfinite(), "the loss is not finite"
        assert torch.autograd.grad(loss, logits)[0].isfinite().all(), "the gradient is not finite"


@pytest.mark.parametrize("by", ["reference", "fused"])
def test_minus_infinity_gives_no_nan(by: str) -> None:
    check_absent_entries_are_finite(by)


@pytest.mark.parametrize("by", ["reference", "fused"])
def test_a_divergence_without_care_for_minus_infinity_is_detected(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def naive(log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(1)

    def absent_is_a_product(
        targets: SparseTargetBatch, student: StudentValues, entries: Tensor, label: Tensor
    ) -> Tensor:
        log_q = (student.entries - student.lse[:, None]).masked_fill(~targets.valid, -torch.inf)
        return (entries * -log_q).sum(1)

    monkeypatch.setattr(divergences, "forward_kl", naive)
    monkeypatch.setattr(divergences, "estimated_forward_kl", absent_is_a_product)
    for tail in TAIL_POLICIES:
        with pytest.raises(AssertionError, match="not finite"):
            check_absent_entries_are_finite(by, (tail,))
