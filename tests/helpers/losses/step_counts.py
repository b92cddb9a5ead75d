"""What a training step asks of a GPU, counted without one: on tensors of the meta device, which have no values.

A synchronisation is an operation that makes the host wait for the device: reading a value (`item`, `bool`, `tolist`),
finding places (`nonzero`, boolean masks), and copying between host and device without `non_blocking`. On the meta
device such operations have no answer; the mode gives one, counts, and goes on.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
ONE_HOST_VALUE = {aten._local_scalar_dense.default, aten.equal.default}
FIND_PLACES = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default}
COPIES = {aten._to_copy.default, aten.copy_.default}


class Synchronisations(TorchDispatchMode):
    """Counts operations that wait for the device, by "operation at file:function" of the innermost Python frame outside
    of torch.

    Attributes:
        found: the counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_device = any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves((args, kwargs)))
        if on_device and func in ONE_HOST_VALUE:
            self._add(func)
            return True
        if on_device and func in FIND_PLACES:
            self._add(func)
            return torch.empty((args[0].numel(), max(1, args[0].dim())), dtype=torch.int64, device="meta")
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) and on_device:
            if any(x is not None and x.dtype == torch.bool for x in args[1]):
                self._add(func)
        result = func(*args, **kwargs)
        if func in COPIES and not kwargs.get("non_blocking") and _crosses(args, result):
            self._add(func)
        return result

    def _add(self, func: Any) -> None:
        frames = [f for f in traceback.extract_stack()[:-2] if "/torch/" not in f.filename]
        where = frames[-1] if frames else None
        name = "?" if where is None else f"{Path(where.filename).name}:{where.name}"
        self.found[f"{func} at {name}"] += 1


@contextlib.contextmanager
def meta_as_a_gpu() -> Iterator[None]:
    """Inside the block autocast, which does not know the meta device, takes it for a GPU."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled

    def named(device_type: str) -> str:
        return "cuda" if device_type == "meta" else device_type

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda kind, *a, **k: autocast(named(kind), *a, **k))
        patch.setattr(torch, "is_autocast_enabled", lambda kind="cuda": enabled(named(kind)))
        yield


def _crosses(args: Any, result: Any) -> bool:
    """Whether one of the tensors is on the host and one on the device."""
    places = {x.is_meta for x in tree_leaves((args, result)) if isinstance(x, Tensor)}
    return len(places) == 2
