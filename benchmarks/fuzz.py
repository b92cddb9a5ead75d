"""Any bytes of a cache give rows or a CacheError: no other exception, no crash, no hang, no exhausted memory.

python -m benchmarks.fuzz                        all targets, a minute each
python -m benchmarks.fuzz shard --seconds 900    one target, for longer
python -m benchmarks.fuzz flips --count 12000    single-bit flips in intact caches instead

Coverage-guided (atheris, libFuzzer): inputs that reach new code are kept in `benchmarks/work/fuzz/TARGET`, the smallest
of them in `tests/cache_format/fuzz/TARGET.zip` (`--keep`), which the test suite replays. The fuzzer changes a part of a
small cache, whose checksums are then made valid again (`fuzzed`).

`flips` changes one bit of a file and no checksum: every flip must be an error that names the file with the flip.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

import cache_format as cf
from benchmarks.fuzzed import TARGETS, part_of, read, sound_cache

if TYPE_CHECKING:  # reading a cache does not need torch, and the memory of the fuzzing process is limited
    from benchmarks.measure import Result

ROOT = Path(__file__).resolve().parent.parent
WORK, SEEDS = ROOT / "benchmarks/work/fuzz", ROOT / "tests/cache_format/fuzz"
LIMIT_MB, TIMEOUT_S, MOST_BYTES = 2048, 10, 2**15
SEED_BYTES = 20_000  # per target, for the test suite

FOUND = "found, file named"


def _fuzz(target: str, arguments: list[str]) -> None:
    """Fuzzes in this process until libFuzzer ends it."""
    import atheris

    # numba cannot compile instrumented code.
    with atheris.instrument_imports(include=["cache_format"], exclude=["cache_format.codecs.packed.numba_loops"]):
        for name in [name for name in sys.modules if name.startswith(("cache_format", "benchmarks.fuzzed"))]:
            del sys.modules[name]
        instrumented = importlib.import_module("benchmarks.fuzzed")
    _, instead = instrumented.part_of(*TARGETS[target])
    shared = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="distill-fuzz-", dir=shared))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    atheris.Setup([sys.argv[0], *arguments], lambda data: instrumented.read(instead(data), folder))
    atheris.Fuzz()


def run_target(target: str, seconds: int, seed: int) -> dict[str, Any]:
    """Fuzzes in a new process, so that a crash of the interpreter is recorded as a finding."""
    corpus, found = WORK / target, WORK / f"{target}-findings"
    for folder in (corpus, found):
        folder.mkdir(parents=True, exist_ok=True)
    (corpus / "sound").write_bytes(part_of(*TARGETS[target])[0])
    for i, data in enumerate(seeds(target) if (SEEDS / f"{target}.zip").exists() else ()):
        (corpus / f"kept-{i}").write_bytes(data)
    given = [
        os.fspath(corpus),
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        f"-rss_limit_mb={LIMIT_MB}",
        f"-timeout={TIMEOUT_S}",
        f"-max_len={MOST_BYTES}",
        f"-artifact_prefix={found}/",
        "-print_final_stats=1",
    ]
    began = time.monotonic()
    process = _process(target, given)
    runs = [line.split()[-1] for line in process.stderr.splitlines() if "number_of_executed_units" in line]
    if process.returncode:
        click.echo(process.stderr[-4000:], err=True)
    return {
        "target": target,
        "seconds": round(time.monotonic() - began),
        "runs": int(runs[-1]) if runs else None,
        "kept": len(list(corpus.iterdir())),
        "findings": len(list(found.iterdir())) if process.returncode else 0,
        "status": process.returncode,
    }


def keep_seeds(target: str) -> int:
    """Stores the smallest inputs that reached new code for the test suite, `SEED_BYTES` in all; their number."""
    SEEDS.mkdir(parents=True, exist_ok=True)
    kept, total = 0, 0
    with zipfile.ZipFile(SEEDS / f"{target}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted((WORK / target).iterdir(), key=lambda file: (file.stat().st_size, file.name)):
            total += file.stat().st_size
            if total > SEED_BYTES:
                break
            # Without time stamps, the same inputs give the same archive.
            archive.writestr(zipfile.ZipInfo(file.name[:12]), file.read_bytes())
            kept += 1
    return kept


def seeds(target: str) -> list[bytes]:
    """The inputs stored by `keep_seeds`."""
    with zipfile.ZipFile(SEEDS / f"{target}.zip") as archive:
        return [archive.read(name) for name in archive.namelist()]


def _process(target: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.fuzz", "in-this-process", target, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)


def flips(count: int, seed: int = 0) -> Counter[str]:
    """Flips single bits at random places of intact caches; counts the outcomes."""
    rng, outcomes = np.random.default_rng(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        kinds = ("columns", "packed", "hidden")
        for kind in kinds:
            path, files = Path(folder) / kind, sound_cache(kind)
            names = [name for name in files if name != "README.md"]  # not covered by checksums
            share = np.array([len(files[name]) for name in names], float)
            share /= share.sum()
            read(files, path)
            expected = values(path)
            for _ in range(count // len(kinds)):
                name = names[rng.choice(len(names), p=share)]
                bit = int(rng.integers(8 * len(files[name])))
                data = bytearray(files[name])
                data[bit // 8] ^= 1 << bit % 8
                (path / name).write_bytes(data)
                outcomes[f"{name}: {_outcome(path, name, expected)}"] += 1
                (path / name).write_bytes(files[name])
    return outcomes


def _outcome(path: Path, name: str, expected: Any) -> str:
    try:
        found = values(path)
    except cf.CacheError as error:
        named = re.match(rf"{re.escape(str(path / name))}(: |, )", str(error))  # not only in the advice
        return FOUND if named else f"found, FILE NOT NAMED: {error}"
    except Exception as error:
        return f"ANOTHER EXCEPTION: {type(error).__name__}"
    same = all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    return "UNNOTICED, no value changed" if same else "SILENT CHANGE"


def values(path: Path) -> list[Any]:
    """All contents of a cache: metadata, tokenizer, answers, kept columns, head and rows."""
    cache = cf.open_cache(path)
    said: list[Any] = [json.dumps(cache.metadata.to_json(), sort_keys=True), *cache.tokenizer_files().values()]
    said += [json.dumps(answer) for answer in cache.answers()]
    for name, column in cache.kept.items():
        said += [name, column.values, column.codes, column.offsets]
    if (head := cache.head()) is not None:
        said.append(head.weight)
    for row in cache.iter_rows():
        targets = row.targets
        said += [row.input_ids, row.loss_mask, row.segment_lengths, targets.counts, targets.ids, targets.logprobs]
        said += [targets.exact_counts, targets.residual_logprob, targets.entropy, targets.sample_counts]
        if row.hidden is not None:
            said += [row.hidden.mask, *row.hidden.states.values(), *row.hidden.scales.values()]
    return said


@click.command()
@click.argument("targets", nargs=-1, type=click.Choice([*TARGETS, "flips"]))
@click.option("--seconds", default=60, show_default=True, help="Duration for each target.")
@click.option("--count", default=12_000, show_default=True, help="Number of bits to flip.")
@click.option("--seed", default=1, show_default=True)
@click.option("--jobs", default=1, show_default=True, help="Number of targets fuzzed at a time.")
@click.option("--keep", is_flag=True, help="Replace the inputs that the test suite replays.")
@click.option("--results", type=click.Path(path_type=Path), help="Directory for the results [default: only print them]")
def main(
    targets: tuple[str, ...], seconds: int, count: int, seed: int, jobs: int, keep: bool, results: Path | None
) -> None:
    """Look for invalid bytes in a cache that reading does not refuse."""
    found: list[dict[str, Any]] = []
    named = targets or (*TARGETS, "flips")
    with ThreadPoolExecutor(jobs) as pool:
        for outcome in pool.map(lambda name: run_target(name, seconds, seed), [n for n in named if n != "flips"]):
            click.echo(json.dumps(outcome), err=True)
            found.append(outcome)
            if keep:
                name = outcome["target"]
                click.echo(f"{name}: {keep_seeds(name)} inputs for the test suite", err=True)
    flipped = flips(count, seed) if "flips" in named else Counter[str]()
    from benchmarks import measure

    result = summary(found, flipped, seed)
    measure.show(result)
    if results is not None:
        measure.write(result, results, f"python -m benchmarks.fuzz --seconds {seconds} --count {count} --seed {seed}")
    sys.exit(1 if result.summary["findings"] else 0)


def summary(found: list[dict[str, Any]], flipped: Counter[str], seed: int) -> Result:
    """The result with both tables; `findings` must be 0."""
    from benchmarks.measure import Result, Table

    names = ["target", "seconds", "runs", "kept", "findings"]
    silent = sum(n for outcome, n in flipped.items() if not outcome.endswith(FOUND))
    tables = []
    if found:
        rows = [[each["target"], each["seconds"], each["runs"] or 0, each["kept"], each["findings"]] for each in found]
        tables.append(Table("Coverage-guided, with valid checksums", names, rows))
    if flipped:
        outcomes = [list(outcome) for outcome in sorted(flipped.items())]
        tables.append(Table("Single-bit flips", ["outcome", "bits"], outcomes))
    return Result(
        name="fuzz",
        question="Do any bytes crash a reader of a cache, or does a flipped bit change a value unnoticed?",
        bound="0 findings.",
        settings={"seed": seed, "limit_mb": LIMIT_MB, "limit_seconds": TIMEOUT_S},
        tables=tables,
        summary={
            "seconds": sum(each["seconds"] for each in found),
            "runs": sum(each["runs"] or 0 for each in found),
            "flips": sum(flipped.values()),
            "findings": sum(each["findings"] or bool(each["status"]) for each in found) + silent,
        },
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["in-this-process"]:
        _fuzz(sys.argv[2], sys.argv[3:])
    else:
        main(prog_name="python -m benchmarks.fuzz")
