"""The tables of docs/measurements.md are made from benchmarks/results by `make docs`."""

from __future__ import annotations

import pytest

from benchmarks.tables import BLOCK, PAGES, TABLES, render
from pages import text


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_up_to_date(page: str) -> None:
    assert render(text(page)) == text(page), "run make docs"


def test_every_table_is_on_a_page_once() -> None:
    assert sorted(match[1] for page in PAGES for match in BLOCK.findall(text(page))) == sorted(TABLES)


def test_a_changed_number_is_put_right_and_prose_stays() -> None:
    page = text("docs/measurements.md")
    (row,) = [line for line in page.splitlines() if line.startswith("| threshold 1/50 | 17.7 |")]
    changed = page.replace(row, row.replace("34.7", "33.7"))
    assert changed != page and render(changed) == page
    other_prose = page.replace("## Codebooks", "## Values")
    assert render(other_prose) == other_prose


def test_an_unknown_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="table nothing: expected one of codebooks"):
        render("<!-- table nothing -->\n<!-- end of table -->\n")
