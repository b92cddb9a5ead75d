"""Whatever the bytes of a cache say: rows, or a CacheError. No other exception, no crash, no hang, no memory used up.

python -m benchmarks.fuzz                        all targets, a minute each
python -m benchmarks.fuzz shard --seconds 900    one, for longer
python -m benchmarks.fuzz flips --count 10000    single bits of intact caches instead

Coverage-guided (atheris, libFuzzer): inputs that reach new code are kept in `benchmarks/work/fuzz/TARGET`, the smallest
of them in `tests/cache_format/fuzz/TARGET.zip` (`--keep`), which the test suite replays. The part of a cache that is
fuzzed gets true checksums again before it is read: a liar with a hash function, who comes past the first defence.

`flips` needs no such liar: each single flip must be found, with the name of the file, or must not change a value.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

import cache_format as cf

ROOT = Path(__file__).resolve().parent.parent
WORK, SEEDS = ROOT / "benchmarks/work/fuzz", ROOT / "tests/cache_format/fuzz"
SHARD, SIDECAR, LEXICON = "shards/shard-00000.arrow", "shards/shard-00000.json", "lexicon.arrow"
VOCAB, ROWS, TOKENS = 300, 6, 9
LIMIT_MB, TIMEOUT_S, MOST_BYTES = 2048, 10, 2**15
SEED_BYTES = 20_000  # of a target, for the test suite

Files = dict[str, bytes]


def sound_cache(encoding: str) -> Files:
    """A small cache with exact entries and two samples of the tail, by file name."""
    rng, rule = np.random.default_rng(0), {"kind": "threshold", "k": 1, "temperature": 1.0, "tail_threshold": 0.2}
    metadata = cf.CacheMetadata(
        teacher={"name": "fuzz"},
        tokenizer={"vocabulary": "0" * 64},
        vocab_size=VOCAB,
        alignment="next",
        targets={**rule, "samples": 2, "max_entries": 11},
        corpus={"rows": ROWS},
        rows_per_shard=4,
        rows_per_record_batch=2,
        encoding=encoding,
    )
    with tempfile.TemporaryDirectory() as folder:
        with cf.CacheWriter(Path(folder) / "cache", metadata, tokenizer_files={"tokenizer.json": b"{}"}) as writer:
            writer.write([_row(i, rng) for i in range(ROWS)])
        files = Path(folder) / "cache"
        return {str(f.relative_to(files)): f.read_bytes() for f in sorted(files.rglob("*")) if f.is_file()}


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
    try:
        sidecar, manifest = json.loads(files[SIDECAR]), json.loads(files["manifest.json"])
        for part in (sidecar["header"], *sidecar["record_batches"], sidecar["footer"]):
            part["sha256"] = _digest(files[SHARD][part["start"] : part["stop"]])
        if LEXICON in files:
            sidecar["annotations"]["lexicon_sha256"] = manifest["lexicon"]["sha256"] = _digest(files[LEXICON])
            manifest["lexicon"]["bytes"] = len(files[LEXICON])
        sidecar["file_bytes"] = manifest["shards"][0]["bytes"] = len(files[SHARD])
        files[SIDECAR] = json.dumps(sidecar).encode()
        manifest["shards"][0]["sidecar_sha256"] = _digest(files[SIDECAR])
        files["manifest.json"] = _with_own_digest(manifest)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError):
        pass
    return files


def _with_own_digest(manifest: dict[str, Any]) -> bytes:
    member = '"manifest_sha256": "{}"'
    text = json.dumps({**manifest, "manifest_sha256": "0" * 64})
    return text.replace(member.format("0" * 64), member.format(_digest(text.encode()))).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def part_of(encoding: str, name: str) -> tuple[bytes, Callable[[bytes], Files]]:
    """A part of a sound cache, and what the cache becomes when other bytes stand there."""
    files = sound_cache(encoding)
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
}


def read(files: Files, folder: Path) -> bool:
    """Whether it is a cache; all that a user may ask of one is asked of it. Raises: anything but a CacheError."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    try:
        cache = cf.open_cache(folder)
        cache.tokenizer_files()
        cache.column_bytes()
        for index in range(min(len(cache), ROWS)):
            row = cache[index]
            row.label_ids, row.position_ids, row.targets.merged().sorted_by_probability()
            for sample in range(row.targets.num_samples):
                row.targets.sample(sample)
        return True
    except cf.CacheError:
        return False


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
        for encoding in ("columns", "packed"):
            path, files = Path(folder) / encoding, sound_cache(encoding)
            names = list(files)
            share = np.array([len(files[name]) for name in names]) / sum(map(len, files.values()))
            read(files, path)
            expected = values(path)
            for _ in range(count // 2):
                name = names[rng.choice(len(names), p=share)]
                bit = int(rng.integers(8 * len(files[name])))
                data = bytearray(files[name])
                data[bit // 8] ^= 1 << bit % 8
                (path / name).write_bytes(data)
                outcomes[f"{name}: {_outcome(path, name, expected)}"] += 1
                (path / name).write_bytes(files[name])
    return outcomes


def _outcome(path: Path, name: str, expected: Any) -> str:
    stem = name.rpartition(".")[0]
    try:
        found = values(path)
    except cf.CacheError as error:
        return "found, with the file's name" if stem in str(error) else f"found, WITHOUT ITS NAME: {error}"
    except Exception as error:
        return f"ANOTHER EXCEPTION: {type(error).__name__}"
    same = all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    return "without effect on any value" if same else "SILENT CHANGE"


def values(path: Path) -> list[Any]:
    """All that a cache says: its metadata, tokenizer and rows."""
    cache = cf.open_cache(path)
    said: list[Any] = [json.dumps(cache.metadata.to_json(), sort_keys=True), *cache.tokenizer_files().values()]
    for row in cache.iter_rows():
        targets = row.targets
        said += [row.input_ids, row.loss_mask, row.segment_lengths, targets.counts, targets.ids, targets.logprobs]
        said += [targets.exact_counts, targets.residual_logprob, targets.entropy, targets.sample_counts]
    return said


@click.command()
@click.argument("targets", nargs=-1, type=click.Choice([*TARGETS, "flips"]))
@click.option("--seconds", default=60, show_default=True, help="Of each target.")
@click.option("--count", default=10_000, show_default=True, help="Bits to flip.")
@click.option("--seed", default=1, show_default=True)
@click.option("--keep", is_flag=True, help="Then renew the inputs that the test suite replays.")
def main(targets: tuple[str, ...], seconds: int, count: int, seed: int, keep: bool) -> None:
    """Look for bytes that a cache must not contain and that are not refused."""
    failed = False
    for target in targets or (*TARGETS, "flips"):
        if target == "flips":
            outcomes = flips(count, seed)
            for outcome, times in sorted(outcomes.items()):
                click.echo(f"{times:7,}  {outcome}")
            failed |= any(word in outcome for outcome in outcomes for word in ("SILENT", "WITHOUT", "ANOTHER"))
            continue
        result = run_target(target, seconds, seed)
        click.echo(json.dumps(result))
        failed |= bool(result["status"])
        if keep:
            click.echo(f"{target}: {keep_seeds(target)} inputs for the test suite")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["in-this-process"]:
        _fuzz(sys.argv[2], sys.argv[3:])
    else:
        main(prog_name="python -m benchmarks.fuzz")
