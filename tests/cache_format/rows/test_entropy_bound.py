"""Targets made from lists: a lower bound in place of the entropy, and what the manifest says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cache_format as cf
from made_up import TOP_K, made_up


@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_the_bound_is_the_entropy_of_entries_and_tail(seed: int, kept: int):
    """At most the entropy of the full distribution, and equal to it if the tail is one token or none."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(30, 0.3), 4)
    p = np.sort(p, axis=1)[:, ::-1] + 1e-12
    full = -(p * np.log(p)).sum(axis=1)
    tail = np.maximum(1 - p[:, :kept].sum(axis=1), 0)
    with np.errstate(divide="ignore"):
        bound = cf.entropy_lower_bound(np.repeat(np.arange(4), kept), np.log(p[:, :kept]).ravel(), np.log(tail))
    assert (bound <= full + 1e-5).all() and (bound >= 0).all()
    if kept >= 29:
        np.testing.assert_allclose(bound, full, atol=1e-5)


def test_no_entries_and_no_tail():
    assert cf.entropy_lower_bound(np.zeros(0, int), np.zeros(0), np.array([0.0, -np.inf])).tolist() == [0.0, 0.0]


def test_the_manifest_says_what_is_not_known(tmp_path: Path):
    plain = made_up(tmp_path / "plain", rows=2)
    assert plain.metadata.entropy_known and not plain.metadata.renormalised
    told = made_up(tmp_path / "told", rows=2, targets={**TOP_K, "entropy": "lower-bound", "renormalised": True})
    assert not told.metadata.entropy_known and told.metadata.renormalised
    assert told.manifest.metadata.format_version == plain.manifest.metadata.format_version == 1


@pytest.mark.parametrize(
    "fact", [{"entropy": "about"}, {"entropy": True}, {"renormalised": 1}, {"renormalised": "yes"}]
)
def test_other_values_are_refused(fact: dict[str, Any], tmp_path: Path):
    with pytest.raises(ValueError, match=f"targets.{next(iter(fact))} is"):
        made_up(tmp_path / "cache", rows=2, targets={**TOP_K, **fact})
