"""SPEC.md names every file that a cache may have, and says what every key means whose type it gives."""

from __future__ import annotations

import re
from pathlib import Path

import cache_format
from cache_format.write.occupancy import BESIDE

SPEC = (Path(cache_format.__file__).parent / "SPEC.md").read_text(encoding="utf-8")


def test_the_directory_lists_every_file() -> None:
    (directory,) = re.findall(r"^## 2\. Directory\n\n((?: {4}.*\n)+)", SPEC, flags=re.MULTILINE)
    assert [name for name in BESIDE if name not in directory] == []


def test_every_key_with_a_type_has_a_meaning() -> None:
    (types,) = re.findall(r"\| type \| keys \|\n(?:\|.*\n)+", SPEC)
    keys = re.findall(r"`\.?(?:\w+\.)*(\w+)`", types)
    assert {"positions", "packing", "sha256"} <= set(keys)
    meanings = set(re.findall(r"\w+", SPEC.replace(types, "")))
    assert [key for key in keys if key not in meanings] == []
