"""Whatever the bytes of a cache say: rows, or a CacheError. No other exception, no crash, no hang, no memory used up.

python -m benchmarks.fuzz                        all targets, a minute each
python -m benchmarks.fuzz shard --seconds 900    one, for longer
python -m benchmarks.fuzz flips --count 12000    single bits of intact caches instead

Coverage-guided (atheris, libFuzzer): inputs that reach new code are kept in `benchmarks/work/fuzz/TARGET`, the smallest
of them in `tests/cache_format/fuzz/TARGET.zip` (`--keep`), which the test suite replays. The part of a cache that is
fuzzed gets true checksums again before it is read: a liar with a hash function, who comes past the first defence.

`flips` needs no such liar: each single flip must be found, by the name of the very file that it is in.
"""

from __future__ import annotations

import hashlib
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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

import cache_format as cf

if TYPE_CHECKING:  # torch is not needed to read a cache, and the memory of what fuzzes is limited
    from benchmarks.measure import Result

ROOT = Path(__file__).resolve().parent.parent
WORK, SEEDS = ROOT / "benchmarks/work/fuzz", ROOT / "tests/cache_format/fuzz"
SHARD, SIDECAR, LEXICON = "shards/shard-00000.arrow", "shards/shard-00000.json", "lexicon.arrow"
VOCAB, ROWS, TOKENS, WIDTH = 300, 6, 9, 4
HIDDEN_LAYER = 2
LIMIT_MB, TIMEOUT_S, MOST_BYTES = 2048, 10, 2**15
SEED_BYTES = 20_000  # of a target, for the test suite

FOUND = "found, with the file's name"
Files = dict[str, bytes]


def sound_cache(kind: str) -> Files:
    """A small cache by file name: of `columns` or `packed` targets, exact entries and two samples of the tail; of
    `hidden` ones, with a head, and answers that the teacher wrote."""
    rng = np.random.default_rng(0)
    common: dict[str, Any] = {
        "teacher": {"name": "fuzz"},
        "tokenizer": {"vocabulary": "0" * 64},
        "vocab_size": VOCAB,
        "alignment": "next",
        "rows_per_shard": 4,
        "rows_per_record_batch": 2,
    }
    with tempfile.TemporaryDirectory() as folder:
        cache, contents = Path(folder) / "cache", None
        if kind == "hidden":
            contents = cf.head_contents(rng.standard_normal((VOCAB, WIDTH)).astype(np.float32), None, "float32")
            recorded = cf.write_answers(Path(folder), map(_answer, range(ROWS)))
            corpus = {"rows": ROWS, "generation": {"answers_file": recorded}}
            metadata = cf.CacheMetadata(**common, targets=_hidden_targets(contents), corpus=corpus)
            rows = [_hidden_row(i, rng) for i in range(ROWS)]
        else:
            rule = {"kind": "threshold", "k": 1, "temperature": 1.0, "tail_threshold": 0.2}
            targets = {**rule, "samples": 2, "max_entries": 11}
            metadata = cf.CacheMetadata(**common, targets=targets, corpus={"rows": ROWS}, encoding=kind)
            rows = [_row(i, rng) for i in range(ROWS)]
        with cf.CacheWriter(cache, metadata, tokenizer_files={"tokenizer.json": b"{}"}, head=contents) as writer:
            writer.write(rows)
            if kind == "hidden":
                (Path(folder) / cf.ANSWERS).rename(cache / cf.ANSWERS)
        return {str(f.relative_to(cache)): f.read_bytes() for f in sorted(cache.rglob("*")) if f.is_file()}


def _hidden_targets(contents: bytes) -> dict[str, Any]:
    head = {"layer": HIDDEN_LAYER, "dtype": "float32", "bias": False, "logit_scale": 1.0, "softcap": None}
    return {
        "kind": "hidden",
        "temperature": 1.0,
        "max_entries": 0,
        "head": {**head, "bytes": len(contents), "sha256": _digest(contents)},
        "hidden": {"layers": [HIDDEN_LAYER], "teacher_layers": 2, "width": WIDTH, "dtype": "int8", "every": 1},
    }


