"""The rules that keep the tree readable, held by a test instead of by memory.

    distill, pipeline/commands -> pipeline -> cache_format -> numpy, pyarrow, zstandard, fsspec

One direction only, the two stages apart; only commands know click, only commands and terminal print. Modules are
parsed rather than imported: a forbidden import inside a function counts too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
CACHE_FORMAT = sorted(ROOT.glob("cache_format/**/*.py"))
PIPELINE = sorted(ROOT.glob("pipeline/**/*.py"))
DISTILL = sorted(ROOT.glob("distill/**/*.py"))
COMMANDS = [path for path in PIPELINE if path.is_relative_to(ROOT / "pipeline/commands")]
TERMINAL = [path for path in PIPELINE if path.is_relative_to(ROOT / "pipeline/terminal")]
LIBRARY = [path for path in PIPELINE if path not in COMMANDS and path not in TERMINAL]
SHIPPED = [*CACHE_FORMAT, *PIPELINE, *DISTILL]

# What transformers and torch cannot do without; their versions are theirs to decide. Triton comes with torch for CUDA.
BROUGHT_BY_OTHERS = {"huggingface_hub", "jinja2", "markupsafe", "safetensors", "tokenizers", "triton", "yaml"}

# Compiled by a decorator of an extra, so that the module needs it from its first line.
COMPILED = {"cache_format/codecs/packed/numba_loops.py": {"numba"}}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def imports(path: Path, *, only_on_import: bool = False) -> frozenset[str]:
    """Dotted names of everything that `path` imports; relative ones written out in full.

    `from a import b` gives `a` and `a.b`, since b may be a module. With `only_on_import`, what
    stands in a function or under `if TYPE_CHECKING` is left out.
    """
    # The package a leading dot refers to: the directory, for a module and for an __init__ alike.
    package = list(path.relative_to(ROOT).parent.parts)
    pending: list[ast.AST] = [parse(path)]
    names: set[str] = set()
    while pending:
        node = pending.pop()
        if only_on_import and (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))
        ):
            continue
        pending.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names.update([source, *(f"{source}.{alias.name}" for alias in node.names)])
    return frozenset(names)


def importers(paths: list[Path], *targets: str) -> list[str]:
    """`file: module` for each import of one of `targets` or of something inside it."""
    return sorted(
        {
            f"{relative(path)}: {name}"
            for path in paths
            for name in imports(path)
            if any(name == target or name.startswith(target + ".") for target in targets)
        }
    )


def third_party(path: Path, *, only_on_import: bool = False) -> set[str]:
    own = {"cache_format", "pipeline", "distill"}
    roots = {name.partition(".")[0] for name in imports(path, only_on_import=only_on_import)}
    return roots - own - sys.stdlib_module_names


def requirements(*extras: str) -> dict[str, Requirement]:
    """By normalised name: the runtime requirements, or those of the named extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"]
    if extras:
        lines = [line for extra in extras for line in project["optional-dependencies"][extra]]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [line.partition(";")[0].strip() for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(key): version for key, version in (p.split("==") for p in found)}


