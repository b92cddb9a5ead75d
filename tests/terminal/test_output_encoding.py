"""Every command prints its result, progress and errors whatever the encoding of stdout and stderr."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from cli import main
from pipeline.commands import COMMANDS
from runs import build_cache

ENCODINGS = pytest.mark.parametrize("encoding", ["latin-1", "ascii"])


@pytest.fixture(scope="module")
def folder(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoding")
    text = folder / "text.txt"
    text.write_text("Grüße aus Århus, 東京 and 😀: a line of text.\n" * 12, encoding="utf-8")
    build_cache(folder / "café-東京", teacher_dir, text)
    return folder


def printed(encoding: str, *words: object, status: int = 0) -> Result:
    """Runs a command whose output has to be text in this encoding."""
    result = CliRunner(charset=encoding).invoke(main, [str(word) for word in words])
    assert result.exit_code == status, (result.output, result.exc_info)
    result.stdout_bytes.decode(encoding)
    result.stderr_bytes.decode(encoding)
    return result


@pytest.mark.long
@ENCODINGS
def test_results_and_progress(
    folder: Path,
    tmp_path: Path,
    teacher_dir: Path,
    student_dir: Path,
    encoding: str,
    monkeypatch: pytest.MonkeyPatch,
):
    live = Console(force_terminal=True, stderr=True, soft_wrap=True)  # with live bars
    monkeypatch.setattr("pipeline.terminal.console.err", live)
    cache, trained, files = folder / "café-東京", tmp_path / "é-東", tmp_path / "files-東"
    capture = ["--teacher", teacher_dir, "--data", folder / "text.txt", "--seq-len", 32, "--device", "cpu"]
    data = ["--cache", cache, "--eval-cache", cache, "--max-steps", 2, "--eval-steps", 1, "--device", "cpu"]
    found = {
        "cache-teacher": printed(encoding, "cache-teacher", *capture, "--output", tmp_path / "new-é-東"),
        "plan": printed(encoding, "plan", *capture, "--output", tmp_path, "--rows", 2),
        "train-student": printed(encoding, "train-student", *data, "--student", student_dir, "--output", trained),
        "evaluate": printed(encoding, "evaluate", "--cache", cache, "--student", trained, "--device", "cpu"),
        "report": printed(encoding, "report", cache, "--device", "cpu", "--output", tmp_path / "é-東.html"),
        "inspect": printed(encoding, "inspect", cache, "--positions", 64),
        "stats": printed(encoding, "stats", cache),
        "verify": printed(encoding, "verify", cache, "--against-teacher", teacher_dir, "--rows", 1, "--device", "cpu"),
        "convert": printed(encoding, "convert", cache, tmp_path / "packed-é-東", "--encoding", "packed"),
        "merge": printed(encoding, "merge", cache),
        "export": printed(encoding, "export", cache, "--output", files),
        "import": printed(encoding, "import", files, "--output", tmp_path / "é", "--tokenizer", teacher_dir),
        "push": printed(encoding, "push", cache, "東京", status=1),
        "env": printed(encoding, "env"),
        "completion": printed(encoding, "completion", "zsh"),
    }
    assert found.keys() == COMMANDS.keys()
    assert "###" in found["stats"].stdout and "< saved" in found["train-student"].stdout
    assert "loading the student" in found["train-student"].stderr and " ...\n" in found["train-student"].stderr
    assert "\\u6771" in found["merge"].stdout


@ENCODINGS
@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_errors(encoding: str, name: str):
    assert "Usage" in printed(encoding, name, "--help").stdout
    printed(encoding, name, "--東京", status=2)


@ENCODINGS
def test_json_keeps_its_text(folder: Path, encoding: str):
    words = ["stats", folder / "café-東京", "--json"]
    text = printed("utf-8", *words).stdout
    assert json.loads(printed(encoding, *words).stdout) == json.loads(text)
    assert "café-東京" in text


def test_a_path_that_is_not_text(tmp_path: Path):
    result = printed("utf-8", "verify", f"{tmp_path}/caf\udce9", status=1)
    assert "caf\\udce9" in result.stderr
