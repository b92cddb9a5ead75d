"""Tables about speed: goals and measurements, a trillion tokens, shuffling and decoding."""

from __future__ import annotations

from benchmarks.tables.stored_results import about, by_name, interval, matching, millions, rows, significant
from benchmarks.tables.target_tables import VOCAB

TRILLION = 1e12
FLOPS = 4e14  # per second of a GPU: an H100 at 40 %
GPUS = 256
TEACHERS = {"8 B": 8e9, "70 B": 70e9, "400 B active": 400e9}  # parameters
STUDENTS = {"0.1 B": 0.1e9, "1 B": 1e9, "8 B": 8e9}
DAY = 24 * 60 * 60
ORDERS = {  # order of the corpus in the results: on the page
    "one domain after the other": "unevenness of domains, corpus with one domain after the other",
    "books of 8 rows in random order": "the same, books of 8 rows in random order",
    "rows in random order": "the same, rows in random order",
    "a cache for each domain, mixed": "the same, a cache for each domain, mixed",
}
LEARNED_FROM = "threshold 1/20"


def speed() -> list[list[str]]:
    """Goals and what was measured."""
    table = [["", "goal", "measured"]]
    fused = rows("fused_loss", "Fused compared with plain")
    for vocab, positions in dict.fromkeys((row["V"], row["N"]) for row in fused):
        times = [row["time/plain"] for row in fused if (row["V"], row["N"]) == (vocab, positions)]
        name = "fused head and loss ÷ plain transformers cross-entropy, time"
        table.append([f"{name}, V = {vocab:,}, {positions:,} positions", "≤ 1", interval(times)])
    step = by_name("training_step", "A training step")["distill"]
    name = "a step of `train-student` ÷ one of transformers' Trainer on labels, half of the tokens in the loss, time"
    table.append([name, "≤ 0.72", f"{step['÷ Trainer']:.2f} ({step['range']})"])
    memory = interval(row["memory/plain"] for row in fused)
    table.append(["extra memory of the fused head ÷ that of plain cross-entropy", "≤ 0.2", memory])
    captures = [f"{r['rows']}: {r['capture/bare']:.2f} ({r['range']})" for r in rows("capture", "Capture")]
    table.append(["`cache-teacher` end to end ÷ teacher forward with full logits, time", "≤ 1.00", "; ".join(captures)])
    reading = by_name("decode", "Reading")
    table.append(
        [
            "reading a cache, K = 64, with every check, tokens/s per core",
            "≥ 300,000",
            f"{millions(reading['iterate']['tokens/s'], 1)}; {millions(reading['batches']['tokens/s'], 1)} in batches",
        ]
    )
    sizes = by_name("sizes", "Bytes per token")
    for name, goals in (("threshold 1/20", (21, 16)), ("threshold 1/8", (13, 9)), ("top-50", (78, 62))):
        for encoding, column, goal in zip(("columns", "packed"), ("columns, zstd 9", "packed"), goals, strict=True):
            table.append([f"bytes per token, {name}, {encoding}", f"≤ {goal}", f"{sizes[name][column]:.1f}"])
    for name in ("threshold 1/8", "threshold 1/20", "top-50"):
        found = millions(sizes[name]["reading packed, tokens/s"])
        table.append([f"reading packed targets, {name}, tokens/s per core", "≥ 200,000", found])
    cost = f"{sizes['threshold 1/20']['cost ÷ top-64']:.2f}"
    table.append(["computing targets, threshold 1/20 ÷ top-64, time", "≤ 1.5", cost])
    return table


def trillion_tokens() -> list[list[str]]:
    """Sizes of a cache of 10¹² tokens."""
    sizes = by_name("sizes", "Bytes per token")
    table = [["targets", "bytes per token", "10¹² tokens"]]
    for name, shown, column in (
        ("threshold 1/8", "`threshold` 1/8, packed", "packed"),
        ("threshold 1/20", "`threshold` 1/20, packed", "packed"),
        ("threshold 1/20", "`threshold` 1/20, columns", "columns, zstd 9"),
        ("top-64", "`top-k` 64, columns", "columns, zstd 9"),
    ):
        size = sizes[name][column]
        table.append([shown, f"{size:.1f}", f"{size * TRILLION / 1e12:.1f} TB"])
    table.append([f"the full distribution, fp16, V = {VOCAB:,}", f"{2 * VOCAB:,}", f"{2 * VOCAB:,} TB"])
    return table


def teachers() -> list[list[str]]:
    """Time of stage one for 10¹² tokens, at 2 FLOPs per parameter and token."""
    size = by_name("sizes", "Bytes per token")[LEARNED_FROM]["packed"]
    head = ["teacher", "tokens/s per GPU", "GPU-days", f"{GPUS} GPUs", "written per GPU, `threshold` 1/20 packed"]
    table = [head]
    for name, parameters in TEACHERS.items():
        speed = FLOPS / (2 * parameters)
        days = TRILLION / speed / DAY
        written = f"{significant(speed * size / 1e3)} kB/s"
        table.append([name, about(speed), about(days), f"{significant(days / GPUS)} days", written])
    return table


def readers() -> list[list[str]]:
    """What a student reads and decodes, at 6 FLOPs per parameter and token."""
    row = by_name("sizes", "Bytes per token")[LEARNED_FROM]
    packed, columns = row["reading packed, tokens/s"], by_name("decode", "Reading")["batches"]["tokens/s"]
    table = [["student", "tokens/s per GPU", "read per GPU, packed", "cores for decoding, packed", "columns"]]
    for name, parameters in STUDENTS.items():
        speed = FLOPS / (6 * parameters)
        read = f"{significant(speed * row['packed'] / 1e6)} MB/s"
        table.append([name, about(speed), read, significant(speed / packed), significant(speed / columns)])
    return table


