"""The wheel is what people install: build it, install it elsewhere, run it from somewhere else.

The new environment holds the wheel alone. Its dependencies are those of the environment that runs
the tests, lent through a `.pth` file, since installing torch once more would take minutes. That all
of them are declared is the business of `test_architecture.py`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["cache_format", "distill", "pipeline"]
SOURCES = ["pyproject.toml", "README.md", "LICENSE", *PACKAGES]

pytestmark = pytest.mark.timeout(300)
# Without the tests' import path: pip would take the checkout for an installation.
OUTSIDE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] = OUTSIDE) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    shown = " ".join(str(part) for part in command)
    assert done.returncode == 0, f"{shown}: exit status {done.returncode}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built from a copy: setuptools leaves a build/ behind, and would pack what lies in an old one.
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    # Without isolation the build takes setuptools from this environment, and needs no network.
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    run(*build, "--outdir", out, source, cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel installed; returns its root."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False, symlinks=os.name != "nt")
    python = root / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", wheel, cwd=root)
    # Only now: before, pip would have seen the checkout's own editable installation through it.
    (site,) = root.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return root


@pytest.fixture
def elsewhere(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A working directory that holds nothing, and the environment."""
    # Rich asks these for the width and the colours of the help page.
    return tmp_path, OUTSIDE | {"COLUMNS": "100", "NO_COLOR": "1"}


def test_wheel_holds_the_modules_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in ROOT.glob(f"{name}/**/*.py")}
    packed = {name for name in names if ".dist-info/" not in name}
    # The normative page of the format travels with the code that implements it.
    template = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pipeline/evaluation/report/template").iterdir()}
    assert len(template) == 4
    typed = {f"{name}/py.typed" for name in PACKAGES}
    assert packed == {*modules, *template, *typed, "cache_format/SPEC.md"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_is_imported_from_where_it_was_installed(environment: Path, elsewhere):
    directory, variables = elsewhere
    code = (
        "import cache_format, distill, pipeline, importlib.metadata as metadata;"
        "print(cache_format.__file__, distill.__file__, pipeline.__file__, sep='\\n');"
        "print(metadata.version('distill'))"
    )
    *files, version = run(environment / "bin/python", "-c", code, cwd=directory, env=variables).splitlines()
    for file in files:
        assert Path(file).is_relative_to(environment)
    assert version == importlib.metadata.version("distill")


TYPED = """
import distill


class OwnError(distill.ConfigError):
    pass


def steps() -> None:
    run = distill.train_student("caches/train", "models/student", "students/first", max_steps=2)
    row = distill.open_cache("caches/train")[0]
    reveal_type(run)
    reveal_type(distill.sparse_kl)
    reveal_type(row.targets)
    print(run.steps_done)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)  # mypy reads torch and transformers
def test_a_type_checker_knows_what_functions_return(environment: Path, elsewhere):
    directory, variables = elsewhere
    (directory / "script.py").write_text(TYPED)
    options = ["--strict", "--no-incremental", "--follow-imports=silent", "--python-executable"]
    command = [sys.executable, "-m", "mypy", *options, environment / "bin/python", "script.py"]
    done = subprocess.run(command, cwd=directory, env=variables, capture_output=True, text=True)
    assert '"pipeline.student.training.train.TrainSummary"' in done.stdout, done.stdout + done.stderr
    assert '"TrainSummary" has no attribute "steps_done"' in done.stdout
    assert "Tensor" in done.stdout and '"cache_format.rows.types.SparseTargets"' in done.stdout
    assert "Found 1 error in 1 file" in done.stdout, done.stdout


SCRIPT = """
import distill

teacher, data, student = {teacher!r}, {data!r}, {student!r}
distill.cache_teacher(teacher, data, "caches/train", top_k=8, seq_len=64, device="cpu")
distill.train_student("caches/train", student, "students/first", max_steps=2, seed=3, device="cpu")
print(distill.evaluate("caches/train", "students/first", device="cpu").kl)
"""

CONFIG = """
cache = "caches/train"
student = {student!r}
output = "students/second"
max-steps = 2
seed = 3
device = "cpu"
"""


@pytest.mark.slow
def test_wheel_runs_from_another_directory(
    environment: Path, elsewhere, teacher_dir: Path, student_dir: Path, text_file: Path
):
    """The ten-line script of docs/python.md, its student again by command and `--config`, and a report on the two."""
    directory, variables = elsewhere

    def distill(*options: str | Path) -> str:
        return run(environment / "bin/distill", *options, cwd=directory, env=variables)

    assert importlib.metadata.version("distill") in distill("--version")
    assert "cache-teacher" in distill("--help")
    names = {"teacher": str(teacher_dir), "data": str(text_file), "student": str(student_dir)}
    (directory / "script.py").write_text(SCRIPT.format(**names))
    (directory / "run.toml").write_text(CONFIG.format(**names))
    printed = run(environment / "bin/python", "script.py", cwd=directory, env=variables)
    assert float(printed) > 0 and len(printed.splitlines()) == 1
    distill("train-student", "--config", "run.toml")
    first, second = (directory / "students" / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    report = ["report", "caches/train", "--student", "students/second", "--device", "cpu", "--json"]
    assert json.loads(distill(*report))["bytes"] > 10_000
