"""Hidden-state distillation: losses against formulas, pairs of layers, and recovered projections."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cache_format as cf
from pipeline.errors import ConfigError
from pipeline.losses.feature_losses import FEATURE_LOSSES, feature_losses
from pipeline.student.data.dataset import states_in_loss
from pipeline.student.model.hidden_state_matching import HiddenStateLoss, HiddenStateMatching

# ---- the losses


@pytest.mark.parametrize("kind", FEATURE_LOSSES)
def test_losses_equal_their_formulas(kind: str) -> None:
    student, teacher = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for found, s, t in zip(feature_losses(kind, student, teacher), student.numpy(), teacher.numpy(), strict=True):
        expected = {
            "cosine": 1 - s @ t / math.sqrt((s @ s) * (t @ t)),
            "mse": sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / 5,
            "normalized-mse": sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / (t @ t),
        }[kind]
        assert found.item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda s: feature_losses(kind, s, teacher), [student.requires_grad_()], check_forward_ad=False
    )


@pytest.mark.parametrize("kind", FEATURE_LOSSES)
def test_equal_states_have_zero_loss_and_finite_gradients(kind: str) -> None:
    states = torch.randn(4, 6)
    student = states.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(feature_losses(kind, student, states).sum(), student)
    assert (feature_losses(kind, states, states) == 0).all() and gradient.abs().max() < 1e-6
    zeros = torch.zeros(1, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(feature_losses(kind, zeros, zeros.detach()).sum(), zeros)
    assert gradient.isfinite().all()
    assert feature_losses(kind, states.bfloat16(), states.half()).dtype == torch.float32


# ---- layers


def recipe(spec: dict[str, Any], layer_map: str = "uniform", loss: str = "mse", weight: float = 1.0) -> HiddenStateLoss:
    whole = cf.HiddenSpec(**{"teacher_layers": 12, "width": 8, "dtype": "float16", **spec})
    return HiddenStateLoss(loss=loss, weight=weight, layer_map=layer_map, spec=whole)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "layers, layer_map, student_layers, expected",
    [
        (range(1, 13), "uniform", 6, [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12)]),
        (range(1, 13), "uniform", 12, [(i, i) for i in range(1, 13)]),
        (range(13), "uniform", 3, [(0, 0), (1, 4), (2, 8), (3, 12)]),
        ((6, 12), "uniform", 4, [(2, 6), (4, 12)]),
        ((1,), "uniform", 2, [(1, 1)]),  # not the embeddings
        ((3, 12), "uniform", 24, [(6, 3), (24, 12)]),
        ((6, 12), "last", 5, [(5, 12)]),
        ((6, 12), "0:6, 1:12", 2, [(0, 6), (1, 12)]),
    ],
)
def test_pairs_of_layers(layers: Any, layer_map: str, student_layers: int, expected: list[tuple[int, int]]) -> None:
    assert list(recipe({"layers": tuple(layers)}, layer_map).pairs(student_layers)) == expected


@pytest.mark.parametrize(
    "options, words",
    [
        ({"layer_map": "middle"}, "`layer_map` middle: found 'middle', expected uniform, last, or pairs"),
        ({"layer_map": "1:2:3"}, "found '1:2:3'"),
        ({"layer_map": ""}, "`layer_map` : found '', expected uniform, last, or pairs"),
        ({"layer_map": "1:6, 1:6"}, "found 1:6 twice"),
        ({"layer_map": "1:5"}, "found teacher layer 5, the cache has states of layers 6 "),
        ({"layer_map": "last"}, "found teacher layer 12, "),
        ({"loss": "l1"}, "`hidden_loss` l1: "),
        ({"weight": 0.0}, "`hidden_weight` 0.0: "),
        ({"weight": math.inf}, "`hidden_weight` inf: "),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe({"layers": (6,)}, **options)


def test_missing_student_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the student has layers 0 .* to 2, not 3"):
        recipe({"layers": (6,)}, "3:6").pairs(2)


# ---- the module


def batch_of(states: Tensor, mask: np.ndarray, counted: np.ndarray, layer: int = 4) -> dict[str, Tensor]:
    """A collated batch with one layer of teacher states [B, T, D], stored at `mask`, with loss tokens at `counted`."""
    labels = torch.where(torch.from_numpy(counted), 1, -100)
    index = torch.from_numpy(np.flatnonzero(mask))
    batch = {"labels": labels, "hidden_index": index, f"hidden_{layer}": states.flatten(0, 1)[index]}
    return batch | states_in_loss(labels, index)


def test_known_projections_are_recovered() -> None:
    """The teacher's states are a matrix times the student's, with another matrix in each of two layers."""
    torch.manual_seed(0)
    known = {pair: torch.randn(6, 4) for pair in ((1, 4), (2, 9))}
    features = HiddenStateMatching("mse", 1.0, tuple(known), (4, 6), seed=3)
    assert {tuple(each.shape) for each in features.parameters()} == {(6, 4)}
    optimizer = torch.optim.Adam(features.parameters(), lr=0.05)
    everywhere = np.ones((8, 16), bool)
    for _ in range(600):
        states = {layer: torch.randn(8, 16, 4) for layer in (1, 2)}
        batch = batch_of(states[1] @ known[1, 4].T, everywhere, everywhere, 4)
        batch |= batch_of(states[2] @ known[2, 9].T, everywhere, everywhere, 9)
        loss = features(states, batch).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-6
    for (student, teacher), expected in known.items():
        torch.testing.assert_close(features.maps[f"{student}-{teacher}"].detach(), expected, atol=1e-3, rtol=0)


def test_only_loss_tokens_with_states_enter_the_loss() -> None:
    rng = np.random.default_rng(0)
    mask, counted = rng.random((2, 3, 9)) < 0.6
    states, teacher = torch.randn(2, 3, 9, 5)
    states.requires_grad_()
    features = HiddenStateMatching("mse", 1.0, ((1, 4),), (5, 5))
    found = features({1: states}, batch_of(teacher, mask, counted))
    (gradient,) = torch.autograd.grad(found.sum(), states)
    assert np.array_equal((gradient != 0).any(dim=-1).numpy(), mask & counted)
    expected = ((states - teacher).square().mean(-1) * torch.from_numpy(mask & counted)).sum(dim=1)
    torch.testing.assert_close(found, expected)


def test_batch_without_loss_tokens_still_gives_projections_a_gradient() -> None:
    features = HiddenStateMatching("cosine", 1.0, ((1, 4),), (5, 7))
    nothing = np.zeros((2, 3), bool)
    features({1: torch.randn(2, 3, 5)}, batch_of(torch.randn(2, 3, 7), ~nothing, nothing)).sum().backward()
    assert all(each.grad is not None and (each.grad == 0).all() for each in features.parameters())


def test_states_at_every_nth_position_estimate_all_positions() -> None:
    """The mean over the N possible offsets equals the sum over all positions."""
    states, teacher = torch.randn(2, 1, 12, 5)
    everywhere = np.ones((1, 12), bool)
    whole = HiddenStateMatching("mse", 1.0, ((1, 4),), (5, 5))({1: states}, batch_of(teacher, everywhere, everywhere))
    sparse = HiddenStateMatching("mse", 1.0, ((1, 4),), (5, 5), every=3)
    parts = [
        sparse({1: states}, batch_of(teacher, (np.arange(12) % 3 == i)[None], everywhere)).item() for i in range(3)
    ]
    assert np.mean(parts) == pytest.approx(whole.item(), rel=1e-6)