def _answer(row: int) -> dict[str, Any]:
    of = {"row": row, "document": row // 2, "answer": row % 2, "prompt_tokens": 3}
    return {**of, "stop_reason": "eos", "mean_logprob": -0.5, "text": "four", "token_logprobs": [-0.25, -0.75]}


def _hidden_row(index: int, rng: np.random.Generator) -> cf.CacheRow:
    row, nothing = _row(index, rng), np.zeros(TOKENS, np.int64)
    states = rng.integers(-127, 128, (int(row.loss_mask.sum()), WIDTH)).astype(np.int8)
    scales = rng.random(len(states)).astype(np.float32) / 100
    targets = cf.SparseTargets(
        counts=nothing,
        ids=np.zeros(0, np.int64),
        logprobs=np.zeros(0, np.float32),
        exact_counts=nothing,
        residual_logprob=np.zeros(TOKENS, np.float32),
        entropy=np.full(TOKENS, 2.0, np.float32),
    )
    hidden = cf.HiddenStates(row.loss_mask, {HIDDEN_LAYER: states}, {HIDDEN_LAYER: scales})
    return replace(row, targets=targets, hidden=hidden)


def _row(index: int, rng: np.random.Generator) -> cf.CacheRow:
    exact, sampled = rng.integers(1, 4, TOKENS), rng.integers(0, 4, (TOKENS, 2))
    ids, probs = [], []
    for count, samples in zip(exact, sampled, strict=True):
        order = rng.permutation(VOCAB)
        ids += [np.sort(order[:count]), *(np.sort(rng.permutation(order[count:])[:n]) for n in samples)]
        probs += [rng.dirichlet(np.ones(count + 1))[:count], np.full(samples.sum(), 0.1)]
    mask = np.arange(TOKENS) % 4 != 3
    mask[-1] = False
    return cf.CacheRow(
        row=index,
        input_ids=rng.integers(0, VOCAB, TOKENS),
        loss_mask=mask,
        segment_lengths=np.array([TOKENS]),
        targets=cf.SparseTargets(
            counts=exact + sampled.sum(axis=1),
            ids=np.concatenate(ids),
            logprobs=np.log(np.concatenate(probs)).astype(np.float32),
            exact_counts=exact,
            residual_logprob=np.full(TOKENS, -1.0, np.float32),
            entropy=np.full(TOKENS, 2.0, np.float32),
            sample_counts=sampled,
        ),
    )


def resealed(files: Files) -> Files:
    """Every checksum true again, where the files can still be parsed."""
    files = dict(files)
    for seal in (_seal_shard, _seal_lexicon, _seal_head, _seal_answers, _seal_manifest):
        with suppress(ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError):
            seal(files)
    return files


def _seal_shard(files: Files) -> None:
    sidecar, manifest = json.loads(files[SIDECAR]), json.loads(files["manifest.json"])
    for part in (sidecar["header"], *sidecar["record_batches"], sidecar["footer"]):
        part["sha256"] = _digest(files[SHARD][part["start"] : part["stop"]])
    if LEXICON in files:
        sidecar["annotations"]["lexicon_sha256"] = _digest(files[LEXICON])
    sidecar["file_bytes"] = manifest["shards"][0]["bytes"] = len(files[SHARD])
    files[SIDECAR] = json.dumps(sidecar).encode()
    manifest["shards"][0]["sidecar_sha256"] = _digest(files[SIDECAR])
    files["manifest.json"] = json.dumps(manifest).encode()


def _seal_lexicon(files: Files) -> None:
    _record(files, LEXICON, lambda manifest: manifest["lexicon"])


def _seal_head(files: Files) -> None:
    _record(files, cf.HEAD, lambda manifest: manifest["targets"]["head"])


def _seal_answers(files: Files) -> None:
    _record(files, cf.ANSWERS, lambda manifest: manifest["corpus"]["generation"]["answers_file"])


def _record(files: Files, name: str, place: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    manifest = json.loads(files["manifest.json"])
    place(manifest).update(bytes=len(files[name]), sha256=_digest(files[name]))
    files["manifest.json"] = json.dumps(manifest).encode()


def _seal_manifest(files: Files) -> None:
    files["manifest.json"] = _with_own_digest(json.loads(files["manifest.json"]))


def _with_own_digest(manifest: dict[str, Any]) -> bytes:
    member = '"manifest_sha256": "{}"'
    text = json.dumps({**manifest, "manifest_sha256": "0" * 64})
    return text.replace(member.format("0" * 64), member.format(_digest(text.encode()))).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def part_of(kind: str, name: str) -> tuple[bytes, Callable[[bytes], Files]]:
    """A part of a sound cache, and what the cache becomes when other bytes stand there."""
    files = sound_cache(kind)
    if name in files:
        return files[name], lambda data: resealed({**files, name: data})
    span = json.loads(files[SIDECAR])
    span = span["header"] if name == "header" else span["record_batches"][0]
    shard, start, stop = files[SHARD], span["start"], span["stop"]

    def instead(data: bytes) -> Files:
        # The ranges stay where they are: the reader is told of no others.
        data = data[: stop - start].ljust(stop - start, b"\0")
        return resealed({**files, SHARD: shard[:start] + data + shard[stop:]})

    return shard[start:stop], instead


TARGETS: dict[str, tuple[str, str]] = {
    "manifest": ("columns", "manifest.json"),
    "sidecar": ("columns", SIDECAR),
    "header": ("columns", "header"),
    "shard": ("columns", "record batch"),
    "packed": ("packed", "record batch"),
    "lexicon": ("packed", LEXICON),
    "manifest-of-head": ("hidden", "manifest.json"),
    "head": ("hidden", cf.HEAD),
    "states": ("hidden", "record batch"),
    "answers": ("hidden", cf.ANSWERS),
}


def read(files: Files, folder: Path) -> bool:
    """Whether it is a cache; all that a user may ask of one is asked of it. Raises: anything but a CacheError."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    try:
        read_all(cf.open_cache(folder))
        return True
    except cf.CacheError:
        return False


def read_all(cache: cf.Cache) -> None:
    """Of the first rows everything that they offer. Raises: CacheError."""
    cache.tokenizer_files()
    cache.column_bytes()
    head = cache.head()
    sum(1 for _ in cache.answers())
    for index in range(min(len(cache), ROWS)):
        row = cache[index]
        _, _, targets = row.label_ids, row.position_ids, row.targets
        if head is not None:
            targets = cf.rebuilt_targets(row, head, 3, slice(None))
        targets.merged().sorted_by_probability()
        for sample in range(row.targets.num_samples):
            row.targets.sample(sample)


def _fuzz(target: str, arguments: list[str]) -> None:
    """In this process, until libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["cache_format"]):
        for name in [name for name in sys.modules if name.startswith("cache_format")]:
            del sys.modules[name]
        import cache_format
    globals()["cf"] = cache_format
    _, instead = part_of(*TARGETS[target])
    shared = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="distill-fuzz-", dir=shared))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    atheris.Setup([sys.argv[0], *arguments], lambda data: read(instead(data), folder))
    atheris.Fuzz()


