"""Text of several domains from Debian and Python packages: no web site, no account, the same everywhere.

    postgresql  its manual: HTML pages of Debian's postgresql-doc-15. Every 20th page is held out.
    austen      Jane Austen's novels, Debian's r-cran-janeaustenr, by chapters. Persuasion is held out.
    reasoning   word problems with worked answers, and three kinds of puzzles, by reasoning-gym. Held out: other seeds.
    python      Python's reference manual. Not a training domain.

Debian packages are downloaded with apt, which needs no root, and unpacked next to the text; nothing is installed.
"""

from __future__ import annotations

import functools
import html.parser
import json
import random
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.files import write_text
from benchmarks.quality.r_data import read_strings
from benchmarks.text import prose

PAGES = "usr/share/doc/postgresql-doc-15/html"
NOVELS = "usr/lib/R/site-library/janeaustenr/data"
HELD_OUT_NOVEL = "persuasion"
NO_PROSE = ("bookindex", "legalnotice")  # pages of the manual without prose
HELD_OUT_EVERY = {"page": 20, "document": 10}
SUFFIX = " Give the result as your final answer"
PROBLEMS = {"gsm_symbolic": 6000, "knights_knaves": 1500, "family_relationships": 1500, "zebra_puzzles": 400}
SMALLEST_DOCUMENT, DOCUMENT = 200, 1200  # characters


@dataclass(frozen=True)
class Document:
    text: str
    held_out: bool


@dataclass(frozen=True)
class Domain:
    name: str
    trained_on: bool
    documents: list[Document]


def load_domains(work: Path, directory: Path | None) -> list[Domain]:
    """All domains, from `work/text` if they are stored there.

    Args:
        directory: of .txt files, one per domain, instead of the domains above. With two or more files, the last one by
            name is not a training domain; of the others, every 10th document is held out.

    Raises: click.ClickException if the text is not available.
    """
    if directory is not None:
        return _given(directory)
    sources: dict[str, Callable[[Path], Iterable[Document]]] = {
        "postgresql": _postgresql,
        "austen": _austen,
        "reasoning": lambda _: _reasoning(),
        "python": lambda _: (Document(text, True) for text in prose(4 * DOCUMENT)),
    }
    domains = []
    for name, source in sources.items():
        file = work / "text" / f"{name}.jsonl"
        if not file.exists():
            lines = [json.dumps(vars(document), ensure_ascii=False) + "\n" for document in source(work / "packages")]
            write_text(file, "".join(lines))
        with file.open(encoding="utf-8") as lines:
            domains.append(Domain(name, name != "python", [Document(**json.loads(line)) for line in lines]))
    return domains


