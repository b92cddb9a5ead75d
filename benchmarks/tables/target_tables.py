"""Tables about targets: their bytes, rounding, variance and bias."""

from __future__ import annotations

from benchmarks.tables.stored_results import by_name, matching, millions, minus, rows, significant

VOCAB = 49_152  # of SmolLM2

KINDS = (  # row in the results ("" for states), and the cells of README.md before its bytes
    (
        "threshold 1/20",
        "`threshold` (default), `--tail-threshold 0.05`",
        "all with p ≥ τ, and the most likely",
        "the others, with probability p/τ and weight τ",
        "training with the forward KL",
    ),
    (
        "top-64",
        "`top-k`, `--top-k 64`",
        "the K most likely tokens",
        "",
        "other divergences, a temperature chosen later, another tokenizer",
    ),
    (
        "top-p 0.95",
        "`top-p`, `--top-p 0.95`",
        "the smallest set with that mass, at most 128 tokens",
        "",
        "repeating published work",
    ),
    (
        "random, 50 draws",
        "`random`, `--draws 50`",
        "",
        "N draws with replacement, weight count/N",
        "repeating published work",
    ),
    (
        "",
        "`hidden`",
        "the teacher's last hidden state, which gives all V probabilities",
        "",
        "held-out text, experiments",
    ),
)
CODEBOOKS = {  # name in the results: name on the page
    "√p, 63": "uniform in √p, 63 steps",
    "√p, 127": "uniform in √p, 127 steps",
    "√p, 255": "uniform in √p, 255 steps",
    "√p, 63 + 26 below": "uniform in √p, 63 steps, then 26 geometric steps",
    "√p, 88 + 25 below": "**uniform in √p, 88 steps, then 25 geometric steps (exact targets)**",
    "√p, 160 + 24 below": "uniform in √p, 160 steps, then 24 geometric steps",
    "√p, 234 + 23 below": "uniform in √p, 234 steps, then 23 geometric steps",
    "log p, 128": "uniform in log p",
    "log p, 256": "uniform in log p",
    "float16": "float16 instead of codes",
}
STATES = {
    "float32": "float32",
    "float16": "**float16** (default)",
    "int8": "int8, one scale per position",
    "bfloat16": "bfloat16 (not offered)",
}
TAILS = {
    "uniform": "all tail tokens are equally likely",
    "one token": "the tail is one token",
    "stored entropy": "the tail has the entropy that follows from the stored one",
    "interpolated": "**between the first two** ([`tempered_tail`](../pipeline/losses/tails.py))",
}
WIDTHS = (576, 2048, 4096)


def target_kinds() -> list[list[str]]:
    sizes = by_name("sizes", "Bytes per token")
    table = [["`--targets`", "exact entries", "sampled entries", "use it for", "bytes per token"]]
    for name, *cells in KINDS:
        table.append([*cells, f"{sizes[name]['columns, zstd 9']:.1f}" if name else "2·D"])
    return table


def codebooks() -> list[list[str]]:
    results = by_name("codebook", "Codebooks")
    table = [["codebook", "values", "bytes/token", "KL", "largest change"]]
    for name, shown in CODEBOOKS.items():
        row = results[name]
        values = f"{row['values']:,}" if row["values"] <= 256 else ""
        kl, change = (significant(row[column]) for column in ("KL, top-64", "max |Δlog p|, p > 1e-6"))
        table.append([shown, values, f"{row['bytes/token, top-64']:.1f}", kl, change])
    return table


def sizes() -> list[list[str]]:
    """Bytes, error and cost of the kinds of targets."""
    columns = ("entries", "columns, zstd 9", "columns, zstd 19", "order-zero entropy", "packed")
    table = [["targets", *columns, "KL of rounding", "reading packed, tokens/s per core", "cost"]]
    for row in rows("sizes", "Bytes per token"):
        speed = millions(row["reading packed, tokens/s"])
        numbers = [f"{row[column]:.1f}" for column in columns]
        table.append([row["targets"], *numbers, f"{row['KL of rounding, nats']:.4f}", speed])
        table[-1].append(f"{row['cost ÷ top-64']:.2f}")
    return table


