"""The Triton kernels on this machine: compiled where there is a GPU, elsewhere run by Triton's interpreter on the CPU.

Importing this module skips the test file that does so where Triton is not installed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton, and then the module of the kernels, is imported
pytest.importorskip("triton", reason="needs Triton, which torch's builds for CUDA bring")

from pipeline.models.devices import kernels, triton_kernels  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def kernels_in_use(module: ModuleType | None = triton_kernels) -> Iterator[None]:
    """Inside the block all logits go through the kernels; through plain torch if `module` is None."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "triton_kernels", lambda device: module)
        yield
