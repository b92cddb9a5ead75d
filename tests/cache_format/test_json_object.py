"""Damaged JSON files are errors that name the file, what was expected and the next step."""

from __future__ import annotations

import pytest

import cache_format as cf
from cache_format.json_object import json_object

DAMAGED = {
    b"": "the file is empty",
    b'{"a": 1, "b': "not JSON",
    b"\xff\xfe{": "not JSON",
    b"[1, 2]": "found a list",
    b"[" * 100_000: "not JSON",
}


@pytest.mark.parametrize("data", DAMAGED, ids=list(DAMAGED.values()))
def test_damaged_files_are_named(data: bytes):
    with pytest.raises(cf.FormatError) as raised:
        json_object(data, "run/state.json", expected="a state", next_step="Restore it.", error=cf.FormatError)
    message = str(raised.value)
    assert message.startswith(f"run/state.json: {DAMAGED[data]}") and message.endswith("expected a state. Restore it.")


def test_objects_are_read():
    assert json_object(b'{"a": [1]}', "f", expected="", next_step="", error=cf.FormatError) == {"a": [1]}