def variance() -> list[list[str]]:
    """`random` and the threshold with the same number of entries, which the results list in pairs."""
    results = rows("variance", "Variance")
    table = [["entries", "random", "threshold", "threshold ÷ random"]]
    for random, threshold in zip(results[::2], results[1::2], strict=True):
        (draws, tau) = (row["targets"].partition(" ")[2] for row in (random, threshold))
        errors = [f"{row['E‖t̂ − p‖²']:.4f}" for row in (random, threshold)]
        shown = [f"{draws} draws: {errors[0]}", f"τ = {float(tau):.3f}: {errors[1]}"]
        table.append([f"{random['entries']:.1f}", *shown, f"{threshold['÷ random']:.2f}"])
    return table


def rounding() -> list[list[str]]:
    table = [["targets", "values uniform in", "Σ (p̂ − p)", "where max p > 0.95", "SmolLM2's KL with itself, estimated"]]
    for row in rows("variance", "Rounding"):
        name, levels, off, sure, mean, error = row.values()
        estimate = f"{mean:.4f} ± {error:.4f}"
        table.append([name, levels, *(minus(text) for text in (f"{off:.4f}", f"{sure:.4f}", estimate))])
    return table


def hidden_states() -> list[list[str]]:
    """The error of stored states."""
    results = by_name("hidden_targets", "States")
    errors = {"mean KL": "mean KL", "max KL": "largest KL", "max |Δlog p|, p > 1e-06": "largest change"}
    table = [["states", "bytes/token", "on disk", *errors.values(), "most likely token changed"]]
    for name, shown in STATES.items():
        row = results[name]
        stored = row["bytes/token on disk"]
        size = [f"{row['bytes/token']:,.0f}", "" if isinstance(stored, str) else f"{stored:,.0f}"]
        changed = f"{float(row['positions with another argmax'].removesuffix('%')):.1f} %"
        table.append([shown, *size, *(significant(row[column]) for column in errors), changed])
    return table


def gradient_angles() -> list[list[str]]:
    results = rows("hidden_targets", "Angle to the gradient")
    kinds = list(results[0])[1:]
    return [["loss", *kinds]] + [
        [row["loss"], *("" if isinstance(row[kind], str) else significant(row[kind]) for kind in kinds)]
        for row in results
    ]


def tempered_tail() -> list[list[str]]:
    results = [row for row in rows("temperature", "Tempered tail") if row["stored values"] == "rounded"]
    temperatures = list(dict.fromkeys(row["temperature"] for row in results))
    table = [["assumption about the tail", *temperatures]]
    for name, shown in TAILS.items():
        found = [matching(results, {"temperature": t, "assumed tail": name}) for t in temperatures]
        table.append([shown, *(significant(row["KL(true ‖ assumed), nats"], 3) for row in found)])
    return table


def bytes_by_width() -> list[list[str]]:
    """Hidden targets and sparse targets, for teachers of several widths."""
    sizes = by_name("sizes", "Bytes per token")
    table = [["bytes per token", *(f"D = {width:,}" for width in WIDTHS)]]
    table.append(["`hidden`, float16", *(f"{2 * width:,}" for width in WIDTHS)])
    for name, shown in (("threshold 1/20", "`threshold` 1/20, as columns"), ("top-64", "top-64, as columns")):
        table.append([shown, *[f"{sizes[name]['columns, zstd 9']:.1f}"] * len(WIDTHS)])
    table.append([f"the full distribution, V = {VOCAB:,}, float16", *[f"{2 * VOCAB:,}"] * len(WIDTHS)])
    return table


def bytes_of_states() -> list[list[str]]:
    """One stored layer of a teacher of width 576."""
    states = by_name("hidden_targets", "States")
    int8 = states["int8"]["bytes/token"]
    table = [["", "bytes per position at width 576, 1 layer"]]
    table.append(["`float16`", f"{states['float16']['bytes/token']:,g}"])
    table += [["`int8`", f"{int8:g}"], ["`int8`, `--hidden-every 8`", f"{int8 / 8:g}"]]
    return table
