"""A report as a test reads it: tables by section, passages with their tokens, the data behind them.

page = read_page(path)
page.tables["results"]      # rows of cells, the head first
page.passages[0].tokens     # (text, classes), None instead of classes for a token without a prediction
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "br", "wbr", "input", "link", "img", "hr"}


@dataclass
class Passage:
    title: str = ""
    first: int = 0
    tokens: list[tuple[str, str | None]] = field(default_factory=list)


class Page(HTMLParser):
    """Fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}  # of a section, all of them one after the other
        self.passages: list[Passage] = []
        self.links: list[str] = []  # whatever a browser would load
        self.facts: list[tuple[str, str]] = []
        self.scripts: dict[str, str] = {}
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.data: Any = json.loads(self.scripts["application/json"])

    @property
    def section(self) -> str:
        return next((attributes["id"] or "" for tag, attributes in self.open if tag == "section"), "")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append((tag, attributes))
        if tag == "tr":
            self.tables.setdefault(self.section, []).append([])
        elif tag in ("td", "th") and self.section:
            self.tables[self.section][-1].append("")
        elif tag == "article":
            self.passages.append(Passage(first=int(attributes["data-first"] or 0)))
        elif tag in ("b", "i"):
            self.passages[-1].tokens.append(("", None if tag == "i" else attributes.get("class") or ""))
        elif tag == "dt":
            self.facts.append(("", ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, (tag, self.open[-2:])
        self.open.pop()

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self.open]
        if not tags:
            assert not data.strip()
        elif "td" in tags or "th" in tags:
            self.tables[self.section][-1][-1] += data
        elif "h4" in tags:
            self.passages[-1].title += data
        elif tags[-1] in ("b", "i"):
            text, classes = self.passages[-1].tokens[-1]
            self.passages[-1].tokens[-1] = (text + data, classes)
        elif tags[-1] == "dt":
            self.facts[-1] = (self.facts[-1][0] + data, self.facts[-1][1])
        elif tags[-1] == "dd":
            self.facts[-1] = (self.facts[-1][0], self.facts[-1][1] + data)
        elif tags[-1] == "script":
            kind = self.open[-1][1].get("type") or "script"
            self.scripts[kind] = self.scripts.get(kind, "") + data


def read_page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))