def _given(directory: Path) -> list[Domain]:
    files = sorted(directory.glob("*.txt"))
    if not files:
        raise click.ClickException(f"{directory}: found no .txt files, expected one per domain. Check --text.")
    domains = []
    for file in files:
        trained_on = len(files) == 1 or file != files[-1]
        texts = list(cut(file.read_text(encoding="utf-8").split("\n\n"), DOCUMENT))
        every = HELD_OUT_EVERY["document"]
        held_out = (not trained_on or i % every == every // 2 for i in range(len(texts)))
        documents = [Document(text, out) for text, out in zip(texts, held_out, strict=True)]
        if len(documents) <= every // 2:
            raise click.ClickException(
                f"{file}: too short for held-out text, expected at least {every * DOCUMENT:,} characters."
            )
        domains.append(Domain(file.stem, trained_on, documents))
    return domains


def cut(paragraphs: Iterable[str], characters: int) -> Iterator[str]:
    """Documents of consecutive paragraphs; each ends when it has at least `characters` characters."""
    document: list[str] = []
    for paragraph in filter(None, (paragraph.strip("\n") for paragraph in paragraphs)):
        document.append(paragraph)
        if sum(map(len, document)) >= characters:
            yield "\n\n".join(document)
            document = []
    if document:
        yield "\n\n".join(document)


def _postgresql(packages: Path) -> Iterator[Document]:
    pages = sorted((_debian("postgresql-doc-15", packages) / PAGES).glob("*.html"))
    for i, page in enumerate(page for page in pages if page.stem not in NO_PROSE):
        reader = _Page()
        reader.feed(page.read_text(encoding="utf-8"))
        text = "\n\n".join(reader.paragraphs)
        if len(text) >= SMALLEST_DOCUMENT:
            every = HELD_OUT_EVERY["page"]
            yield Document(text, i % every == every // 2)


class _Page(html.parser.HTMLParser):
    """Paragraphs of a page of DocBook's HTML, without navigation and tables of contents."""

    BLOCKS = {"p", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "dt", "dd", "li", "tr", "div", "table", "ul", "dl", "ol"}
    SKIPPED = {"navheader", "navfooter", "toc"}
    EMPTY = {"br", "hr", "img", "meta", "link", "input", "col", "area", "base"}  # elements without an end

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self.text, self.depth, self.skipped_from, self.preformatted = "", 0, 0, False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.EMPTY:
            return
        self.depth += 1
        if not self.skipped_from and (dict(attrs).get("class") in self.SKIPPED or tag == "head"):
            self.skipped_from = self.depth
        if tag in self.BLOCKS:
            self._end_paragraph()
            self.preformatted = tag == "pre"
        elif tag in ("td", "th") and self.text:
            self.text += " | "

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag in self.EMPTY:
            return
        if tag in self.BLOCKS or tag == "html":
            self._end_paragraph()
            self.preformatted = False
        if self.depth == self.skipped_from:
            self.skipped_from = 0
        self.depth -= 1

    def handle_data(self, data: str) -> None:
        if not self.skipped_from:
            self.text += data

    def _end_paragraph(self) -> None:
        text = self.text.strip("\n").rstrip() if self.preformatted else " ".join(self.text.split())
        if text:
            self.paragraphs.append(text)
        self.text = ""


def _austen(packages: Path) -> Iterator[Document]:
    for novel, lines in read_strings(_debian("r-cran-janeaustenr", packages) / NOVELS).items():
        for chapter in re.split(r"(?m)^(?=chapter [0-9ivxl]+\b)", "\n".join(lines), flags=re.IGNORECASE)[1:]:
            paragraphs = (" ".join(paragraph.split()) for paragraph in chapter.split("\n\n"))
            yield Document("\n\n".join(filter(None, paragraphs)), novel == HELD_OUT_NOVEL)


def _reasoning() -> Iterator[Document]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise click.ClickException("reasoning-gym is not installed: run `make setup`, or give --text.") from error
    documents: list[Document] = []
    for held_out, share in ((False, 1.0), (True, 0.05)):
        for name, size in PROBLEMS.items():
            for problem in reasoning_gym.create_dataset(name, size=int(size * share), seed=1 + held_out):
                answer = problem["metadata"].get("answer_cot") or problem["answer"]
                question = problem["question"].partition(SUFFIX)[0].strip()
                documents.append(Document(f"{question}\n\n{answer}", held_out))
    random.Random(0).shuffle(documents)
    yield from documents


@functools.cache
def _debian(package: str, packages: Path) -> Path:
    """The unpacked files of a Debian package. Raises: click.ClickException without apt, or without a network."""
    unpacked = packages / package
    if unpacked.exists():
        return unpacked
    packages.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", "-q", package], cwd=packages, check=True, capture_output=True)
        archive = max(packages.glob(f"{package}_*.deb"))
        partial = packages / f"{package}.partial"
        subprocess.run(["dpkg-deb", "-x", archive, partial], check=True, capture_output=True)
    except FileNotFoundError as error:
        raise click.ClickException(
            f"{package}: cannot download the Debian package, since {error.filename} is not installed. Give a "
            "directory of .txt files, one per domain, with --text."
        ) from error
    except subprocess.CalledProcessError as error:
        message = (error.stderr or b"").decode(errors="replace").strip().splitlines() or ["no message"]
        raise click.ClickException(
            f"{package}: apt could not download it: {message[-1]}. Run `apt-get update`, or give a directory of .txt "
            "files, one per domain, with --text."
        ) from error
    partial.rename(unpacked)
    return unpacked
