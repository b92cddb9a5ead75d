"""Tokenised text of each test apart, so that none finds that of another."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest


@pytest.fixture(autouse=True)
def tokenised_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tokenised text is kept."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "tokenised"))
    return tmp_path / "tokenised" / "distill"
