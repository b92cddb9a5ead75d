"""Precision of float32 products, which torch keeps as settings of the whole process.

With TF32, a GPU rounds the factors of a float32 product to 10 bits of mantissa. Training may do that; a comparison that
allows for float32 rounding may not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.utils import enable_tf32


@contextlib.contextmanager
def precision_restored() -> Iterator[None]:
    """Undoes, after the block, what it changes about the precision of float32 products.

    `TrainingArguments` switches TF32 on for the whole process, through a function that does nothing when it is called
    again. Dynamo, when it compiles, gives products a setting of their own where they had inherited it.
    """
    restore = _snapshot()
    _forget_calls()
    try:
        yield
    finally:
        restore()
        _forget_calls()


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Inside the block float32 products are computed in float32, without TF32."""
    restore = _snapshot()
    try:
        if _by_operation():
            for each in _operations():
                each.fp32_precision = "ieee"
        else:
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        restore()


def _forget_calls() -> None:
    """Else transformers, which remembers its calls, would leave TF32 off in the second run of a process."""
    getattr(enable_tf32, "cache_clear", lambda: None)()


def _by_operation() -> bool:
    """Whether torch has a setting for each kind of operation; it mixes badly with the older ones. Since torch 2.9."""
    return hasattr(torch.backends, "fp32_precision")


def _operations() -> list[Any]:
    """What has a `fp32_precision` of its own; "none" is that of `torch.backends`."""
    backends: Any = torch.backends
    return [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul]


def _snapshot() -> Callable[[], None]:
    """Restores the settings of now."""
    if not _by_operation():
        products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

        def restore_flags() -> None:
            torch.set_float32_matmul_precision(products)
            torch.backends.cudnn.allow_tf32 = convolutions

        return restore_flags

    general = torch.backends.fp32_precision
    own = [(each, each.fp32_precision) for each in _operations()]

    def restore() -> None:
        torch.backends.fp32_precision = general
        for each, before in own:
            each.fp32_precision = "none"
            if each.fp32_precision != before:  # not inherited
                each.fp32_precision = before

    return restore
