"""The Triton kernels, run on the CPU by Triton's interpreter, which `conftest` asks for.

Importing this module skips the test file that does so where Triton is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which torch's builds for CUDA bring")


from pipeline.models.devices import kernels, triton_kernels  # noqa: E402

DEVICE = torch.device("cpu")


@contextmanager
def kernels_in_use(*, plain: bool = False) -> Iterator[None]:
    """Inside the block all logits that the kernels take go through them; through plain torch if `plain`."""
    module = None if plain else triton_kernels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "kernels_on", lambda device: module)
        yield
