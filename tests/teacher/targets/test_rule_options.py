"""A target rule by itself: what each kind has, what is refused, and the codebook that belongs to it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.teacher.targets.rules import TARGET_KINDS, TargetKind, TargetRule
from sampled import random, threshold


def test_each_kind_has_its_parts_and_their_defaults() -> None:
    expected = {
        "top-k": {"k": 64, "max_entries": 64},
        "top-p": {"top_p": 0.95, "max_entries": 128},
        "threshold": {"tail_threshold": 0.05, "k": 1, "samples": 1, "seed": 0, "max_entries": 21},
        "random": {"draws": 50, "samples": 1, "seed": 0, "max_entries": 50},
        "hidden": {"max_entries": 0},
    }
    assert set(expected) == set(TARGET_KINDS)
    for kind, parts in expected.items():
        rule = TargetRule(kind=kind)
        assert rule.to_json() == {"kind": kind, "temperature": 1.0, **parts}
        assert rule.most_entries == parts["max_entries"]
        assert rule.sampled == ("seed" in parts)
    rule = threshold(0.3, head=5, samples=3, seed=9, temperature=2.0)
    assert rule.to_json() == {
        "kind": "threshold",
        "temperature": 2.0,
        "tail_threshold": 0.3,
        "k": 5,
        "samples": 3,
        "seed": 9,
        "max_entries": 5 + 3 * 4,  # at most ⌈1/τ⌉ = 4 points a sample
    }
    assert random(50, samples=3).most_entries == 150


@pytest.mark.parametrize(
    "parts, kind",
    [
        ({}, "threshold"),
        ({"samples": 3, "seed": 1}, "threshold"),
        ({"top_k": 16}, "top-k"),
        ({"top_k": 16, "tail_threshold": 0.1}, "threshold"),
        ({"top_p": 0.9, "max_entries": 10}, "top-p"),
        ({"draws": 13, "seed": 2}, "random"),
    ],
)
def test_the_kind_is_that_of_the_parts_that_are_given(parts: dict[str, Any], kind: TargetKind) -> None:
    assert TargetRule(**parts) == TargetRule(kind=kind, **parts)


@pytest.mark.parametrize(
    "kind, part",
    [
        *(("top-k", part) for part in ("top_p", "max_entries", "tail_threshold", "draws", "samples", "seed")),
        *(("top-p", part) for part in ("top_k", "tail_threshold", "draws", "samples", "seed")),
        *(("threshold", part) for part in ("top_p", "max_entries", "draws")),
        *(("random", part) for part in ("top_k", "top_p", "max_entries", "tail_threshold")),
    ],
)
def test_parts_of_another_kind_are_refused(kind: str, part: str) -> None:
    with pytest.raises(ConfigError, match=f"`{part}` 1: {kind} targets do not have this option. Use it with `targets`"):
        TargetRule(kind=kind, **{part: 1})


@pytest.mark.parametrize(
    "rule, expected",
    [
        ({"kind": "top-q"}, "`targets` top-q: expected one of top-k, top-p, threshold, random"),
        ({"top_k": 0}, "`top_k` 0: expected 1 to 65535"),
        ({"top_k": 65536}, "`top_k` 65536"),
        ({"kind": "threshold", "top_k": -1}, "`top_k` -1: expected 0 to 65535"),
        ({"kind": "top-p", "top_p": 0.0}, "`top_p` 0.0"),
        ({"kind": "top-p", "top_p": 1.01}, "`top_p` 1.01"),
        ({"kind": "top-p", "top_p": math.nan}, "`top_p` nan"),
        ({"kind": "top-p", "max_entries": 0}, "`max_entries` 0: expected 1"),
        ({"kind": "threshold", "tail_threshold": 0.0}, "`tail_threshold` 0.0: expected 0.001 to 1"),
        ({"kind": "threshold", "tail_threshold": 9e-5}, "`tail_threshold` 9e-05"),
        ({"kind": "threshold", "tail_threshold": 1.5}, "`tail_threshold` 1.5"),
        ({"kind": "threshold", "tail_threshold": math.nan}, "`tail_threshold` nan"),
        ({"kind": "threshold", "samples": 0}, "`samples` 0: expected 1 to 255"),
        ({"kind": "threshold", "samples": 256}, "`samples` 256"),
        ({"kind": "threshold", "seed": -1}, "`seed` -1: expected 0 to 18446744073709551615"),
        ({"kind": "threshold", "seed": 2**64}, "`seed` 18446744073709551616"),
        ({"kind": "threshold", "tail_threshold": 1e-3, "samples": 66}, "66,001 entries"),
        ({"kind": "random", "draws": 0}, "`draws` 0: expected 1 to 255"),
        ({"kind": "random", "draws": 256}, "`draws` 256"),
        ({"temperature": 0.0}, "`temperature` 0.0"),
        ({"temperature": -1.0}, "`temperature` -1.0"),
        ({"temperature": math.nan}, "`temperature` nan"),
        ({"temperature": math.inf}, "`temperature` inf"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(rule: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TargetRule(**rule)
    assert expected in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize("tau", [1e-3, 0.013, 0.05, 0.3, 0.5, 0.9, 0.98, 0.996, 0.998, 0.9999, 1.0])
@pytest.mark.parametrize("samples", [1, 2, 6])
def test_the_codebook_holds_the_weight_and_certainty(tau: float, samples: int) -> None:
    codebook = threshold(tau, samples=samples).codebook()
    weight = np.float32(math.log(tau / samples))
    assert codebook.decode(codebook.encode([weight, 0.0])).tolist() == [weight, 0.0]


@pytest.mark.parametrize("draws", [1, 2, 50, 254, 255])
@pytest.mark.parametrize("samples", [1, 2, 255])
def test_the_codebook_holds_every_share_of_the_draws(draws: int, samples: int) -> None:
    codebook = random(draws, samples=samples).codebook()
    counts = torch.arange(1.0, draws + 1)
    found = codebook.encode((counts / (draws * samples)).log().numpy())
    assert found.tolist() == list(range(draws))
    assert np.allclose(np.exp(codebook.decode(found).astype(float)) * draws * samples, counts, rtol=1e-6)
