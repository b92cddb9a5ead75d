"""The outcomes of `make test-architectures`: from lines of single tests to the results, and to a table.

    benchmarks/work/architectures.jsonl ─▶ results/architectures.json ─▶ docs/architectures.md (`make docs`)

python -m benchmarks.architectures      collect the lines; of several lines of an architecture the last counts
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten

HERE = Path(__file__).parent
LINES, RESULTS = HERE / "work/architectures.jsonl", HERE / "results/architectures.json"

# Errors in short: a part of the message, and what the table says.
REASONS = (
    ("when it is packed after another one", "documents of a row see one another"),
    ("sees the tokens that it would have to predict", "sees later tokens"),
    ("its positions do not begin at 0", "counts positions from another number"),
    ("cannot be run on text alone", "cannot be run on text alone"),
    ("found no module that turns tokens", "looks up its token embeddings itself"),
    ("times what rounding explains", "its head cannot be run by itself"),
    ("is saved with the configuration of", "transformers cannot load what it saves of it"),
    ("cannot be built from these layers", "cannot be built with one layer"),
    ("would become layer", "the only layer would be of another kind"),
    ("found no list of", "has no list of layers"),
)
MARKS = {"yes": "✓", "no cache": ""}

Outcome = dict[str, str]


def collect() -> None:
    lines = LINES.read_text(encoding="utf-8").splitlines()
    outcomes: dict[str, Outcome] = {}
    for each in map(json.loads, lines):
        outcomes[each.pop("name")] = each
    versions = {name: version(name) for name in ("torch", "transformers")}
    found = {"versions": versions, "architectures": dict(sorted(outcomes.items()))}
    RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{RESULTS}: {len(outcomes)} architectures")


def table() -> list[list[str]]:
    """Model types with the same outcome share a row; the most common outcome comes first."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, outcome in _results().items():
        if "built" not in outcome:
            cells = [_mark(outcome[key]) for key in ("packed", "unpacked", "student", "one layer")]
            groups.setdefault((*cells, _why(outcome)), []).append(_shown(name))
    head = ["model types", "packed", "one document per row", "student", "`--student-layers 1`", "why not"]
    ordered = sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    return [head, *([", ".join(names), *cells] for cells, names in ordered)]


def not_built() -> list[list[str]]:
    """What transformers does not build from a tiny configuration here."""
    errors = {name: each["built"].removeprefix("no: ") for name, each in _results().items() if "built" in each}
    rows = [[_shown(name), shorten(error, 120, placeholder=" …").replace("|", "\\|")] for name, error in errors.items()]
    return [["model type", "error of transformers"], *rows]


def _results() -> dict[str, Outcome]:
    found: dict[str, Outcome] = json.loads(RESULTS.read_text(encoding="utf-8"))["architectures"]
    return found


def _shown(name: str) -> str:
    """“llama (yarn)” for the variant “llama, yarn”."""
    model_type, _, variant = name.partition(", ")
    return f"{model_type} ({variant})" if variant else model_type


def _mark(outcome: str) -> str:
    return MARKS.get(outcome) or ("" if outcome in MARKS else outcome.partition(":")[0])


def _why(outcome: Outcome) -> str:
    reasons = []
    for key, found in outcome.items():
        if key != "class" and found not in MARKS:
            known = (short for part, short in REASONS if part in found)
            reasons.append(next(known, found.partition(": ")[2].replace("|", "\\|")))
    return "; ".join(dict.fromkeys(reasons))


if __name__ == "__main__":
    collect()