@pytest.fixture(scope="module")
def repository_files() -> list[Path]:
    """What a commit of the working tree would hold."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).exists()]


# -- layers ----------------------------------------------------------------------------------------


def test_the_parser_of_imports_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = tmp_path / "pipeline" / "teacher" / "x.py"
    module.parent.mkdir(parents=True)
    module.write_text(
        "import a.b\nfrom c import d\nfrom . import e\nfrom ..student import f\nfrom .. import g\n"
        "def late():\n    import torch\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert imports(module) == {
        *("a.b", "c", "c.d", "pipeline.teacher", "pipeline.teacher.e"),
        *("pipeline.student", "pipeline.student.f", "pipeline", "pipeline.g", "torch"),
    }
    assert "torch" not in imports(module, only_on_import=True)
    assert importers([module], "pipeline.student") == [
        "pipeline/teacher/x.py: pipeline.student",
        "pipeline/teacher/x.py: pipeline.student.f",
    ]


def test_cache_format_needs_nothing_but_the_storage_libraries():
    assert CACHE_FORMAT, "cache_format is empty"
    allowed = {"numpy", "pyarrow", "zstandard", "fsspec", "numba"}  # the last only where it is installed
    assert {relative(p): third_party(p) - allowed for p in CACHE_FORMAT if third_party(p) - allowed} == {}
    assert importers(CACHE_FORMAT, "pipeline", "distill", "cli") == []


def test_reading_a_cache_loads_no_machine_learning_library():
    # Through whatever is imported in turn, too: hence a fresh interpreter.
    heavy = "{'torch', 'transformers', 'datasets', 'click', 'rich', 'pandas'}"
    code = f"import sys, cache_format; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_nothing_imports_what_is_above_it():
    assert LIBRARY and COMMANDS and TERMINAL and DISTILL
    assert importers(LIBRARY, "pipeline.commands", "pipeline.terminal", "distill", "cli") == []
    assert importers(LIBRARY, "click", "rich", "argparse") == []
    assert importers(TERMINAL, "pipeline.commands", "distill", "cli") == []
    assert importers([*COMMANDS, *DISTILL], "cli") == []
    assert importers(DISTILL, "pipeline.commands", "pipeline.terminal", "click", "rich") == []


FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


# The README.md that every cache gets is a page for people who use the command line. Dialects name flags of servers.
DIALECTS = {ROOT / f"pipeline/teacher/engines/server/{kind}_dialect.py" for kind in ("vllm", "sglang")}
PAGES = {ROOT / "cache_format/manifest/card.py", *DIALECTS}


def test_libraries_name_options_and_not_flags():
    found = [
        f"{relative(path)}:{node.lineno}: {flag}"
        for path in [*CACHE_FORMAT, *LIBRARY]
        if path not in PAGES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for flag in FLAG.findall(node.value)
    ]
    assert found == []


def test_no_import_circles():
    """Of imports at the top of modules, within the pipeline and within the format."""
    graph = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): imports(
            path, only_on_import=True
        )
        for path in [*CACHE_FORMAT, *PIPELINE]
    }
    # Importing a module imports its packages first, whose __init__ is then complete or does not matter.
    graph = {
        name: {target for target in targets if target in graph and not name.startswith(f"{target}.")}
        for name, targets in graph.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in graph[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_stages_meet_only_in_the_cache_directory():
    teacher = [path for path in PIPELINE if path.is_relative_to(ROOT / "pipeline/teacher")]
    student = [path for path in PIPELINE if path.is_relative_to(ROOT / "pipeline/student")]
    assert teacher and student
    assert importers(teacher, "pipeline.student") == []
    assert importers(student, "pipeline.teacher") == []


def test_what_both_stages_share_stands_on_neither():
    stages = ("pipeline.teacher", "pipeline.student")
    below = [
        path
        for path in PIPELINE
        if path.is_relative_to(ROOT / "pipeline/losses")
        or path.is_relative_to(ROOT / "pipeline/models")
        or path == ROOT / "pipeline/errors.py"
    ]
    assert below
    assert importers(below, *stages) == []


def test_only_commands_print():
    printing = [
        f"{relative(path)}:{node.lineno}"
        for path in [*CACHE_FORMAT, *LIBRARY, *DISTILL]
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call)
        and (
            (isinstance(node.func, ast.Name) and node.func.id in ("print", "pprint"))
            or (isinstance(node.func, ast.Attribute) and node.func.attr == "print")
        )
    ]
    assert printing == []


def test_nothing_unpickles():
    assert importers(SHIPPED, "pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve") == []


# -- requirements ----------------------------------------------------------------------------------


def test_imports_are_declared():
    runtime = {name.replace("-", "_") for name in requirements()} | BROUGHT_BY_OTHERS
    optional = {name.replace("-", "_") for name in requirements("fast", "gguf", "peft", "server", "tasks", "vllm")}
    for path in SHIPPED:
        undeclared = third_party(path) - runtime - optional
        assert undeclared == set(), f"{relative(path)} imports what pyproject.toml does not list"
        # A module of compiled functions is itself imported only where it is used.
        eager = third_party(path, only_on_import=True) & optional - COMPILED.get(relative(path), set())
        assert eager == set(), f"{relative(path)} imports an extra at its top: move it to its use"


@pytest.mark.parametrize("path", COMPILED)
def test_compiled_functions_are_imported_where_they_are_used(path: str):
    module = path.removesuffix(".py").replace("/", ".")
    assert importers(SHIPPED, module)
    assert [each for each in SHIPPED if module in imports(each, only_on_import=True)] == []


def test_everything_declared_is_pinned_for_setup():
    pinned = pins("constraints.txt")
    declared = requirements() | requirements("gguf", "peft", "demo", "docs", "test")
    assert declared.keys() - pinned.keys() == set()
    for name, requirement in declared.items():
        assert requirement.specifier.contains(pinned[name]), f"{requirement} excludes {pinned[name]}"
    assert pinned["torch"] == "2.13.0"


def test_lower_bounds_are_those_that_are_tried():
    pinned = pins("constraints-lowest.txt")
    declared = requirements() | requirements("gguf", "peft", "demo", "test")
    for name, requirement in declared.items():
        bounds = [s.version for s in requirement.specifier if s.operator == ">="]
        assert len(bounds) == 1, f"{requirement} has no lower bound"
        tried = re.sub(r"(\.0)+$", "", pinned[name])
        assert tried == re.sub(r"(\.0)+$", "", bounds[0]), f"{requirement} was tried with {pinned[name]}"


# -- the tree --------------------------------------------------------------------------------------

TOP_LEVEL = {
    *("pyproject.toml", "README.md", "pipeline", "cache_format", "cli.py", "tests", "Makefile"),
    *(".ci", ".gitignore", "LICENSE", "benchmarks", "constraints.txt", "constraints-lowest.txt", "distill"),
    *("CHANGELOG.md", "docs"),
}

MOST_ENTRIES = 13
MOST_LINES = 450


def test_top_level_is_as_agreed(repository_files: list[Path]):
    found = {path.relative_to(ROOT).parts[0] for path in repository_files}
    assert TOP_LEVEL - found == set(), "missing"
    assert found - TOP_LEVEL - {"examples"} == set(), "not agreed upon"


def test_no_two_modules_share_a_name():
    names = [path.name for path in SHIPPED if path.name != "__init__.py"]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_folders_tell_a_story():
    counts = {
        folder.relative_to(ROOT).as_posix(): sum(
            not each.name.startswith("__") and each.name != "py.typed" for each in folder.iterdir()
        )
        for root in ("pipeline", "cache_format", "distill")
        for folder in [ROOT / root, *(ROOT / root).rglob("*/")]
        if folder.is_dir() and folder.name != "__pycache__"
    }
    assert {name: count for name, count in counts.items() if count > MOST_ENTRIES} == {}


def test_no_file_holds_too_many_ideas(repository_files: list[Path]):
    lengths = {
        relative(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in repository_files
        if path.suffix == ".py"
    }
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


def test_modules_say_what_they_are_for():
    documented = {relative(path): ast.get_docstring(parse(path)) or "" for path in SHIPPED}
    assert [name for name, text in documented.items() if len(text.split()) < 5] == []


FORBIDDEN = {
    "a note to self": re.compile(r"\b(?:TODO|FIXME|XXX)\b"),
    "a path of one machine": re.compile(r"(?<![\w.~$}-])/(?:work|root|home|Users|tmp|opt|mnt)/\w"),
    "a place to install from": re.compile(r"--(?:extra-)?index-url|find-links|pypi\.org|pythonhosted"),
}


def test_nothing_that_belongs_to_one_machine_is_committed(repository_files: list[Path]):
    found = []
    for path in repository_files:
        if path == Path(__file__):
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, start=1):
            found += [
                f"{relative(path)}:{number}: {what}: {line.strip()}"
                for what, pattern in FORBIDDEN.items()
                if pattern.search(line)
            ]
    assert found == []


def test_test_directories_shadow_no_package():
    # tests/ is on sys.path, and tests/cache_format would hide cache_format if it were a package.
    assert [relative(path) for path in (ROOT / "tests").rglob("__init__.py")] == []
