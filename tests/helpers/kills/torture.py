"""Kills `cache-teacher` at random moments and at each of its stages, and compares the finished cache.

    PYTHONPATH=.:tests/helpers python tests/helpers/kills/torture.py              `make torture`: 170 kills
    PYTHONPATH=.:tests/helpers python tests/helpers/kills/torture.py --kills 6    a short run

Several runs, each with 1, 2 or 3 processes on one output. Processes are killed with SIGKILL and started again with the
same arguments until the cache is finished. Then every file must equal that of an undisturbed run, byte for byte, and
every shard that had a sidecar at a kill must still be the same file, not a rewritten one. A file system of a few
hundred kilobytes that fills up is tested in the same way.

Processes are forks of this one, which has imported everything and computed nothing, so a start takes milliseconds
instead of ten seconds of imports. A process reports its current stage through a shared page of memory.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from victim import AIMS, DEADLINE_S, HOME, ONCE, STAGES, Aim, Page, ended, fork, prepare, settings  # isort: skip (it sets the environment of what the others import)
from cache_format.storage.claims import CLAIMS
from cache_format.storage.directory import is_temporary

ENCODINGS = ("columns", "packed")


@dataclass
class Outcome:
    """Outcome of one run: one cache, from nothing to finished."""

    processes: int
    encoding: str
    kills: list[tuple[str, str]] = field(default_factory=list)  # (random or aimed, stage)
    starts: int = 0
    kept_shards: int = 0  # over all kills
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


# -- one run -----------------------------------------------------------------------------------------------------------


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def vouched(output: Path) -> dict[str, int]:
    """Files of shards that have a sidecar, with what tells one file from another of the same name."""
    sidecars = [f for f in (output / "shards").glob("*.json") if not is_temporary(f.name)]
    return {f.name: f.stat().st_mtime_ns for s in sidecars for f in (s, s.with_suffix(".arrow"))}


def torture(
    folder: Path,
    encoding: str,
    processes: int,
    kills: int,
    aims: list[Aim],
    expected: dict[str, bytes],
    typical_s: float,
    rng: random.Random,
) -> Outcome:
    """One cache, `kills` times at a random moment and once at each aim."""
    outcome = Outcome(processes, encoding)
    output, log = folder / f"cache-{encoding}-{processes}", folder / "log"
    page, began = Page(processes), time.monotonic()
    kept: dict[str, int] = {}
    aims, random_kills = list(aims), kills

    def start(slot: int) -> tuple[int, Aim | None]:
        worker = None if processes == 1 else (slot, processes)
        aim = aims.pop() if aims and rng.random() < 0.7 else None
        outcome.starts += 1
        variables = {}
        if worker is not None and encoding == "columns":  # as torchrun would say it; the others by options
            variables = {"RANK": str(slot), "LOCAL_RANK": str(slot), "WORLD_SIZE": str(processes)}
            worker = None
        return fork(settings(folder, output, encoding, worker), page, slot, aim, log, variables), aim

    def killed(slot: int, how: str) -> None:
        outcome.kills.append((how, page.stage(slot)))
        there = vouched(output)
        for name, when in kept.items():
            if there.get(name) != when:
                outcome.faults.append(f"{name} had a sidecar, and was {'written again' if name in there else 'lost'}")
        kept.update(there)
        outcome.kept_shards = max(outcome.kept_shards, len(kept) // 2)

    running = {slot: start(slot) for slot in range(processes)}
    while running or random_kills or aims:
        if not running:  # finished before all kills were spent: again, on a cache that has lost two shards
            for name in rng.sample(
                sorted(name for name in expected if name.startswith("shards/") and name.endswith(".arrow")), 2
            ):
                for file in (name, name.replace(".arrow", ".json")):
                    (output / file).unlink()
                    kept.pop(file.rpartition("/")[2], None)
            running = {slot: start(slot) for slot in range(processes)}
        victim = rng.choice(sorted(running))
        pause = rng.uniform(0.0, typical_s) if random_kills else DEADLINE_S
        until = time.monotonic() + pause
        while time.monotonic() < until and victim in running:
            for slot, (pid, aim) in list(running.items()):
                status = ended(pid, 0.0)
                if status is None:
                    continue
                del running[slot]
                if status == -signal.SIGKILL and aim is not None:
                    killed(slot, "aimed")
                    running[slot] = start(slot)
                elif status == 0 and aim is not None and aim.tries > 1:
                    aims.append(replace(aim, count=1, tries=aim.tries - 1))
                elif status != 0:
                    outcome.faults.append(f"a process ended with {status}: {log.read_text() if log.exists() else ''}")
            time.sleep(0.002)
        if victim in running and random_kills:
            pid, aim = running.pop(victim)
            os.kill(pid, signal.SIGKILL)
            status = ended(pid, DEADLINE_S)
            if aim is not None:  # it did not come to it
                aims.insert(0, aim)
            if status == -signal.SIGKILL:
                random_kills -= 1
                killed(victim, "random")
                running[victim] = start(victim)
        elif victim in running:
            for pid, _ in running.values():
                os.kill(pid, signal.SIGKILL)
            outcome.faults.append(f"after {DEADLINE_S:.0f} s still {page.stage(victim)}")
            break
    found = contents(output)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            outcome.faults.append(f"{name} is {'different' if name in found and name in expected else 'amiss'}")
    outcome.seconds = time.monotonic() - began
    shutil.rmtree(output)
    return outcome


# -- a full disk -------------------------------------------------------------------------------------------------------


def full_disk(folder: Path, encoding: str, expected: dict[str, bytes]) -> dict[str, Any]:
    """Runs on a file system that is too small, which is then made a little larger, until it is large enough."""
    mount = folder / "small"
    mount.mkdir(exist_ok=True)
    total = sum(len(data) for data in expected.values())
    room = 64 * 1024
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={room}", "none", str(mount)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        return {"encoding": encoding, "ran": "no: mounting a file system is not allowed here"}
    fills, faults = 0, []
    kept: dict[str, int] = {}
    try:
        while True:
            page, log = Page(1), folder / "log"
            status = ended(fork(settings(folder, mount / "cache", encoding, None), page, 0, None, log), DEADLINE_S)
            there = vouched(mount / "cache") if (mount / "cache").exists() else {}
            faults += [f"{name} was not kept" for name, when in kept.items() if there.get(name) != when]
            kept = there
            left = [f.name for f in mount.rglob("*") if is_temporary(f.name) or f.parent.name == CLAIMS]
            faults += [f"{name} was left behind" for name in left]
            if status == 0:
                break
            if status != 28:
                faults.append(f"ended with {status}: {log.read_text()}")
                break
            fills += 1
            room += 24 * 1024
            subprocess.run(["mount", "-o", f"remount,size={room}", str(mount)], check=True)
        found = contents(mount / "cache")
        faults += [
            f"{name} differs" for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
        ]
    finally:
        subprocess.run(["umount", str(mount)], check=False)
    return {"encoding": encoding, "ran": "tmpfs", "cache_bytes": total, "times_full": fills, "faults": faults}


# -- everything --------------------------------------------------------------------------------------------------------


def undisturbed(folder: Path, encoding: str) -> tuple[dict[str, bytes], float]:
    """The files of a run that nobody kills, and its seconds."""
    began, log = time.monotonic(), folder / "log"
    output = folder / f"whole-{encoding}"
    status = ended(fork(settings(folder, output, encoding, None), Page(1), 0, None, log), DEADLINE_S)
    if status != 0:
        raise click.ClickException(f"the run that nobody kills ended with {status}: {log.read_text()}")
    return contents(output), time.monotonic() - began


def all_runs(
    kills: int,
    seed: int,
    aimed: bool,
    plans: Sequence[tuple[str, int]],
    disk: bool,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """plans: encoding and processes of each run."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=HOME) as scratch:
        folder = Path(scratch)
        prepare(folder)
        encodings = sorted({encoding for encoding, _ in plans})
        expected: dict[str, dict[str, bytes]] = {}
        typical: dict[str, float] = {}
        for number, encoding in enumerate(encodings):
            if number == 0:  # the text is tokenised once, which is not typical
                undisturbed(folder, encoding)
                shutil.rmtree(folder / f"whole-{encoding}")
            expected[encoding], typical[encoding] = undisturbed(folder, encoding)
        outcomes = []
        for number, (encoding, processes) in enumerate(plans):
            share = kills // len(plans) + (number < kills % len(plans))
            aims = [Aim(stage, rng.randint(1, 3)) for stage in AIMS if stage != "lexicon" or encoding == "packed"]
            aims = [replace(aim, count=1) if aim.stage in ONCE else aim for aim in aims] if aimed else []
            if share or aims:
                outcomes.append(
                    torture(folder, encoding, processes, share, aims, expected[encoding], typical[encoding], rng)
                )
                done = outcomes[-1]
                progress(
                    f"{many(processes)}, {encoding}: {len(done.kills)} kills, {done.starts} starts, "
                    f"{done.seconds:.0f} s: {'; '.join(done.faults) or 'every byte the same'}"
                )
        disks = [full_disk(folder, encoding, expected[encoding]) for encoding in encodings if disk]
        for filled in disks:
            progress(f"full disk, {filled}")
    return {"outcomes": outcomes, "disks": disks}


