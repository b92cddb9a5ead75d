"""MkDocs hook: the reference pages, generated from code, so that they list every option and every public name.

    reference/commands.md        what `distill COMMAND --help-all` prints, one section per command
    reference/distill.md         public names of `distill`, by kind, for mkdocstrings
    reference/cache_format.md    those of `cache_format`
    reference/engines.md         the interface of a teacher engine

Packages are read without being imported (griffe); commands are imported, which takes neither numpy nor torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = {
    "distill": "Every option of a command is a keyword argument of its function: `--top-k 64` of\n"
    "[`cache-teacher`](commands.md#cache-teacher) is `top_k=64`. [Python](../python.md) shows them in use.",
    "cache_format": "Reading, writing and checking caches, without torch. The files are described in\n"
    "[the cache format](../cache-format.md); [caches](../caches.md) shows the reader in use.",
}
ENGINE = "teacher.engines.interface"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    loader = griffe.GriffeLoader(search_paths=[ROOT])
    modules = {name: loader.load(name) for name in (*PACKAGES, "pipeline")}  # names of distill point into all three
    pages = {name: _names(modules[name], introduction) for name, introduction in PACKAGES.items()}
    pages["engines"] = _engines(modules["pipeline"][ENGINE])
    pages["commands"] = _commands()
    for name, content in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


# ---- names


def _names(package: griffe.Module, introduction: str) -> str:
    sections: dict[str, list[str]] = {"Functions": [], "Classes": [], "Errors and warnings": [], "Constants": []}
    for name in package.exports or ():
        found = package[name]
        kind = (found.final_target if found.is_alias else found).kind.value
        if name.endswith(("Error", "Warning")):
            kind = "error"
        section = {"function": "Functions", "class": "Classes", "error": "Errors and warnings"}.get(kind, "Constants")
        if not name.startswith("_"):
            sections[section].append(f"{package.name}.{name}")
    parts = [f"# {package.name}\n\n{introduction}\n"]
    parts += [f"## {title}\n\n{_identifiers(names)}" for title, names in sections.items() if names]
    return "\n".join(parts)


def _engines(module: griffe.Module) -> str:
    return (
        "# Teacher engines\n\nThe interface between capture, planning, verification and generation on one side, and\n"
        "what runs the teacher on the other. [Engines](../engines.md) describes the implementations.\n\n"
        + _identifiers([each.path for each in module.members.values() if not each.is_alias and each.is_class])
    )


def _identifiers(names: Sequence[str]) -> str:
    return "".join(f"::: {name}\n\n" for name in names)


# ---- commands


class MarkdownFormatter(click.HelpFormatter):
    """Takes what a command writes as its help, and makes Markdown of it."""

    def __init__(self, command: str) -> None:
        super().__init__()
        self.command = command

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        self.write(f"```text\n{prog} {args}\n```\n")

    def write_heading(self, heading: str) -> None:
        anchor = re.sub(r"\W+", "-", heading.lower()).strip("-")
        self.write(f"### {heading} {{ #{self.command}-{anchor} }}\n\n")

    def write_paragraph(self) -> None:
        self.write("\n")

    def write_text(self, text: str) -> None:
        for paragraph in re.split(r"\n\s*\n", text.strip()):
            lines = paragraph.removeprefix("\b").strip("\n").splitlines()
            if paragraph.startswith("\b"):
                self.write("\n".join(["```bash", *(line.strip() for line in lines), "```"]))
            else:
                self.write(_escaped(" ".join(lines)))
            self.write("\n\n")

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        for names, text in rows:
            anchor = f"{self.command}{names.split()[0].rstrip(',')}"
            self.write(f"`{names}` {{ #{anchor} }}\n:   {_escaped(text)}\n\n")


def _commands() -> str:
    sys.path.insert(0, str(ROOT))
    from pipeline.commands import COMMANDS, main

    parts = ["# Commands\n\nEvery option of every command, as `distill COMMAND --help-all` prints them.\n"]
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        context = click.Context(command, info_name=f"distill {name}")
        context.meta["distill.help_all"] = True
        formatter = MarkdownFormatter(name)
        command.format_help(context, formatter)
        parts.append(f"## {name}\n\n{formatter.getvalue()}")
    return "\n".join(parts)


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)
