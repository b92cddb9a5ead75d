"""What `verify` prints when a cache is intact, and the line for one that does not match its teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from cache_format.wording import quantity
from pipeline.terminal.tables import pairs, size

if TYPE_CHECKING:
    import cache_format as cf
    from pipeline.teacher.verification import Comparison, TeacherCheck

# What is measured, and its unit.
MEASURES = {
    "divergence": ("mean KL(cache ‖ teacher)", " nats"),
    "deviation": ("largest difference of √probability", ""),
    "draws": ("mean distance of sampled tokens from where the seed draws, in probability", ""),
    "states": ("largest relative difference of hidden states", ""),
}


WEIGHTS = {
    True: "the same",
    False: "a different fingerprint (different weights, dtype or engine)",
    None: "unknown (a server does not tell)",
}
"""By whether they are those of the cache."""


def verify_view(
    cache: str, summary: cf.VerifySummary, deep: bool, teacher: str | None, found: TeacherCheck | None
) -> RenderableType:
    """An intact cache, and how it compares with its teacher."""
    line = Text(
        f"{cache}: intact. {quantity(summary.rows, 'row')}, {quantity(summary.tokens, 'token')}, "
        f"{quantity(summary.entries, 'entry', 'entries')}, "
        f"{size(summary.bytes)} in {quantity(summary.shards, 'shard')}: every checksum holds"
        + (", and every rule." if deep else ".")
    )
    if found is None:
        return line
    dtypes = found.dtype if found.dtype == found.cache_dtype else f"{found.dtype} (cache: {found.cache_dtype})"
    facts = [
        (
            "compared",
            f"{quantity(found.rows, 'row')}, {quantity(found.positions, 'position')}, "
            f"{quantity(found.entries, 'log-probability', 'log-probabilities')}",
        ),
        ("dtype", dtypes),
        *((each.name, _measured(each)) for each in found.comparisons),
        (
            "same entries",
            f"{found.same_entries:.1%} are chosen again, at least {found.same_entries_allowed:.1%} expected "
            f"(rounding alone: {found.same_entries_rounding:.1%})",
        ),
        ("weights", WEIGHTS[found.same_weights]),
    ]
    cause = (
        "between two answers of the server, plus 0.002 nats"
        if found.same_weights is None
        else "that random rounding errors of the cache's dtype cause in the teacher"
    )
    why = Text(
        "Differences exclude the rounding of stored values. Allowed are 2 to 4 times the differences "
        f"{cause} (rounding alone), within fixed limits.",
        style="dim",
    )
    return Group(line, pairs(f"Against {teacher}", facts), why)


def failed_check(cache: str, teacher: str | None, found: TeacherCheck) -> str:
    """One line for a cache that is not this teacher's: what is wrong, and the next step."""
    if not found.repeatable:
        worst = max(found.comparisons, key=lambda each: each.batch / each.allowed)
        if found.same_weights is None:
            return (
                f"{cache}: {teacher} answers differently when several rows are asked at once: "
                f"{MEASURES[worst.name][0]} is {worst.batch:.2g} (allowed {worst.allowed:.2g}), so no cache of it can "
                "be checked. Use another version of the server, or give the teacher's directory."
            )
        return (
            f"{cache}: {teacher} predicts something else in a batch than alone: {MEASURES[worst.name][0]} is "
            f"{worst.batch:.2g} (allowed {worst.allowed:.2g}), so it sees padding or other rows, and no cache of it "
            "can be checked. Update transformers, or use another teacher."
        )
    wrong = [f"{MEASURES[each.name][0]} is {_off(each)}" for each in found.comparisons if not each.agrees]
    if found.same_entries < found.same_entries_allowed:
        wrong.append(
            f"{found.same_entries:.1%} of the entries are the same (at least {found.same_entries_allowed:.1%} expected)"
        )
    if not found.same_template:
        wrong.append("its chats were written with a chat template that is not this tokenizer's")
    weights = "has another fingerprint" if not found.same_weights else "is the one that made it"
    weights = "" if found.same_weights is None else f"By its weights this teacher {weights}. "
    return (
        f"{cache}: does not match {teacher}: {'; '.join(wrong)}. {weights}Name the teacher and dtype that made the "
        "cache; if you did, make the cache again."
    )


def _measured(comparison: Comparison) -> str:
    what, unit = MEASURES[comparison.name]
    return (
        f"{comparison.found:.2g}{unit}, allowed {comparison.allowed:.2g} (rounding alone: {comparison.rounding:.2g}): "
        f"{what}"
    )


def _off(comparison: Comparison) -> str:
    unit = MEASURES[comparison.name][1]
    return f"{comparison.found:.2g}{unit}, worst in {comparison.at} (allowed {comparison.allowed:.2g})"
