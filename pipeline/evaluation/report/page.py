"""The HTML file of a report: what its template is given, and how it is filled.

Text from caches, records and names is escaped by the template engine; the data behind the tokens is JSON inside an
inert script element. A content security policy allows the page's own script, by its hash, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from pipeline.evaluation.evaluate_config import shown_perplexity
from pipeline.evaluation.report.bins import LEVEL_NAMES, level
from pipeline.evaluation.report.charts import CHART_STYLE, key
from pipeline.evaluation.report.figures import TEACHER, Figure
from pipeline.evaluation.report.group_table import GroupTable
from pipeline.evaluation.report.passages import Chosen, Passage
from pipeline.evaluation.report.provenance import Pairs
from pipeline.evaluation.report.report_sources import Student
from pipeline.evaluation.report.student_positions import StudentPositions
from pipeline.evaluation.report.teacher_positions import TeacherPositions, TextPositions
from pipeline.losses import KlEstimateKind

TEMPLATE = Path(__file__).parent / "template"

KL_NOTES: dict[KlEstimateKind, str] = {
    "full": "KL: exact, of the full distributions.",
    "estimate": "KL: an unbiased estimate from sampled entries. At a single token it is noisy, and can be negative.",
    "lower bound": "KL: a lower bound, because all tokens outside the exact entries count as one class.",
    "entries only": "KL: over the cached entries alone, because the teacher's tail mass is unknown.",
}


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Everything on the page.

    Attributes:
        facts: what the report is about, in a few words each.
        positions: by label, of the students that were run.
        chosen: the passages that are shown; `details` has the data of their tokens, in this order.
        token_text: text of a token by its id.
    """

    title: str
    facts: Sequence[str]
    students: Sequence[Student]
    positions: Mapping[str, StudentPositions]
    text: TextPositions
    teacher: TeacherPositions
    chosen: Chosen
    token_text: Callable[[int], str]
    details: Mapping[str, Any]
    differences: Sequence[Figure]
    by: GroupTable | None = None
    training: Sequence[Figure]
    sizes: Sequence[tuple[str, int]]
    tokens_in_cache: int
    cache_facts: Mapping[str, Pairs]
    run_facts: Mapping[str, Pairs]
    version: str


def render(contents: Contents) -> bytes:
    """The file's bytes."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["breakable"] = _breakable
    environment.filters["perplexity"] = shown_perplexity
    script = Markup((TEMPLATE / "page.js").read_text(encoding="utf-8"))
    style = Markup("").join(Markup(path.read_text(encoding="utf-8")) for path in (CHART_STYLE, TEMPLATE / "page.css"))
    positions = contents.positions
    page = environment.get_template("page.html.j2").render(
        page=contents,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=style,
        levels=LEVEL_NAMES,
        groups=_groups(contents),
        legend=[
            (key(TEACHER), "teacher"),
            *((key(TEACHER + 1 + i), each.label) for i, each in enumerate(contents.students)),
        ],
        kl_note=KL_NOTES[next(iter(positions.values())).evaluation.kl_estimate_kind] if positions else "",
    )
    # Names in records may hold what UTF-8 cannot.
    return page.encode("utf-8", "replace")


def _breakable(name: str) -> Markup:
    """A name or path that may go on in the next line after each slash."""
    return Markup("/<wbr>").join(name.split("/"))


def _groups(contents: Contents) -> list[dict[str, Any]]:
    """Headings with their passages."""
    of = "mean entropy"
    if contents.positions:
        of = "mean KL" if len(contents.positions) == 1 else "mean KL of the students"
    far, near = ("Farthest from the teacher", "Nearest to the teacher")
    if not contents.positions:
        far, near = "Where the teacher is least certain", "Where the teacher is most certain"
    chosen = contents.chosen
    groups = ((far, f"highest {of} first", chosen.worst), (near, f"lowest {of} first", chosen.best))
    marks = _marks(contents)
    shown, first = [], 0
    for heading, note, passages in (*groups, ("Other passages", "in the order of the text", chosen.others)):
        entries = []
        for passage in passages:
            entries.append(_passage(contents, passage, first, marks))
            first += passage.last - passage.first
        if entries:
            shown.append({"heading": heading, "note": note, "passages": entries})
    return shown


def _passage(contents: Contents, passage: Passage, first: int, marks: list[str]) -> dict[str, Any]:
    numbers = [("entropy", f"{contents.teacher.entropy[passage.loss_tokens].mean():.3f}")]
    for label, each in contents.positions.items():
        numbers.append((f"KL {label}", f"{each.kl[passage.loss_tokens].mean():.3f}"))
    return {
        "row": passage.row,
        "document": passage.document,
        "offset": passage.offset,
        "tokens": passage.stop - passage.start,
        "loss_tokens": passage.last - passage.first,
        "numbers": numbers,
        "first": first,
        "shown": _shown(contents, passage, marks),
    }


def _shown(contents: Contents, passage: Passage, marks: list[str]) -> list[tuple[str | None, str]]:
    """Each loss token with its classes; the tokens between two of them together, with None."""
    here = slice(passage.start, passage.stop)
    tokens = zip(contents.text.predictions[here].tolist(), contents.text.input_ids[here].tolist(), strict=True)
    shown: list[tuple[str | None, str]] = []
    for predicted, run in itertools.groupby(tokens, key=lambda each: each[0] >= 0):
        texts = [(n, contents.token_text(token).replace("\n", "↵\n")) for n, token in run]
        shown += [(marks[n], text) for n, text in texts] if predicted else [(None, "".join(text for _, text in texts))]
    return shown


def _marks(contents: Contents) -> list[str]:
    """[L] the classes of a token, from which the style sheet makes one view or another; the lightest shade has none.

    e3      level of the teacher's entropy          w       the teacher's most likely token is not the true one
    k0-3    level of student 0's KL                 d0      student 0's most likely token is not the teacher's
    """
    teacher = contents.teacher
    wrong = ~teacher.right & ~np.isnan(teacher.confidence)
    columns = [_levels("e", teacher.entropy), np.where(wrong, "w ", "")]
    for i, each in enumerate(contents.positions.values()):
        columns += [_levels(f"k{i}-", each.kl), np.where(each.agrees > 0, "", f"d{i} ")]
    return ["".join(marks).rstrip() for marks in zip(*(column.tolist() for column in columns), strict=True)]


def _levels(prefix: str, nats: Any) -> Any:
    return np.array(["", *(f"{prefix}{i} " for i in range(1, len(LEVEL_NAMES)))])[level(nats)]
