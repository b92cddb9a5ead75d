"""Set-up shared by the tests of servers, fake and real."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.teacher.engines.server import http_client
from tiny import write_jsonl


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits hardly at all before a request is repeated."""
    monkeypatch.setattr(http_client, "FIRST_WAIT_S", 0.001)


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Characters of several tokens each, alone, repeated, at the beginning and at the end."""
    texts = ["東京東京 is 10°C", "ααα and ααα", "“far too small”", "plain words", "a 😀😀"]
    return write_jsonl(tmp_path_factory.mktemp("text") / "letters.jsonl", [{"text": text} for text in texts])
