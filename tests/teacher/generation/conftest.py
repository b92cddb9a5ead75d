"""Set-up of tests whose runs have several groups of answers: PROMPTS and PER_GROUP are theirs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.teacher.generation import answering
from tiny import completions, write_jsonl


@pytest.fixture(scope="module")
def small_groups(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answering, "LEAST_PER_GROUP", request.module.PER_GROUP)
        patch.setattr(answering, "BATCHES_PER_GROUP", 1)
        yield


@pytest.fixture(scope="module")
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, small_groups: None) -> Path:
    """Prompts with reference answers and a number."""
    records = [{**record, "number": i} for i, record in enumerate(completions(request.module.PROMPTS))]
    return write_jsonl(tmp_path_factory.mktemp("data") / "prompts.jsonl", records)
