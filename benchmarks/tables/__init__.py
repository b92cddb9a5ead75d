"""`make docs`: writes the tables of README.md and docs/ from benchmarks/results.

    benchmarks/results ─▶ stored_results ─▶ target_tables, student_tables, speed_tables ─▶ between markers on a page

A table is between `<!-- table NAME -->` and `<!-- end of table -->`; TABLES names the function that makes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks import architectures
from benchmarks.tables import speed_tables, student_tables, target_tables
from benchmarks.tables.stored_results import ROOT

PAGES = (
    "README.md",
    "docs/architectures.md",
    "docs/engines.md",
    "docs/full-distributions.md",
    "docs/generation.md",
    "docs/getting-started.md",
    "docs/hidden-states.md",
    "docs/measurements.md",
    "docs/on-policy.md",
    "docs/recipes.md",
    "docs/scaling.md",
    "docs/servers.md",
    "docs/training-data.md",
)
BLOCK = re.compile(r"(<!-- table (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)

TABLES: dict[str, tuple[Callable[[], list[list[str]]], int]] = {  # with the number of left-aligned columns
    "target kinds": (target_tables.target_kinds, 4),
    "codebooks": (target_tables.codebooks, 1),
    "sizes": (target_tables.sizes, 1),
    "variance": (target_tables.variance, 3),
    "rounding": (target_tables.rounding, 2),
    "hidden states": (target_tables.hidden_states, 1),
    "gradient angles": (target_tables.gradient_angles, 1),
    "tempered tail": (target_tables.tempered_tail, 1),
    "bytes by width": (target_tables.bytes_by_width, 1),
    "bytes of states": (target_tables.bytes_of_states, 1),
    "stage one waits": (speed_tables.stage_one_waits, 1),
    "stage one bytes": (speed_tables.stage_one_bytes, 1),
    "stage one predicted": (speed_tables.stage_one_predicted, 1),
    "demo": (student_tables.demo, 1),
    "reasoning": (student_tables.reasoning, 1),
    "learned": (student_tables.learned, 1),
    "regimes": (student_tables.regimes, 1),
    "methods": (student_tables.methods, 1),
    "on policy": (partial(student_tables.on_policy, "word_problems"), 1),
    "on policy, demo": (partial(student_tables.on_policy, "demo"), 1),
    "speed": (speed_tables.speed, 3),
    "engines": (speed_tables.engines, 1),
    "engine students": (student_tables.engine_students, 1),
    "servers": (speed_tables.servers, 0),
    "server rounding": (speed_tables.server_rounding, 1),
    "a trillion tokens": (speed_tables.trillion_tokens, 1),
    "teachers": (speed_tables.teachers, 1),
    "readers": (speed_tables.readers, 1),
    "mixing": (speed_tables.mixing, 1),
    "rows decoded": (speed_tables.rows_decoded, 1),
    "loader waits": (speed_tables.loader_waits, 1),
    "loader workers": (speed_tables.loader_workers, 1),
    "architectures": (architectures.table, 6),
    "architectures not built": (architectures.not_built, 2),
}


def render(page: str) -> str:
    """The page with up-to-date tables. Raises ValueError for a table that is not in TABLES."""

    def block(match: re.Match[str]) -> str:
        before, name, after = match.groups()
        if name not in TABLES:
            raise ValueError(f"table {name}: expected one of {', '.join(TABLES)}. Correct the marker.")
        make, left_aligned = TABLES[name]
        head, *rows = make()
        line = ["---" if i < left_aligned else "---:" for i in range(len(head))]
        return before + "".join(f"| {' | '.join(cells)} |\n" for cells in (head, line, *rows)) + after

    return BLOCK.sub(block, page)


def main(pages: Sequence[str] = PAGES) -> None:
    for page in pages:
        file = ROOT / page
        before = file.read_text(encoding="utf-8")
        after = render(before)
        if after != before:
            file.write_text(after, encoding="utf-8")
        print(f"{page}: {len(BLOCK.findall(before))} tables, {'written' if after != before else 'up to date'}")
