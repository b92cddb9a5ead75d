"""Functions compiled by numba when their module is imported, and kept for the next process where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., object])
UNUSABLE = (OSError, RuntimeError, EOFError)  # a cache of compiled code without a writable place, or cut short


def compiled(returned: str, *arguments: str, **options: Any) -> Callable[[Function], Function]:
    """Args:
    returned, arguments: types, as numba reads them.
    options: of `numba.njit`.
    """
    signature: Any = f"{returned}({', '.join(arguments)})"

    def decorated(function: Function) -> Function:
        try:
            fast: Function = numba.njit(signature, nogil=True, cache=True, **options)(function)
        except UNUSABLE:
            fast = numba.njit(signature, nogil=True, **options)(function)
        return fast

    return decorated
