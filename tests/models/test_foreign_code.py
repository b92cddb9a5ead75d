"""Code that comes with a cache or a configuration is not run, and the user is not asked whether to run it."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cli import main
from made_up import made_up
from pipeline.errors import ConfigError
from pipeline.student.model.initialization import load_student

TOKENIZER = {"tokenizer_class": "Foreign", "auto_map": {"AutoTokenizer": ["foreign.Foreign", None]}}


@pytest.fixture
def foreign_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[bytes]:
    """A module that leaves a file behind when it is run; every question is answered with yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    trace = tmp_path / "executed"
    yield (
        f"open({str(trace)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizer, PreTrainedModel\n"
        "class Foreign(PreTrainedTokenizer): pass\n"
    ).encode()
    assert not trace.exists()


def invoke(*words: object) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


COMMANDS: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "inspect": lambda cache, student: ("inspect", cache),
    "train-student": lambda cache, student: (
        *("train-student", "--cache", cache, "--student", student, "--device", "cpu"),
        *("--output", cache.parent / "student", "--trust-remote-code"),
    ),
    "evaluate": lambda cache, student: ("evaluate", "--cache", cache, "--student", student, "--trust-remote-code"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tokenizer_that_needs_code_is_refused(command: str, foreign_code: bytes, student_dir: Path, tmp_path: Path):
    """Even with `--trust-remote-code`, which is about the student and not about files of a cache."""
    files = {"tokenizer_config.json": json.dumps(TOKENIZER).encode(), "foreign.py": foreign_code}
    cache = tmp_path / "cache"
    made_up(cache, 4, tokenizer_files=files)
    result = invoke(*COMMANDS[command](cache, student_dir))
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if "tokenizer" in line]
    assert f"{cache}: its tokenizer cannot be loaded: it needs custom code" in line


@pytest.mark.parametrize(
    "data", [b"{}", b"[1]", b'{"model": {"type": "BPE"}}', b'{"version": "1.0", "model": 3}', b"\xff", b"[" * 9999]
)
def test_a_broken_tokenizer_is_an_error_in_one_line(data: bytes, tmp_path: Path):
    cache = tmp_path / "cache"
    made_up(cache, 4, tokenizer_files={"tokenizer.json": data})
    result = invoke("inspect", cache)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert f"{cache}: its tokenizer cannot be loaded: " in line


def test_the_code_of_a_configuration_is_not_run(foreign_code: bytes, tmp_path: Path):
    """The type of model is known to transformers, but not as a language model."""
    config = {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "foreign.Foreign"}}
    (tmp_path / "config.json").write_text(json.dumps({**config, "name_or_path": str(tmp_path)}))
    (tmp_path / "foreign.py").write_bytes(foreign_code)
    with pytest.raises(ConfigError, match="no causal or masked language model can be built"):
        load_student(None, config_file=str(tmp_path), vocab_size=400, seed=0)
    with pytest.raises(ConfigError, match="no causal or masked language model can be built"):
        load_student(str(tmp_path), random=True, vocab_size=400, seed=0)
