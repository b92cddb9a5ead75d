"""Tables about what students learn: from each kind of targets, and with each method."""

from __future__ import annotations

from benchmarks.tables.stored_results import Row, by_name, matching, minus, rounded, rows, runs, significant

ARMS = {  # name in the results: name on the page
    "labels": "labels alone",
    "renormalised top-16": "top-16, renormalised",
    "renormalised top-50": "top-50, renormalised",
    "renormalised top-64": "top-64, renormalised",
    "bucket top-16": "top-16, tail as one class",
    "bucket top-50": "top-50, tail as one class",
    "bucket top-64": "top-64, tail as one class",
    "tail to label top-16": "top-16, tail to the label",
    "random 13 draws": "random, 13 draws",
    "random 50 draws": "random, 50 draws",
    "threshold 1/4": "threshold 1/4",
    "threshold 1/8": "threshold 1/8",
    "threshold 1/13": "threshold 1/13",
    "threshold 1/20": "**threshold 1/20** (default)",
    "threshold 1/50": "threshold 1/50",
    "threshold 1/200": "threshold 1/200",
    "full": "**the full distribution**",
    "full, perturbed": "the same, initial weights changed by a millionth",
}
REGIMES = {  # row on the page: track, suffix of its arms in the results
    "track 1": (1, ""),
    "track 1, a quarter of the rows per step": (1, ", 1 row per step"),
    "track 2": (2, ""),
    "track 2, a quarter of the rows per step": (2, ", 4 rows per step"),
    "the same, an eighth of the text": (2, ", 1/8 of the text, 4 rows per step"),
}
METHODS = {
    "hard labels": "hard labels",
    "forward KL": "forward KL",
    "reverse KL": "reverse KL",
    "Jensen–Shannon": "Jensen–Shannon (β = 0.5)",
    "logit MSE": "logit MSE",
    "forward KL + hidden states": "forward KL + hidden states of six layers",
    "sequence level": "sequence level: the teacher's answers as labels",
    "sequence level + forward KL": "sequence level + forward KL",
    "the teacher": "the teacher itself",
}

DEMO = {
    "untrained": "untrained",
    "labels": "trained on the teacher's text, `--kd-weight 0`",
    "distilled": "**distilled**, `--kd-weight 0.9`",
    "teacher": "the teacher itself",
}
REASONING = {
    "the student before": "nothing yet",
    "the solutions": "the solutions alone",
    "right answers": "the teacher's right answers, `--kd-weight 0`",
    "right answers and their distributions": "the same with their distributions, `--kd-weight 0.9`",
    "the teacher": "the teacher itself, without examples",
    "the teacher, shown examples": "the teacher itself, shown examples",
}


def demo() -> list[list[str]]:
    """The students of `make demo` and their teacher."""
    table = [["student", "KL to teacher (nats)", "agreement", "agreement, top 5", "perplexity"]]
    results = by_name("demo", "Median over seeds")
    for name, shown in DEMO.items():
        row = results[name]
        shares = [f"{row[column]:.1%}".replace("%", " %") for column in ("agreement", "top 5")]
        table.append([shown, minus(f"{row['KL']:.2f}"), *shares, significant(row["perplexity"], 3)])
    return table


def reasoning() -> list[list[str]]:
    """Held-out sums that students and teacher of `make demo-generate` solve."""
    table = [["learned from", "solved", "each of the students"]]
    results = by_name("reasoning", "Median over seeds")
    for name, shown in REASONING.items():
        row = results[name]
        each = row["each seed"].replace("%", " %")
        table.append([shown, f"{row['solved']:.1f} %", each if "," in each else ""])
    return table


def learned() -> list[list[str]]:
    """What students learn from each kind of targets."""
    columns = ["bytes", "track {}: KL", "gain kept", "seeds"]
    table = [["learned from", *(column.format(track) for track in (1, 2) for column in columns)]]
    tracks = [_arms(track) for track in (1, 2)]
    for name, shown in ARMS.items():
        cells = [shown]
        for arms in tracks:
            row = arms.get(name)
            cells += [""] * 4 if row is None else _cells(row)
        table.append(cells)
    return table