def run_target(target: str, seconds: int, seed: int) -> dict[str, Any]:
    """Fuzzes in a process of its own: a crash of the interpreter is a finding, not the end."""
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
    ]
    given += [
        f"-rss_limit_mb={LIMIT_MB}",
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
    """The smallest of the inputs that reached new code, some kilobytes of them, for the test suite."""
    SEEDS.mkdir(parents=True, exist_ok=True)
    kept, total = 0, 0
    with zipfile.ZipFile(SEEDS / f"{target}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted((WORK / target).iterdir(), key=lambda file: (file.stat().st_size, file.name)):
            total += file.stat().st_size
            if total > SEED_BYTES:
                break
            # No time of writing: the same inputs are the same archive.
            archive.writestr(zipfile.ZipInfo(file.name[:12]), file.read_bytes())
            kept += 1
    return kept


def seeds(target: str) -> list[bytes]:
    """The inputs that `keep_seeds` kept."""
    with zipfile.ZipFile(SEEDS / f"{target}.zip") as archive:
        return [archive.read(name) for name in archive.namelist()]


def _process(target: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.fuzz", "in-this-process", target, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)


def flips(count: int, seed: int = 0) -> Counter[str]:
    """Single bits flipped all over intact caches: what became of them."""
    rng, outcomes = np.random.default_rng(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        kinds = ("columns", "packed", "hidden")
        for kind in kinds:
            path, files = Path(folder) / kind, sound_cache(kind)
            names = [name for name in files if name != "README.md"]  # which is for people, and under no checksum
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
        named = re.match(rf"{re.escape(str(path / name))}(: |, )", str(error))  # not in the advice alone
        return FOUND if named else f"found, WITHOUT ITS NAME: {error}"
    except Exception as error:
        return f"ANOTHER EXCEPTION: {type(error).__name__}"
    same = all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    return "UNNOTICED, and without effect on any value" if same else "SILENT CHANGE"


def values(path: Path) -> list[Any]:
    """All that a cache says: its metadata, tokenizer and rows."""
    cache = cf.open_cache(path)
    said: list[Any] = [json.dumps(cache.metadata.to_json(), sort_keys=True), *cache.tokenizer_files().values()]
    said += [json.dumps(answer) for answer in cache.answers()]
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
@click.option("--seconds", default=60, show_default=True, help="Of each target.")
@click.option("--count", default=12_000, show_default=True, help="Bits to flip.")
@click.option("--seed", default=1, show_default=True)
@click.option("--keep", is_flag=True, help="Then renew the inputs that the test suite replays.")
@click.option("--results", type=click.Path(path_type=Path), help="Where to record; else only printed.")
def main(targets: tuple[str, ...], seconds: int, count: int, seed: int, keep: bool, results: Path | None) -> None:
    """Look for bytes that a cache must not contain and that are not refused."""
    found: list[dict[str, Any]] = []
    flipped: Counter[str] = Counter()
    for target in targets or (*TARGETS, "flips"):
        if target == "flips":
            flipped = flips(count, seed)
            continue
        found.append(run_target(target, seconds, seed))
        click.echo(json.dumps(found[-1]), err=True)
        if keep:
            click.echo(f"{target}: {keep_seeds(target)} inputs for the test suite", err=True)
    from benchmarks import measure

    result = summary(found, flipped, seed)
    measure.show(result)
    if results is not None:
        measure.write(result, results, f"python -m benchmarks.fuzz --seconds {seconds} --count {count} --seed {seed}")
    sys.exit(1 if result.summary["findings"] else 0)


def summary(found: list[dict[str, Any]], flipped: Counter[str], seed: int) -> Result:
    """Both tables; `findings` counts what must not be."""
    from benchmarks.measure import Result, Table

    names = ["target", "seconds", "runs", "kept", "findings"]
    silent = sum(n for outcome, n in flipped.items() if not outcome.endswith(FOUND))
    tables = []
    if found:
        rows = [[each["target"], each["seconds"], each["runs"] or 0, each["kept"], each["findings"]] for each in found]
        tables.append(Table("Coverage-guided, checksums made true again", names, rows))
    if flipped:
        outcomes = [list(outcome) for outcome in sorted(flipped.items())]
        tables.append(Table("Single bits flipped", ["what became of it", "bits"], outcomes))
    return Result(
        name="fuzz",
        question="Is there a byte that reading a cache does not survive, or a flipped bit that changes a value unseen?",
        bound="No findings.",
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
