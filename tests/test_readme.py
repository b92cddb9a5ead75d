"""Every command and every Python block of the README runs, in order, in a directory that has what they name."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from tiny import completions, conversations, english, tiny_llama, tiny_tokenizer, write_jsonl

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("console") for line in block.splitlines()]
    return [shlex.split(line.removeprefix("$ ")) for line in lines if line.startswith("$ ")]


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


@pytest.fixture()
def run(sandbox: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(sandbox)

    def run(words: list[str]) -> str:
        from cli import main

        result = CliRunner().invoke(main, words, catch_exceptions=False)
        assert result.exit_code == 0, f"distill {shlex.join(words)}: {result.output}"
        return result.output

    return run


@pytest.mark.timeout(240)
def test_every_command_and_block_runs(run, capsys: pytest.CaptureFixture[str]) -> None:
    # The first screen trains with a held-out cache that `make demo` has made before.
    run(["cache-teacher", "--teacher", "demo-output/teacher", "--data", "demo-output/heldout.jsonl"]
        + ["--output", "demo-output/caches/heldout", "--seq-len", "64"])  # fmt: skip
    ran = [words[1] for words in commands() if words[0] == "distill" and run(words[1:])]
    commands_of = {"plan", "cache-teacher", "train-student", "evaluate", "inspect", "stats", "verify", "convert"}
    assert set(ran) == commands_of
    python = blocks("python")
    assert len(python) >= 3
    for block in python:
        exec(compile(block, "README.md", "exec"), {})
    loss, same = map(float, capsys.readouterr().out.split()[:2])
    assert loss == pytest.approx(same, rel=1e-5)


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", README))
    assert named and named <= targets


def test_no_command_but_known_ones() -> None:
    assert {words[0] for words in commands()} <= {"distill", "make", "pip"}


def test_every_file_it_names_exists() -> None:
    linked = re.findall(r"\]\(([^)#:]+)\)", README)
    tree = re.findall(r"\b((?:pipeline|cache_format|benchmarks)/[\w/.-]*\w|cli\.py)", README)
    assert linked and tree
    missing = [name for name in {*linked, *tree} if not (ROOT / name).exists()]
    assert not missing


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in README