def regimes() -> list[list[str]]:
    """The default compared with labels and full distribution, with other steps."""
    table = [["", "positions per step", "steps", "labels, KL", "full, KL", "1/20, KL", "gain kept", "seeds"]]
    finished = runs("quality")
    for shown, (track, suffix) in REGIMES.items():
        arms, title = _arms(track), "threshold 1/20" + suffix
        run = next(run for run in finished if (run["track"], run["title"]) == (track, title))
        kls = [arms[arm + suffix]["KL"] for arm in ("labels", "full", "threshold 1/20")]
        steps = [f"{run['tokens'] / run['steps']:,.0f}", f"{run['steps']:,}"]
        table.append([shown, *steps, *kls, _share(arms[title]), str(arms[title]["seeds"])])
    return table


def methods() -> list[list[str]]:
    """Methods of distillation; the best student of each column is bold."""
    results = rows("methods", "Mean over seeds")
    columns = {  # column in the results: heading, unit, and which number is best
        "KL": ("KL, worked answers", "", min),
        "agreement": ("agreement", " %", max),
        "KL, teacher's answers": ("KL, the teacher's answers", "", min),
        "agreement, teacher's answers": ("agreement", " %", max),
        "final number right, steps given": ("final number right", " %", max),
    }
    students = [row for row in results if row[""] != "the teacher"]
    table = [["learned from", *(heading for heading, _, _ in columns.values())]]
    for name, shown in METHODS.items():
        row, cells = matching(results, {"": name}), [shown]
        for column, (_, unit, best) in columns.items():
            is_best = row in students and _mean(row[column]) == best(_mean(student[column]) for student in students)
            cell = row[column] + unit
            cells.append(f"**{cell}**" if is_best else cell)
        table.append(cells)
    return table


def on_policy(task: str) -> list[list[str]]:
    """A round on the student's own text, on the teacher's, and on half of each."""
    columns = {  # column in the results: heading, unit
        "KL, the student's own text": ("KL on its own answers", ""),
        "KL, the teacher's text": ("KL on the teacher's answers", ""),
        "agreement": ("agreement on its own answers", " %"),
    }
    table = [["learned from", *(heading for heading, _ in columns.values())]]
    for row in rows(f"on_policy_{task}", "KL(teacher"):
        table.append([row[""], *(f"{row[column]}{unit}" for column, (_, unit) in columns.items())])
    return table


def engine_students() -> list[list[str]]:
    """Students trained on the targets of either engine, and their differences."""
    shown = {"transformers": "`transformers`", "vllm": "`vllm`", "vllm − transformers": "difference within a seed"}
    columns = {"KL": "KL (nats)", "CE": "CE (nats)", "agreement, %": "agreement"}  # as in the results
    table = [["targets by", *columns.values()]]
    for row in rows("engine_students", "Held-out answers"):
        cells = [minus(str(row[column])) + (" %" if "%" in column else "") for column in columns]
        table.append([shown[row["targets by"]], *cells])
    return table


def _mean(value: str) -> float:
    return float(value.partition(" ± ")[0])


def _arms(track: int) -> dict[str, Row]:
    table = by_name("quality", f"Track {track}: held-out text of the training domains")
    return {name: {**row, "KL": rounded(row["KL"], 2)} for name, row in table.items()}


def _cells(row: Row) -> list[str]:
    size = row["bytes/token"].replace("–", "")  # labels and the full distribution have no cache
    return [size, row["KL"], _share(row), str(row["seeds"])]


def _share(row: Row) -> str:
    share = row["gain kept, KL %"].removesuffix(" ± 0.0")  # references have 0 or 100 by definition
    return f"{minus(share)} %"