def mixing() -> list[list[str]]:
    """Batches of shuffled rows, compared with a full permutation."""
    window = by_name("shuffle", "Size of the window")["16"]
    sizes = (8, 64, 512)
    table = [["", "batch of 8 rows", "64", "512"]]
    batches = (f"{window[f'record batches in a batch of {n}']:.1f} of {n}" for n in sizes)
    table.append(["record batches that the rows of a batch come from", *batches])
    orders = by_name("shuffle", "Order of the corpus")
    for name, shown in ORDERS.items():
        table.append([shown, *(significant(orders[name][f"unevenness, batch of {n}"]) for n in sizes)])
    return table


def rows_decoded() -> list[list[str]]:
    """By all processes together, relative to the rows of the cache."""
    results = rows("shuffle", "Rows decoded")
    columns = [
        (f"batches of {n}, {how}", f"`--batch-size {n}`, {how}")
        for n in (8, 32)
        for how in ("round robin", "sorted by place")
    ]
    table = [["processes", *(heading for _, heading in columns)]]
    for row in results:
        table.append([str(row["processes"]), *(significant(row[column]) for column, _ in columns)])
    return table


def loader_waits() -> list[list[str]]:
    """Steps that sleep instead of computing, and what decoding their batches takes."""
    batches, steps = by_name("loader", "A batch"), rows("loader", "Steps")
    loaders = list(dict.fromkeys(row["loader"] for row in steps))
    table = [["targets", "processor ms to decode a batch", *(f"step ÷ sleep, {loader}" for loader in loaders)]]
    for targets, batch in batches.items():
        found = [matching(steps, {"targets": targets, "loader": loader})["step/sleep"] for loader in loaders]
        ratios = [each if isinstance(each, str) else f"{each:.2f}" for each in found]
        table.append([targets, significant(batch["decoding, processor ms"]), *ratios])
    return table


def loader_workers() -> list[list[str]]:
    """Rows decoded ÷ rows, with several loader workers per process."""
    results = rows("shuffle", "The same with several loader workers")
    one, eight = (matching(results, {"processes": n, "gradient accumulation": 1}) for n in (1, 8))
    table = [["workers per process", "one process: d", "8 processes, `--batch-size 8`: d"]]
    for workers in (1, 2, 4):
        column = f"loader workers: {workers}"
        table.append([str(workers), significant(one[column]), significant(eight[column])])
    return table


def stage_one_waits() -> list[list[str]]:
    """How often the host waits for the GPU in a batch of stage one, and how often it uploads something."""
    counts = rows("stage_one_counts", "Counts for a batch")
    table = [["targets, a batch of 8 rows of 1,024", "waits before", "waits", "uploads before", "uploads"]]
    table += [[row["targets"], *(str(row[name]) for name in table[0][1:])] for row in counts]
    return table


def stage_one_bytes() -> list[list[str]]:
    """Kernels and bytes of head and selection."""
    columns = [
        f"{what}{which}"
        for what in ("kernels per 1,024 positions", "bytes/logit")
        for which in (" before", "", " with Triton")
    ]
    table = [["targets", *columns]]
    for row in rows("stage_one_counts", "Head and selection"):
        table.append([row["targets"], *(f"{row[name]:.0f}" for name in columns)])
    return table


def stage_one_predicted() -> list[list[str]]:
    """Bounds on an H100."""
    columns = ("body, µs/token", "head, µs/token", "selection, µs/token", "selection with Triton, µs/token")
    speeds = ("tokens/s", "tokens/s with Triton")
    table = [["teacher, `threshold`, V = 128,256", *columns, *speeds]]
    for row in rows("stage_one_counts", "Predicted bounds"):
        cells = [*(f"{row[name]:.2f}" for name in columns), *(about(row[name]) for name in speeds)]
        table.append([row["teacher"], *cells])
    return table


def engines() -> list[list[str]]:
    """Speed of teachers in vLLM, relative to transformers and to vLLM's own lists of top tokens."""
    table = [["", "÷ transformers", "range", "÷ vLLM's own lists"]]
    targets, answers = by_name("engines", "Speed of the engines"), by_name("engines", "Answers")
    for name, row, lists in (
        ("`--engine vllm`, default targets", targets["vllm"], True),
        ("`--engine vllm`, `top-k` 64", targets["vllm, top 64"], True),
        ("vLLM's own `prompt_logprobs=64`", targets["prompt_logprobs"], True),
        ("`--engine vllm --generate`, default targets", answers["vllm"], False),
    ):
        against = f"{row['÷ prompt_logprobs']:.2f}" if lists else ""
        table.append([name, f"{row['÷ transformers']:.2f}", row["range"], against])
    return table


def servers() -> list[list[str]]:
    """Speed of a teacher in `vllm serve`, beside a bare loop of the same requests."""
    table = [["requests at once", "`cache-teacher`, tokens/s", "bare loop, tokens/s", "÷ bare loop", "range"]]
    for row in rows("servers", "Speed through a server"):
        speeds = [f"{row[name]:,.0f}" for name in ("cache-teacher, tokens/s", "bare loop, tokens/s")]
        table.append([str(row["concurrency"]), *speeds, f"{row['÷ bare loop']:.2f}", row["range"]])
    return table


def server_rounding() -> list[list[str]]:
    """How far log-probabilities in float32 are from float64."""
    table = [["largest difference at a position, nats", "median", "99 %", "largest"]]
    for name, row in by_name("server_rounding", "Difference from float64").items():
        table.append([name, *(f"{row[column]:.6f}" for column in table[0][1:])])
    return table
