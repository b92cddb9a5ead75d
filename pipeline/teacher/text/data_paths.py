"""Stub."""

from __future__ import annotations

from typing import Any


def check_data_path(name: Any) -> None:
    """To come."""
