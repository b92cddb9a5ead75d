"""Stub."""

from __future__ import annotations

from typing import Any


def check_model_path(name: Any) -> None:
    """To come."""
