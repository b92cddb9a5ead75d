"""Predicates by import path, in a session that edits them."""

from __future__ import annotations

import hashlib
import importlib
import sys
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.teacher.generation.predicates import load_predicate


def test_a_module_that_was_changed_since_it_was_imported_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "changed_checks.py"
    file.write_text("def ok(example, answer):\n    return 1\n")
    importlib.import_module("changed_checks")  # by the user, not by a run
    for value in (2, 3):  # the same size and, for all that a file system may know, the same time
        file.write_text(f"def ok(example, answer):\n    return {value}\n")
        predicate = load_predicate("changed_checks:ok")
        assert predicate.function({}, None) == value  # type: ignore[arg-type]
        assert predicate.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert load_predicate("changed_checks:ok").function is predicate.function
    file.write_text("def fine(example, answer):\n    return 4\n")
    with pytest.raises(ConfigError, match="found nothing of that name in changed_checks"):
        load_predicate("changed_checks:ok")
    del sys.modules["changed_checks"]
