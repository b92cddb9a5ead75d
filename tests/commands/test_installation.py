"""`distill env` and `distill completion`: what a bug report says, and what a shell is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from cli import main
from pipeline.commands.installation import environment
from pipeline.models.devices import cpu_dtype
from runs import command as run

ROOT = Path(__file__).resolve().parents[2]


# -- env --------------------------------------------------------------------------------------------------------------


def test_a_bug_report_has_versions_devices_and_places(tmp_path: Path):
    result = run("env", "--json", tmp_path / "env.json")
    found = json.loads((tmp_path / "env.json").read_text())
    assert found["packages"]["torch"] in result.stdout and found["python"] in result.stdout
    assert {"sdpa", "eager"} <= set(found["attention"]) and found["devices"] == []  # the tests hide GPUs
    assert found["cpu"]["cores"] == os.cpu_count() and found["cpu_capability"]
    assert set(found["places"]) == {"distill code", "hub cache", "datasets cache"}
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_bug_report_has_no_names_and_no_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    monkeypatch.setenv("LOGNAME", "alice")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "alice/hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path("/scratch/alice/data"))
    text = run("env", "--json").stdout
    assert "alice" not in text and "hf_secret" not in text
    assert json.loads(text)["places"] | {"distill code": ""} == {
        "distill code": "",
        "hub cache": "~/hub",
        "datasets cache": "/scratch/USER/data",
    }


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "amx_tile": False}, "avx2, avx512_f (torch uses"),
        ({"sse4_2": True}, "no vector instructions beyond the CPU's baseline (torch uses"),
        ({}, "not listed by this version of torch (torch uses"),
    ],
)
def test_instructions_of_the_cpu_are_named(features: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert expected in " ".join(run("env").stdout.split())


@pytest.mark.parametrize(
    ("in_hardware", "expected"),
    [(True, "auto: float32, or bfloat16 where"), (False, "auto: float32, since the CPU has neither AMX nor AVX512")],
)
def test_the_dtype_of_this_cpu_is_explained(in_hardware: bool, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_dtype, "multiplies_bfloat16", lambda: in_hardware)
    assert expected in " ".join(run("env").stdout.split())


def test_a_library_that_does_not_load_is_reported(monkeypatch: pytest.MonkeyPatch):
    def broken() -> dict[str, object]:
        raise OSError("libcudart.so.12: cannot open shared object file\nmore")

    monkeypatch.setattr(environment, "_of_torch", broken)
    assert "OSError: libcudart.so.12: cannot open" in run("env").stdout
    assert json.loads(run("env", "--json").stdout)["error"].startswith("OSError: libcudart")


# -- completion -------------------------------------------------------------------------------------------------------


def completed(*words: str) -> list[str]:
    """What bash is offered for the last word: `plain,VALUE` or `file,`."""
    line = {"_DISTILL_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(("distill", *words))}
    result = CliRunner().invoke(main, prog_name="distill", env={**line, "COMP_CWORD": str(len(words))})
    return result.stdout.split()


def test_commands_options_choices_and_paths_are_completed():
    assert completed("ver") == ["plain,verify"] and "plain,train-student" in completed("")
    assert completed("train-student", "--kd-s") == ["plain,--kd-schedule"]
    assert completed("train-student", "--no-pad") == ["plain,--no-padding-free"]
    assert completed("train-student", "--position-weighting", "t") == ["plain,teacher-entropy"]
    for words in (["train-student", "--cache"], ["stats"], ["report"], ["import"], ["evaluate", "--student"]):
        assert completed(*words, "ca") == ["file,ca"], words
    assert completed("completion", "z") == ["plain,zsh"]


def test_help_beside_a_completion_names_flags():
    line = {"_DISTILL_COMPLETE": "zsh_complete", "COMP_WORDS": "distill train-student --kd-s", "COMP_CWORD": "2"}
    text = CliRunner().invoke(main, prog_name="distill", env=line).stdout
    assert "Replaces --kd-weight" in text and "`" not in text


def test_completing_after_help_all_prints_completions_alone():
    assert completed("train-student", "--help-all", "--kd-s") == ["plain,--kd-schedule"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_valid_and_ask_distill(shell: str, tmp_path: Path):
    script = tmp_path / "script"
    script.write_text(run("completion", shell).stdout)
    assert "_DISTILL_COMPLETE=" in script.read_text()
    if shutil.which(shell):
        subprocess.run([shell, "-n", script], check=True)


def test_completing_loads_no_heavy_library():
    code = """
import sys
from pipeline.commands import main
try:
    main(prog_name="distill")
finally:
    print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'pyarrow', 'rich'} & set(sys.modules)))
"""
    line = {"_DISTILL_COMPLETE": "bash_complete", "COMP_WORDS": "distill train-student --kd-s", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **line}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split("\n")[:2] == ["plain,--kd-schedule", "[]"], done.stderr
