"""The store of unfinished answers: damaged settings."""

from __future__ import annotations

from pathlib import Path

import pytest

import cache_format as cf
from pipeline.teacher.generation.answer_store import SETTINGS, AnswerStore

MADE_WITH = {"prompts": {"prompts": 3}, "seed": 1}
DAMAGED = ["", '{"prompts": {', "[]"]


def stored(folder: Path) -> AnswerStore:
    store = AnswerStore(str(folder / "cache.answers"))
    with store:
        store.open(MADE_WITH, replace=False, allow_rounding=False)
    return store


@pytest.mark.parametrize("contents", DAMAGED)
def test_damaged_settings_are_named(contents: str, tmp_path: Path):
    store = stored(tmp_path)
    assert store.prompts() == MADE_WITH["prompts"]
    (tmp_path / "cache.answers" / SETTINGS).write_text(contents)
    for read in (store.prompts, lambda: store.open(MADE_WITH, replace=False, allow_rounding=False)):
        with pytest.raises(cf.CacheError, match=r"cache\.answers/settings\.json: .*expected the settings.*`overwrite`"):
            read()


@pytest.mark.parametrize("contents", DAMAGED)
def test_overwriting_replaces_damaged_settings_and_their_answers(contents: str, tmp_path: Path):
    store, folder = stored(tmp_path), tmp_path / "cache.answers"
    (folder / SETTINGS).write_text(contents)
    (folder / "group-00000-0123456789abcdef.arrow").write_bytes(b"")
    with store:
        store.open(MADE_WITH, replace=True, allow_rounding=False)
    assert store.prompts() == MADE_WITH["prompts"] and not list(folder.glob("group-*"))