def many(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


def record(found: dict[str, Any], results: Path | None, command: str) -> None:
    from benchmarks.measure import Result, Table, show, write

    outcomes: list[Outcome] = found["outcomes"]
    where: dict[str, Counter[tuple[int, str]]] = {stage: Counter() for stage in STAGES}
    for outcome in outcomes:
        for how, stage in outcome.kills:
            where[stage][outcome.processes, how] += 1
    columns = [
        "stage",
        *(f"{n} process{'es' * (n > 1)}, {how}" for n in (1, 2, 3) for how in ("random", "aimed")),
    ]
    rows = [
        [stage, *(counts[n, how] for n in (1, 2, 3) for how in ("random", "aimed"))]
        for stage, counts in where.items()
        if counts
    ]
    runs = [
        [f"{o.processes} {o.encoding}", len(o.kills), o.starts, round(o.seconds, 1), "; ".join(o.faults) or "none"]
        for o in outcomes
    ]
    disks = [
        [d["encoding"], d["ran"], d.get("times_full", 0), "; ".join(d.get("faults", [])) or "none"]
        for d in found["disks"]
    ]
    kills = sum(len(o.kills) for o in outcomes)
    faults = sum(len(o.faults) for o in outcomes) + sum(len(d.get("faults", [])) for d in found["disks"])
    result = Result(
        name="torture",
        question="If cache-teacher is killed with SIGKILL and started again until the cache is finished, does every "
        "file equal that of an undisturbed run, byte for byte, and is no shard with a sidecar written twice?",
        bound="0 faults.",
        settings={"rows_per_shard": 8, "record_batch_rows": 32, "batch_rows": 4, "row_tokens": 48},
        tables=[
            Table("Kills by stage", columns, rows),
            Table("Runs", ["processes, encoding", "kills", "starts", "seconds", "faults"], runs),
            Table("Full disk", ["encoding", "file system", "times full", "faults"], disks),
        ],
        summary={"kills": kills, "runs": len(outcomes), "faults": faults},
    )
    show(result)
    if results is not None:
        write(result, results, command)


@click.command()
@click.option("--kills", default=108, show_default=True, help="At random moments, over all runs.")
@click.option("--aimed/--no-aimed", default=True, show_default=True, help="One more at each step, in every run.")
@click.option("--processes", multiple=True, type=click.IntRange(1, 8), default=(1, 2, 3), show_default=True)
@click.option("--encoding", "encodings", multiple=True, type=click.Choice(ENCODINGS), default=ENCODINGS)
@click.option("--disk/--no-disk", default=True, show_default=True, help="Fill a small file system as well.")
@click.option("--seed", default=0, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), help="Where to record; else only printed.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcomes as one line of JSON.")
def main(
    kills: int,
    aimed: bool,
    processes: tuple[int, ...],
    encodings: tuple[str, ...],
    disk: bool,
    seed: int,
    results: Path | None,
    as_json: bool,
) -> None:
    """Kill cache-teacher again and again; exit status 1 if anything differs afterwards."""
    try:
        plans = [(encoding, count) for count in processes for encoding in encodings]
        found = all_runs(kills, seed, aimed, plans, disk, lambda text: click.echo(text, err=True))
        if as_json:
            click.echo(json.dumps({"runs": [vars(o) for o in found["outcomes"]], "disks": found["disks"]}))
        else:
            flags = f"--kills {kills}{'' if aimed else ' --no-aimed'} --seed {seed}"
            record(found, results, f"PYTHONPATH=.:tests/helpers python tests/helpers/kills/torture.py {flags}")
    finally:
        shutil.rmtree(HOME, ignore_errors=True)
    faults = [fault for o in found["outcomes"] for fault in o.faults]
    faults += [fault for disk in found["disks"] for fault in disk.get("faults", [])]
    if faults:
        raise click.ClickException(f"{len(faults)} faults: {faults[0]}")


if __name__ == "__main__":
    main()
