"""The rows of `cache_samples` obey every rule of the format, but are random numbers and no distributions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cache_format import verify


@pytest.fixture(autouse=True, scope="module")  # before the caches that modules share
def numbers_need_not_be_plausible() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "find_implausible", lambda *_: None)
        yield
