"""README and the pages in docs/ as programs: their commands, their Python, their tables, and the files they link to.

    console   `$ distill …`, one command per line; a line `# NAME` names the commands after it
    python    runs as it is; a block that begins with `# some_file.py` is written to that file instead
    toml      a block that begins with `# some_file.toml` is written to that file

A page may be one section: `docs/recipes.md#Hidden states`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[3]


def text(page: str) -> str:
    """The Markdown of a page, or of one of its sections."""
    file, _, heading = page.partition("#")
    markdown = (ROOT / file).read_text(encoding="utf-8")
    return dict(_sections(markdown))[heading] if heading else markdown


def sections(page: str) -> list[str]:
    """Names of the sections of a page that have commands."""
    return [name for heading, _ in _sections(text(page)) if commands(name := f"{page}#{heading}")]


def anchors(page: str) -> set[str]:
    """What a link can name after `#`: headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text(page), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(page: str, language: str) -> list[str]:
    return [block for found, block in _blocks(page) if found == language]


def commands(page: str) -> list[list[str]]:
    return [words for block in blocks(page, "console") for words in _commands(block)]


def commands_of(page: str) -> dict[str, list[list[str]]]:
    """The commands under each `# NAME` in a page's console blocks, without those before the first name of a block."""
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
    """The cells of each table, with its header row first."""
    found = re.findall(r"^(\|.*\n)\|[-:| ]+\|\n((?:\|.*\n)*)", text(page), flags=re.MULTILINE)
    return [
        [[cell.strip() for cell in re.split(r"(?<= )\|(?= )", line[1:-1])] for line in (head + body).splitlines()]
        for head, body in found
    ]


def linked_files(page: str) -> list[str]:
    """Every file that a page links to or names by its path, relative to the repository."""
    folder = Path(page).parent
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text(page))
    named = re.findall(r"\b((?:pipeline|cache_format|benchmarks)/[\w/.-]*\w|cli\.py)", text(page))
    return [*((folder / link).as_posix() for link in links), *named]


def linked_anchors(page: str) -> list[tuple[str, str]]:
    """(page, anchor) of every link to a heading."""
    folder = Path(page).parent
    found = re.findall(r"\]\(([^)#:]*\.md)?#([^)]+)\)", text(page))
    return [((folder / file).as_posix() if file else page, anchor) for file, anchor in found]


def distill(words: list[str]) -> str:
    """Runs a command and returns its output. Raises the exception of a command that fails."""
    from cli import main

    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0, f"distill {shlex.join(words)}: {result.output}"
    return result.output


def play(page: str) -> list[list[str]]:
    """Runs the blocks of a page in order, in the current directory; returns its distill commands."""
    ran = []
    for language, block in _blocks(page):
        file = re.match(r"# ([\w/]+\.(?:py|toml))\n", block)
        if language in ("python", "toml") and file:
            Path(file[1]).write_text(block, encoding="utf-8")
        elif language == "python":
            exec(compile(block, page, "exec"), {})
        elif language == "console":
            for words in _commands(block):
                if words[0] == "distill":
                    distill(words[1:])
                    ran.append(words)
    return ran


def _sections(markdown: str) -> list[tuple[str, str]]:
    return re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", markdown, flags=re.MULTILINE)


def _blocks(page: str) -> Iterator[tuple[str, str]]:
    return ((m[1], m[2]) for m in re.finditer(r"^```(\w+)\n(.*?)^```", text(page), flags=re.MULTILINE | re.DOTALL))


def _commands(block: str) -> list[list[str]]:
    return [shlex.split(line.removeprefix("$ ")) for line in block.splitlines() if line.startswith("$ ")]
