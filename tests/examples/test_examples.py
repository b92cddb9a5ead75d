"""Every script and notebook in examples/ runs with tiny models, without a network."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

from pages import ROOT
from pipeline.teacher.targets.rules import TargetRule
from runs import build_cache, train
from tiny import write_jsonl

EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.fixture(scope="module")
def made(teacher_dir: Path, student_dir: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, a held-out cache, prompts, and two trained students."""
    folder = tmp_path_factory.mktemp("examples")
    cache = build_cache(folder / "train", teacher_dir, chat_file, targets=TargetRule())
    build_cache(folder / "heldout", teacher_dir, chat_file)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"{i} and {i} is"} for i in range(4)])
    for name, kd_weight in (("labels", 0.0), ("distilled", 0.9)):
        options = {"eval_cache": str(cache), "max_steps": 2, "eval_steps": 1, "kd_weight": kd_weight}
        train(folder / name, cache, student=student_dir, **options)
    return folder


def run_script(name: str, monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    words = [str(word) for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.long
def test_ten_lines(
    made: Path, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = {"prompts": made / "prompts.jsonl", "held_out": made / "prompts.jsonl"}
    run_script("ten_lines.py", monkeypatch, teacher=teacher_dir, layers=1, output=tmp_path, **prompts)
    assert re.search(r"trained for \d+ steps: KL to the teacher \d", capsys.readouterr().out)


def test_custom_loss(
    made: Path, student_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "student"
    run_script("custom_loss.py", monkeypatch, cache=made / "train", student=student_dir, output=output, steps=2)
    assert "step 2: loss " in capsys.readouterr().out and (output / "model.safetensors").exists()


def test_own_data(
    teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script("own_data.py", monkeypatch, teacher=teacher_dir, output=tmp_path / "cache", count=6)
    assert "tokens are loss tokens" in capsys.readouterr().out


@pytest.mark.long
def test_compare_students(
    made: Path, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    caches = {"cache": made / "train", "held_out": made / "heldout"}
    run_script("compare_students.py", monkeypatch, student=teacher_dir, layers=1, steps=1, output=tmp_path, **caches)
    rows = re.findall(r"^ +(0\.[059])  +\d+\.\d+ ± ", capsys.readouterr().out, flags=re.MULTILINE)
    assert rows == ["0.0", "0.5", "0.9"] and (tmp_path / "report.html").exists()


def test_reading_without_torch(made: Path) -> None:
    script = EXAMPLES / "read_without_torch.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), "--cache", str(made / "train")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.count("mean entropy") == 3, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_CACHE", str(made / ("train" if "cache" in path.stem else "heldout")))
    monkeypatch.setenv("DISTILL_STUDENTS", f"{made / 'labels'} {made / 'distilled'}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=100, resources={"metadata": {"path": str(tmp_path)}}).execute()
    kinds = [kind for cell in notebook.cells for out in cell.get("outputs", ()) for kind in out.get("data", ())]
    assert kinds.count("image/png") == 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []


def test_the_index_lists_every_example() -> None:
    listed = re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(file.name for file in EXAMPLES.iterdir() if file.suffix in (".py", ".ipynb"))
