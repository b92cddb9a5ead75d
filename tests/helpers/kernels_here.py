"""The Triton kernels, run on the CPU by Triton's interpreter, which `conftest` asks for.

Importing this module skips the test file that does so where Triton is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which torch's builds for CUDA bring")

from pipeline.models.devices import kernels, triton_kernels  # noqa: E402

DEVICE = torch.device("cpu")


@contextmanager
def kernels_in_use(module: ModuleType | None = triton_kernels) -> Iterator[None]:
    """Inside the block all logits go through the kernels; through plain torch if `module` is None."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "triton_kernels", lambda device: module)
        yield
