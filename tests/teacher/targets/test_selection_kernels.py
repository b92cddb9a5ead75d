"""Targets selected by the Triton kernels: those of plain torch, within the same distance of fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_targets import check, random_logits
from torch import Tensor
from transformers import AutoModelForCausalLM

from cache_format.manifest.differences import ROUNDING
from kernels_here import DEVICE, kernels_in_use
from pipeline.models.devices.kernels import TILE
from pipeline.models.head import open_head
from pipeline.teacher.engines.transformers_engine import TransformersEngine
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.targets.selection import ChunkTargets, sparse_targets
from sampled import numbers, random, rule_name, threshold

RULES = [
    TargetRule(top_k=4),
    TargetRule(kind="top-p", top_p=0.8, max_entries=20),
    threshold(0.05),
    threshold(0.11, head=2, samples=3),
    random(20, samples=2),
]
VOCABULARIES = [1, 2, 3, 5, 31, 33, 97, 1000]
every_rule = pytest.mark.parametrize("rule", RULES, ids=rule_name)
every_vocabulary = pytest.mark.parametrize("vocab", VOCABULARIES)


def selected(logits: Tensor, rule: TargetRule, *, by_kernels: bool = True) -> ChunkTargets:
    uniforms = numbers(rule, len(logits)) if rule.uniforms else None
    with kernels_in_use(plain=not by_kernels):
        return sparse_targets(logits.to(DEVICE), rule, uniforms).cpu()


def same(found: ChunkTargets, expected: ChunkTargets) -> None:
    for name in ("ids", "exact_counts", "sample_counts"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("logprobs", "residual_logprob", "entropy"):
        a, b = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(a, b, rtol=2e-6, atol=4e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@every_rule
@every_vocabulary
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_every_rule(rule: TargetRule, vocab: int, temperature: float) -> None:
    rule = TargetRule(**{**vars(rule), "temperature": temperature})
    logits = random_logits(4, vocab, seed=vocab)
    same(selected(logits, rule), selected(logits, rule, by_kernels=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab, k", [(1, 1), (31, 31), (100, 7), (1000, 15), (TILE + 100, 64)])
def test_against_float64(vocab: int, k: int, dtype: torch.dtype) -> None:
    logits = random_logits(2, vocab).to(dtype)
    found = selected(logits, TargetRule(top_k=k))
    check(logits, k, found=found._replace(ids=found.ids.long()))


@every_rule
def test_several_tiles_and_ties(rule: TargetRule) -> None:
    """A vocabulary of three tiles and a bit, in which every logit is there many times."""
    logits = torch.randint(9, (2, 3 * TILE + 41), generator=torch.Generator().manual_seed(0)).float()
    logits[:, 5000] = 14.0
    same(selected(logits, rule), selected(logits, rule, by_kernels=False))


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_as_before(rule: TargetRule, dtype: torch.dtype) -> None:
    """Also what lies between the rows of a matrix that was cut to the vocabulary, and after an error."""
    wide = random_logits(3, 140).to(DEVICE, dtype)
    before = wide.clone()
    selected(wide[:, :133], rule)
    assert torch.equal(wide, before)
    if rule.sampled:
        with kernels_in_use(), pytest.raises(ValueError, match="uniforms are"):
            sparse_targets(wide[:, :133], rule, torch.zeros(1, 1))
        assert torch.equal(wide, before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 50, 132])
def test_a_logit_that_is_not_finite_shows_in_the_entropy_of_its_row(value: float, place: int) -> None:
    logits = random_logits(3, 133)
    clean = selected(logits, TargetRule(top_k=4))
    logits[1, place] = value
    found = selected(logits, TargetRule(top_k=4))
    assert found.entropy.isfinite().tolist() == [True, False, True]
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])


def test_a_residual_far_below_one_keeps_its_digits() -> None:
    logits = torch.zeros(2, 1000)
    logits[:, 17] = 53.0
    logits[1, 18] = 52.0
    found = selected(logits, TargetRule(top_k=2))
    m = 998 * torch.exp(-logits[:, 17].double()) / (1 + torch.exp(logits[:, 18] - logits[:, 17]).double())
    torch.testing.assert_close(found.residual_logprob.double().exp(), m, rtol=1e-5, atol=0)
    assert found.entropy[0] < 1e-5 and found.entropy[1] == pytest.approx(0.5822, abs=1e-4)


def test_no_positions() -> None:
    for rule in RULES:
        found, expected = (selected(torch.zeros(0, 70), rule, by_kernels=by) for by in (True, False))
        assert [each.shape for each in found] == [each.shape for each in expected]


@pytest.mark.slow
def test_a_large_vocabulary() -> None:
    logits = random_logits(2, 128_256)
    for rule in (TargetRule(top_k=64), threshold(0.05), random(50)):
        same(selected(logits, rule), selected(logits, rule, by_kernels=False))


def test_a_cache_says_that_kernels_selected_its_targets(teacher_dir: Path) -> None:
    """So that it is not continued by plain torch, which rounds differently."""
    model = AutoModelForCausalLM.from_pretrained(teacher_dir)
    engine = TransformersEngine(open_head(model, 40), device=torch.device("cpu"), batch_size=1)
    assert "selection" not in engine.describe()
    with kernels_in_use():
        described = engine.describe()
    assert described["selection"] == "triton" and ROUNDING["capture.selection"]
