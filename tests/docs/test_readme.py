"""Every command and every Python block of the README runs, in order, in a directory that has what they name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pages import ROOT, blocks, commands, distill, linked_files, text
from tiny import completions, conversations, english, tiny_llama, tiny_tokenizer, write_jsonl

PAGE = "README.md"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the README's commands name."""
    root = tmp_path_factory.mktemp("readme")
    tokenizer = tiny_tokenizer()
    for folder in ("models", "data", "demo-output/caches"):
        (root / folder).mkdir(parents=True)
    tiny_llama(root / "models/teacher", tokenizer, layers=2, hidden=32)
    tiny_llama(root / "models/student", tokenizer, layers=1, hidden=16, seed=1)
    tiny_llama(root / "demo-output/teacher", tokenizer, layers=8, hidden=32)
    write_jsonl(root / "data/chats.jsonl", conversations(60))
    write_jsonl(root / "data/heldout.jsonl", conversations(8, seed=1))
    write_jsonl(root / "demo-output/train.jsonl", conversations(20))
    write_jsonl(root / "demo-output/heldout.jsonl", completions(8))
    (root / "data/book.txt").write_text(english(40), encoding="utf-8")
    config = json.loads((root / "models/student/config.json").read_text())
    (root / "data/config.json").write_text(json.dumps(config))
    (root / "data/args.json").write_text(json.dumps({"learning_rate": 1e-3, "max_grad_norm": 0.5}))
    return root


@pytest.mark.timeout(240)
def test_every_command_and_block_runs(
    sandbox: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(sandbox)
    # The first screen trains with a held-out cache that `make demo` has made before.
    distill(["cache-teacher", "--teacher", "demo-output/teacher", "--data", "demo-output/heldout.jsonl"]
        + ["--output", "demo-output/caches/heldout", "--seq-len", "64", "--targets", "hidden"])  # fmt: skip
    ran = [words[1] for words in commands(PAGE) if words[0] == "distill" and distill(words[1:])]
    stages = {"plan", "cache-teacher", "train-student", "evaluate"}
    assert set(ran) == stages | {"inspect", "stats", "verify", "convert", "merge"}
    python = blocks(PAGE, "python")
    assert len(python) >= 3
    for block in python:
        exec(compile(block, PAGE, "exec"), {})
    loss, same = map(float, capsys.readouterr().out.split()[:2])
    assert loss == pytest.approx(same, rel=1e-5)


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", text(PAGE)))
    assert named and named <= targets


def test_no_command_but_known_ones() -> None:
    assert {words[0] for words in commands(PAGE)} <= {"distill", "make", "pip"}


def test_every_file_it_names_exists() -> None:
    named = linked_files(PAGE)
    assert len(named) > 20
    assert [name for name in set(named) if not (ROOT / name).exists()] == []


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in text(PAGE)
