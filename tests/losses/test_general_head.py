"""A head of any other form against the definition of the loss, and a student that trains through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_fused import PADDING, D, K, N, Problem, V, every_tail, every_temperature, gradients
from test_row_targets import sample_row
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma2Config

from dense import random_targets
from head_sums import fused_sums, general_sums
from pipeline.losses import SparseTargetBatch, fused_head_loss, sparse_kl
from pipeline.models.head import open_head
from pipeline.student.training.forward import (
    DistillLoss,
    distillation_output,
    install_distillation_forward,
    own_forward,
)
from textbook import relative_errors


@every_tail
@every_temperature
def test_general_head_equals_the_reference(tail: str, temperature: float) -> None:
    """A soft-capped head; its own parameters get their gradient through the checkpoint."""
    problem = Problem(padding=PADDING)
    options = {"tail": tail, "temperature": temperature, "kd_weight": 0.4}

    def head(states: Tensor) -> Tensor:
        return 3 * torch.tanh(F.linear(states, weight, bias) / 3)

    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        hidden, weight, bias = problem.leaves(torch.float64)
        targets = problem.targets_for(**options)
        expected = gradients(sparse_kl(head(hidden)[:, :V], targets, **options), hidden, weight, bias)
        hidden, weight, bias = problem.leaves(dtype)
        scale = 1 / int(targets.loss_mask.sum())
        output = general_sums(hidden, head, targets, scale=scale, vocab_size=V, chunk_size=7, **options)
        assert max(relative_errors(gradients(output.loss, hidden, weight, bias), expected)) < bound


@every_tail
def test_general_head_equals_the_fused_one(tail: str) -> None:
    problem = Problem()
    hidden, weight, bias = problem.leaves(torch.float64)
    options = {"tail": tail, "temperature": 2.0, "kd_weight": 0.4, "chunk_size": 7}
    targets = problem.targets_for(**options)
    fused_output = fused_sums(hidden, weight, bias, targets, **options)
    general = general_sums(hidden, lambda h: F.linear(h, weight, bias), targets, **options)
    for a, b in zip(general, fused_output, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    for a, b in zip(*(gradients(x.loss, hidden, weight, bias) for x in (general, fused_output)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_a_student_whose_head_is_its_own_trains_through_its_forward() -> None:
    """Gemma 2 soft-caps its logits. Its loss is installed as its `forward`, and the head is run inside of it."""
    config = Gemma2Config(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,
        final_logit_softcapping=5.0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    head = open_head(model, V)
    assert not head.linear
    targets = random_targets(N, V, K)
    batch = {
        "input_ids": torch.randint(V, (1, N)),
        "position_ids": torch.arange(N)[None],
        "labels": targets.labels[None],
        "targets": targets,
    }
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[0]
    expected = sparse_kl(logits, targets, kd_weight=0.9, reduction="sum")
    expected_gradient = torch.autograd.grad(expected, list(model.parameters()))
    with own_forward(model):
        install_distillation_forward(model, head, DistillLoss(kd_weight=0.9))
        loss = model(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(gradient, expected_gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert torch.equal(model(input_ids=batch["input_ids"], use_cache=False).logits[0], logits)
    assert torch.equal(distillation_output(head, batch, DistillLoss(kd_weight=0.9)).loss, loss)


@pytest.mark.parametrize("more", [-1, 3])
@pytest.mark.parametrize("masked", [0.0, 0.3])
def test_states_that_do_not_fit_the_targets_are_refused(more: int, masked: float) -> None:
    """Those of other positions would be read, which gives a number too."""
    targets, hidden, weight = random_targets(N, V, K, masked=masked), torch.randn(N + more, D), torch.randn(V, D)
    for walk in (
        lambda: fused_sums(hidden, weight, None, targets),
        lambda: general_sums(hidden, lambda states: states @ weight.T, targets),
    ):
        with pytest.raises(ValueError, match=f"{N + more} hidden states for {N} positions"):
            walk()


@pytest.mark.parametrize("options", [{"kd_weight": 0.5}, {"tail": "label"}, {"tail": "realized"}])
def test_targets_without_labels_are_refused_by_losses_that_read_them(options: dict[str, Any]) -> None:
    row, (hidden, weight) = sample_row(), (torch.randn(8, D), torch.randn(V, D))
    mask = torch.from_numpy(row.loss_mask)
    bare = SparseTargetBatch.from_sparse(row.targets, loss_mask=mask)
    labelled = bare.with_labels(torch.from_numpy(row.label_ids))
    assert torch.equal(fused_head_loss(hidden, weight, None, bare), fused_head_loss(hidden, weight, None, labelled))
    for loss in (
        lambda targets: fused_head_loss(hidden, weight, None, targets, **options),
        lambda targets: general_sums(hidden, lambda states: states @ weight.T, targets, **options).loss,
        lambda targets: sparse_kl(hidden @ weight.T, targets, **options),
        lambda targets: sparse_kl(hidden @ weight.T, targets, loss_mask=mask, **options),
    ):
        for targets in (bare, bare[:], bare.masked(mask)):
            with pytest.raises(ValueError, match="needs labels"):
                loss(targets)
        assert loss(labelled).isfinite()
    with pytest.raises(ValueError, match=r"labels of shape \(7,\) for 8 positions"):
        bare.with_labels(torch.from_numpy(row.label_ids)[:7])
