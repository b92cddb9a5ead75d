"""Every command and every Python block of the README runs, in order, in a directory that has the files they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pages import ROOT, blocks, commands, linked_files, play, text
from tiny import conversations, tiny_llama, tiny_tokenizer, write_jsonl

PAGE = "README.md"


@pytest.mark.timeout(240)
def test_every_command_and_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("models", "data"):
        (tmp_path / folder).mkdir()
    tiny_llama(tmp_path / "models/teacher", tiny_tokenizer(), layers=2, hidden=32)
    tiny_llama(tmp_path / "models/student", tiny_tokenizer(), layers=1, hidden=16, seed=1)
    write_jsonl(tmp_path / "data/chats.jsonl", conversations(60))
    write_jsonl(tmp_path / "data/heldout.jsonl", conversations(8, seed=1))
    monkeypatch.chdir(tmp_path)
    assert {words[1] for words in play(PAGE)} == {"cache-teacher", "train-student", "evaluate"}
    assert len(blocks(PAGE, "python")) == 1
    assert (tmp_path / "students/python/config.json").exists()


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", text(PAGE)))
    assert named and named <= targets


def test_no_command_but_known_ones() -> None:
    assert {words[0] for words in commands(PAGE)} == {"distill", "make", "pip"}


def test_every_file_it_names_exists() -> None:
    named = linked_files(PAGE)
    assert len(named) > 20
    assert [name for name in set(named) if not (ROOT / name).exists()] == []


def test_every_folder_in_the_tree_exists() -> None:
    (tree,) = re.findall(r"^## The tree\n\n((?: {4}.*\n)+)", text(PAGE), flags=re.MULTILINE)
    parent, listed = Path(), set()
    for indent, name in re.findall(r"^ {4}( *)([\w./]+)", tree, flags=re.MULTILINE):
        path = parent / name if indent else Path(name)
        parent = parent if indent else path
        assert (ROOT / path).exists(), path
        listed.add(path.as_posix())
    packages = {
        file.parent.relative_to(ROOT).as_posix()
        for top in ("distill", "pipeline", "cache_format")
        for file in [ROOT / top / "__init__.py", *(ROOT / top).glob("*/__init__.py")]
    }
    assert packages <= listed
