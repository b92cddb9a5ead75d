"""The documentation as a site (`make site`): its navigation has every page, and no link or anchor in it is broken."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

import cache_format
import distill
from pages import ROOT
from pipeline.commands import main

CONFIG = ROOT / "docs/site/mkdocs.yml"


def listed(entry: Any) -> set[str]:
    """Every page in a part of the navigation."""
    if isinstance(entry, str):
        return {entry}
    return set().union(*map(listed, entry.values() if isinstance(entry, dict) else entry))


def test_the_navigation_has_every_page() -> None:
    navigation = listed(yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["nav"])
    folder = ROOT / "docs"
    pages = {path.relative_to(folder).as_posix() for path in folder.rglob("*.md")} - {"README.md"}
    assert pages - navigation == set()


@pytest.mark.long
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings_handlers.python")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(CONFIG),
        "--site-dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def anchors(page: str) -> set[str]:
        return set(re.findall(r'\bid="([^"]+)"', (tmp_path / page).read_text(encoding="utf-8")))

    context = click.Context(main)
    commands = [main.get_command(context, name) for name in main.list_commands(context)]
    options = {
        f"{each.name}{option.opts[0]}" for each in commands for option in each.params if option.opts[0][0] == "-"
    }
    assert options - anchors("reference/commands.html") == set()
    for package in (distill, cache_format):
        names = {f"{package.__name__}.{name}" for name in package.__all__ if name != "__version__"}
        assert names - anchors(f"reference/{package.__name__}.html") == set()
    assert "](" not in re.sub(r"<(pre|code)\b.*?</\1>", "", (tmp_path / "index.html").read_text(encoding="utf-8"))
