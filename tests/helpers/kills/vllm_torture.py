"""Kills `cache-teacher --engine vllm` at random moments, and compares the finished caches with an undisturbed one.

    export VLLM_CPU_KVCACHE_SPACE=1 PYTHONPATH=.:tests/helpers
    .venv-vllm/bin/python tests/helpers/kills/vllm_torture.py --kills 30

A run is killed with SIGKILL and started again with the same settings until its cache is finished; then another cache is
begun, until all kills are spent. Loading vLLM takes seconds, so half of the kills wait until rows are being cached. No
shard with a sidecar may be lost or written again, no row may be missing or double, and the targets must be those of the
undisturbed run within rounding: vLLM's are not the same bytes twice.

Processes are forks of this one, which has imported everything and computed nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import vllm  # noqa: F401  (before the forks)
from transformers import AutoModelForCausalLM, LlamaConfig

import cache_format as cf
from benchmarks.measure import Result, Table, show, write
from cache_format.storage.directory import is_temporary
from pipeline.teacher.cache_config import CacheTeacherConfig
from pipeline.teacher.capture import cache_teacher
from pipeline.teacher.engines.engine_config import EngineConfig
from pipeline.teacher.targets.rules import TargetRule
from pipeline.teacher.text.data_config import DataConfig
from tiny import english, tiny_tokenizer

SEQ_LEN, ROWS_PER_SHARD, SENTENCES = 64, 16, 1000
DEADLINE_S = 600.0
FORK = multiprocessing.get_context("fork")


@dataclass
class Outcome:
    kills: Counter[str] = field(default_factory=Counter)  # by what the run was doing
    starts: int = 0
    caches: int = 0
    kept_shards: int = 0
    faults: list[str] = field(default_factory=list)


def prepare(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "teacher")
    tiny_tokenizer().save_pretrained(folder / "teacher")
    (folder / "text.txt").write_text(english(SENTENCES), encoding="utf-8")


def settings(folder: Path, output: Path) -> CacheTeacherConfig:
    return CacheTeacherConfig(
        teacher=str(folder / "teacher"),
        data=DataConfig(data=str(folder / "text.txt"), seq_len=SEQ_LEN, sample_by="line"),
        output=str(output),
        running=EngineConfig(engine="vllm"),
        targets=TargetRule(kind="threshold", tail_threshold=0.05),
        rows_per_shard=ROWS_PER_SHARD,
    )


def live(config: CacheTeacherConfig, caching: Any) -> None:
    """The process that is killed. Args: caching: set once rows are being cached."""
    cache_teacher(config, on_stage=lambda stage: caching.set() if stage.startswith("caching") else None)
    os._exit(0)  # without vLLM's own clean-up


def start(config: CacheTeacherConfig) -> tuple[Any, Any]:
    caching = FORK.Event()
    process = FORK.Process(target=live, args=(config, caching))
    process.start()
    return process, caching


def vouched(output: Path) -> dict[str, int]:
    """Files of shards that have a sidecar, with what tells one file from another of the same name."""
    sidecars = [f for f in (output / "shards").glob("*.json") if not is_temporary(f.name)]
    return {f.name: f.stat().st_mtime_ns for s in sidecars for f in (s, s.with_suffix(".arrow"))}


def torture(folder: Path, whole: cf.Cache, typical_s: float, kills: int, rng: random.Random) -> Outcome:
    """Args: typical_s: of caching."""
    outcome = Outcome()
    while outcome.kills.total() < kills:
        output = folder / f"cache-{outcome.caches}"
        outcome.caches += 1
        kept: dict[str, int] = {}
        while not (output / "manifest.json").exists():
            process, caching = start(settings(folder, output))
            outcome.starts += 1
            if outcome.kills.total() < kills:
                if rng.random() < 0.5:
                    caching.wait(DEADLINE_S)
                process.join(rng.uniform(0.0, typical_s))
                if process.exitcode is None:
                    doing = "caching" if caching.is_set() else "loading"
                    process.kill()
                    process.join()
                    outcome.kills[doing] += 1
            else:
                process.join(DEADLINE_S)
            if process.exitcode not in (0, -9):
                outcome.faults.append(f"a run ended with {process.exitcode}")
                return outcome
            there = vouched(output)
            outcome.faults += [f"{name} was lost or written again" for name in kept if there.get(name) != kept[name]]
            kept = there
            outcome.kept_shards = max(outcome.kept_shards, len(kept) // 2)
            click.echo(f"{outcome.kills.total()} kills, {len(kept) // 2} shards kept", err=True)
        outcome.faults += differences(cf.open_cache(output), whole)
        shutil.rmtree(output)
    return outcome


def differences(found: cf.Cache, whole: cf.Cache) -> list[str]:
    cf.verify_cache(found.path)
    if found.metadata.corpus["token_stream_sha256"] != whole.metadata.corpus["token_stream_sha256"]:
        return ["another text"]
    faults = [] if len(found) == len(whole) else [f"{len(found)} rows, expected {len(whole)}"]
    for one, other in zip(found.iter_rows(), whole.iter_rows(), strict=False):
        if one.row != other.row or not np.array_equal(one.input_ids, other.input_ids):
            faults.append(f"row {one.row}: other tokens than row {other.row}")
        ours, theirs = one.targets, other.targets
        step = 0.2  # of stored entropies
        if not np.allclose(ours.entropy, theirs.entropy, atol=step):
            faults.append(f"row {one.row}: other entropies")
        if np.array_equal(ours.ids, theirs.ids) and not np.allclose(ours.logprobs, theirs.logprobs, atol=0.1):
            faults.append(f"row {one.row}: other log-probabilities")
        if np.mean(ours.counts != theirs.counts) > 0.05:
            faults.append(f"row {one.row}: other entries")
    return faults


@click.command()
@click.option("--kills", default=30, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), help="Where to record; else only printed.")
def main(kills: int, seed: int, results: Path | None) -> None:
    """Kill cache-teacher with vLLM again and again; exit status 1 if anything is wrong afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        process, caching = start(settings(folder, folder / "whole"))
        caching.wait(DEADLINE_S)
        began = time.monotonic()
        process.join(DEADLINE_S)
        typical_s = time.monotonic() - began
        if process.exitcode != 0:
            raise click.ClickException(f"the run that nobody kills ended with {process.exitcode}")
        whole = cf.open_cache(folder / "whole")
        click.echo(f"undisturbed: {len(whole)} rows in {typical_s:.0f} s", err=True)
        found = torture(folder, whole, typical_s, kills, random.Random(seed))
        rows = len(whole)
    result = Result(
        name="torture_vllm",
        question="If cache-teacher --engine vllm is killed with SIGKILL and started again until the cache is finished, "
        "is every row there once, with the targets of an undisturbed run within rounding, and is no shard with a "
        "sidecar written twice?",
        bound="0 faults.",
        settings={"rows": rows, "row_tokens": SEQ_LEN, "rows_per_shard": ROWS_PER_SHARD},
        tables=[
            Table(
                "Kills",
                [
                    "",
                    "kills while loading",
                    "kills while caching",
                    "starts",
                    "finished caches",
                    "shards kept",
                    "faults",
                ],
                [
                    ["vLLM", found.kills["loading"], found.kills["caching"], found.starts, found.caches]
                    + [found.kept_shards, "; ".join(found.faults[:5]) or "none"]
                ],
            )
        ],
        summary={"kills": found.kills.total(), "caches": found.caches, "faults": len(found.faults)},
    )
    show(result)
    if results is not None:
        flags = f"--kills {kills} --seed {seed}"
        write(result, results, f"PYTHONPATH=.:tests/helpers python tests/helpers/kills/vllm_torture.py {flags}")
    if found.faults:
        raise click.ClickException(f"{len(found.faults)} faults: {found.faults[0]}")


if __name__ == "__main__":
    main()
