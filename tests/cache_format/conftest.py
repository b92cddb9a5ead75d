"""The rows of `cache_samples` obey every rule of the format, but are random numbers and no distributions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cache_format import remote, verify


@pytest.fixture(autouse=True, scope="module")  # before the caches that modules share
def numbers_need_not_be_plausible() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "find_implausible", lambda *_: None)
        yield


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two attempts to reach a store."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote, "LONGEST_WAIT_S", 0.01)
