"""README and the pages of docs/ as programs: their commands, their Python, the files that they link to.

console   `$ distill …`, one command a line; a line `# NAME` says what the commands after it are
python    run as it stands; a block that begins with `# some_file.py` is written to that file instead

A page may be one section of it: `docs/recipes.md#Hidden states`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]


def text(page: str) -> str:
    file, _, heading = page.partition("#")
    whole = (ROOT / file).read_text(encoding="utf-8")
    return dict(_sections(whole))[heading] if heading else whole


def sections(page: str) -> list[str]:
    """Those of a page that have commands."""
    return [name for heading, _ in _sections(text(page)) if commands(name := f"{page}#{heading}")]


def blocks(page: str, language: str) -> list[str]:
    return [block for found, block in _blocks(page) if found == language]


def commands(page: str) -> list[list[str]]:
    return [words for block in blocks(page, "console") for words in _commands(block)]


def commands_of(page: str) -> dict[str, list[list[str]]]:
    """The commands under each `# NAME` of a page's console blocks; those before the first are under no name."""
    named: dict[str, list[list[str]]] = {}
    for block in blocks(page, "console"):
        current: list[list[str]] = []
        for line in block.splitlines():
            if line.startswith("# "):
                current = named.setdefault(line.removeprefix("# "), [])
            else:
                current += _commands(line)
    return named


def tables(page: str) -> list[list[list[str]]]:
    """The cells of each table, its head first."""
    found = re.findall(r"^(\|.*\n)\|[-:| ]+\|\n((?:\|.*\n)*)", text(page), flags=re.MULTILINE)
    return [
        [[cell.strip() for cell in re.split(r"(?<= )\|(?= )", line[1:-1])] for line in (head + body).splitlines()]
        for head, body in found
    ]


def linked_files(page: str) -> list[str]:
    """Every file that a page links to, or names by its path; relative to the top of the tree."""
    folder = Path(page).parent
    links = re.findall(r"\]\(([^)#:]+)\)", text(page))
    named = re.findall(r"\b((?:pipeline|cache_format|benchmarks)/[\w/.-]*\w|cli\.py)", text(page))
    return [*((folder / link).as_posix() for link in links), *named]


def distill(words: list[str]) -> str:
    """What a command prints. Raises whatever it does not succeed with."""
    from cli import main

    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0, f"distill {shlex.join(words)}: {result.output}"
    return result.output


def play(page: str) -> list[list[str]]:
    """Runs the blocks of a page in their order, in the current directory; returns its commands."""
    ran = []
    for language, block in _blocks(page):
        if language == "python" and (file := re.match(r"# ([\w/]+\.py)\n", block)):
            Path(file[1]).write_text(block, encoding="utf-8")
        elif language == "python":
            exec(compile(block, page, "exec"), {})
        elif language == "console":
            for words in _commands(block):
                distill(words[1:])
                ran.append(words)
    return ran


def _sections(whole: str) -> list[tuple[str, str]]:
    return re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", whole, flags=re.MULTILINE)


def _blocks(page: str) -> Iterator[tuple[str, str]]:
    return ((m[1], m[2]) for m in re.finditer(r"^```(\w+)\n(.*?)^```", text(page), flags=re.MULTILINE | re.DOTALL))


def _commands(block: str) -> list[list[str]]:
    return [shlex.split(line.removeprefix("$ ")) for line in block.splitlines() if line.startswith("$ ")]
