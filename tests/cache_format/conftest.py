"""The rows of `cache_samples` obey every rule of the format, but are random numbers and no distributions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_format.read import verify
from cache_format.storage import remote
from converting import one_of_each, write_three_samples


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
    sleep = asyncio.sleep  # by s3fs and botocore, which try again on their own
    monkeypatch.setattr(asyncio, "sleep", lambda delay, *result: sleep(min(delay, 0.01), *result))


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each kind of targets. Do not write into them."""
    return one_of_each(tmp_path_factory.mktemp("caches"))


@pytest.fixture(scope="module")
def three_samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of threshold targets. Do not write into it."""
    return write_three_samples(tmp_path_factory.mktemp("three") / "cache")
