"""What `verify` prints when a cache is intact, and the line for one that does not match its teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from pipeline.terminal.tables import pairs, size

if TYPE_CHECKING:
    import cache_format as cf
    from pipeline.teacher.verification import TeacherCheck


def verify_view(
    cache: str, summary: cf.VerifySummary, deep: bool, teacher: str | None, found: TeacherCheck | None
) -> RenderableType:
    """An intact cache, and how it compares with its teacher."""
    line = Text(
        f"{cache}: intact. {summary.rows:,} rows, {summary.tokens:,} tokens, {summary.entries:,} entries, "
        f"{size(summary.bytes)} in {summary.shards:,} shards: every checksum holds"
        + (", and every rule." if deep else ".")
    )
    if found is None:
        return line
    facts = [
        ("compared", f"{found.rows:,} rows, {found.positions:,} positions, {found.entries:,} log-probabilities"),
        ("deviation", f"{found.deviation:.2g} nats beyond rounding, allowed {found.allowed:.2g}"),
        ("noise", f"{found.noise:.2g} nats between two runs of the teacher on this machine"),
        ("same entries", f"{found.same_entries:.2%} of the positions; two runs: {found.same_entries_noise:.2%}"),
        ("weights", "the same" if found.same_weights else "another fingerprint (other weights, or another dtype)"),
    ]
    return Group(line, pairs(f"Against {teacher}", facts))


def failed_check(cache: str, teacher: str | None, found: TeacherCheck) -> str:
    """One line for a cache that is not this teacher's."""
    return (
        f"{cache}: does not match {teacher}: off by up to {found.deviation:.2g} nats at {found.deviation_at} (allowed "
        f"{found.allowed:.2g}), same entries at {found.same_entries:.1%} of the positions (this teacher with itself: "
        f"{found.same_entries_noise:.1%}). Was it cached with other weights, another dtype or device? If not, make it "
        "again."
    )
