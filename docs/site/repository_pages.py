"""MkDocs hook: pages that lie outside docs/, and links between files as links between pages.

Every page is written for GitHub, where a link is relative to the file. Here it is looked up in the repository and
becomes a link to the page of that file. A link to a file without a page, such as a module, becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from re import Match
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "README.md": "index.md",
    "docs/README.md": "pages.md",
    "CHANGELOG.md": "changes.md",
    "cache_format/SPEC.md": "cache-format.md",
    **{
        f"benchmarks/results/{path.name}": f"results/{path.name}"
        for path in sorted(ROOT.glob("benchmarks/results/*"))
        if path.suffix in (".md", ".svg")
    },
}
"""File of the repository -> page of the site; that of docs/NAME.md is NAME.md."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Spells the anchors of headings as GitHub does."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    index = files.get_file_from_path("README.md")
    assert index is not None
    files.remove(index)
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.abs_src_path is None:  # generated from code
        return markdown
    folder = Path(page.file.abs_src_path).relative_to(ROOT).parent.as_posix()

    def link(found: Match[str]) -> str:
        image, text, target, anchor = found.groups("")
        file = posixpath.normpath(posixpath.join(folder, target))
        name = PAGES.get(file, file.removeprefix("docs/"))
        if files.get_file_from_path(name) is None:
            return text
        return f"{image}[{text}]({posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return LINK.sub(link, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """A line `# NAME` in a console block is a comment, not the prompt of root."""
    return html.replace('<span class="gp"># </span>', '<span class="c1"># </span>')
