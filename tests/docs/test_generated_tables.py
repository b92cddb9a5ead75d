"""The tables of measured numbers in README.md and docs/ are made from benchmarks/results by `make docs`."""

from __future__ import annotations

import re

import pytest

from benchmarks.tables import BLOCK, PAGES, TABLES, render
from benchmarks.tables.stored_results import rows
from pages import ROOT, text


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_up_to_date(page: str) -> None:
    assert render(text(page)) == text(page), "run make docs"


def test_every_table_is_on_a_page_once() -> None:
    assert sorted(match[1] for page in PAGES for match in BLOCK.findall(text(page))) == sorted(TABLES)


def test_markers_are_only_on_pages_that_are_written() -> None:
    marked = {
        path.relative_to(ROOT).as_posix()
        for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        if re.search("<!-- table|end of table", path.read_text(encoding="utf-8"))
    }
    assert marked == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_a_changed_number_is_put_right_and_prose_stays(page: str) -> None:
    before = text(page)
    for match in BLOCK.finditer(before):
        block = match[0]
        changed = before.replace(block, re.sub(r"(?<=\| )(\*\*)?[\d✓]|(?<=tensor )a", r"\g<1>77", block))
        assert changed != before and render(changed) == before
    assert render(before + "A sentence with 12 numbers.\n") == before + "A sentence with 12 numbers.\n"


def test_an_unknown_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="table nothing: expected one of target kinds, codebooks"):
        render("<!-- table nothing -->\n<!-- end of table -->\n")


def test_a_title_that_no_result_has_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"sizes.json: found \[\] for the title 'Nothing'"):
        rows("sizes", "Nothing")
