"""The kernels of numba, and those of Triton, run on the CPU by Triton's interpreter, which `conftest` asks for.

Importing this module skips the test file that does so where one of them is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which torch's builds for CUDA bring")

pytest.importorskip("numba", reason="needs numba: pip install distill[fast]")

from pipeline.models.devices import kernels, numba_kernels, triton_kernels  # noqa: E402

DEVICE = torch.device("cpu")
KERNELS = {"triton": triton_kernels, "numba": numba_kernels}
_chosen: list[ModuleType] = []


@pytest.fixture(name="chosen", params=KERNELS.values(), ids=KERNELS)
def chosen_kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The kernels that `kernels_in_use` takes: first one kind, then the other."""
    _chosen.append(request.param)
    yield request.param
    _chosen.pop()


@contextmanager
def kernels_in_use(*, plain: bool = False) -> Iterator[None]:
    """Inside the block all logits that the `chosen` kernels take go through them; through plain torch if `plain`."""
    module = None if plain else _chosen[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "kernels_on", lambda device, width: module)
        yield
