"""Runs resumed with another number of processes, inside epochs, train on the same rows in the same steps."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import on_processes

import cache_format as cf
from pipeline.student.data.cache_mix import open_mix
from pipeline.student.data.dataset import CacheDataset
from pipeline.student.data.mixed_dataset import MixedDataset
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.train import train_student
from runs import SGD, build_cache, distance, weights
from tiny import conversations, english, write_jsonl

pytestmark = pytest.mark.slow


def rank(jobs: list[dict[str, Any]]) -> None:
    """Trains and writes, for each process, the rows of each forward pass."""
    seen: list[list[int]] = []
    for rows in (CacheDataset, MixedDataset):
        rows.__getitems__ = watched(rows.__getitems__, seen)
    for job in jobs:
        seen.clear()
        warnings: list[str] = []
        train_student(TrainStudentConfig(**job), on_warning=warnings.append)
        file = Path(f"{job['output']}-rank-{os.environ['RANK']}.json")
        file.write_text(json.dumps({"seen": seen, "warnings": warnings}))


def watched(plain: Callable[..., Any], seen: list[list[int]]) -> Callable[..., Any]:
    def getitems(self: Any, indices: list[int]) -> Any:
        seen.append(indices)
        return plain(self, indices)

    return getitems


CASES = {"one cache": ("chats",), "a mixture": ("chats:0.6", "text:0.4")}
LAST, KEPT_BY_ONE, KEPT_BY_TWO = 13, 4, 9
# Runs of two processes: which run they continue, and from which step.
CONTINUED = {"two": ("whole", KEPT_BY_ONE), "later": ("whole", KEPT_BY_TWO), "again": ("two", KEPT_BY_TWO)}


def cut(source: Path, target: Path, step: int) -> Path:
    """A copy of a run as it was after the checkpoint of a step."""
    target.mkdir()
    shutil.copy(source / "distill_config.json", target)
    shutil.copytree(source / f"checkpoint-{step}", target / f"checkpoint-{step}")
    return target


@pytest.fixture(scope="module")
def folder(teacher_dir: Path, student_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """whole: an uninterrupted run of one process; the others: of two processes, as in CONTINUED."""
    folder = tmp_path_factory.mktemp("elsewhere")
    write_jsonl(folder / "chats.jsonl", conversations(14))
    (folder / "text.txt").write_text(english(14, seed=5))
    for name, file in (("chats", "chats.jsonl"), ("text", "text.txt")):
        build_cache(folder / name, teacher_dir, folder / file, rows_per_shard=8)
    (folder / "arguments.json").write_text(json.dumps({**SGD, "learning_rate": 0.3, "save_total_limit": 20}))
    for case in CASES:
        train_student(TrainStudentConfig(**config(folder, student_dir, case, "whole", batch_size=4)))
    for names in ("two", "later"), ("again",):
        jobs = []
        for case, name in itertools.product(CASES, names):
            source, step = CONTINUED[name]
            cut(folder / f"{case} {source}", folder / f"{case} {name}", step)
            jobs.append(config(folder, student_dir, case, name, batch_size=2, resume=True))
            # A step with another number of rows is refused.
            for words in jobs[-1], {**jobs[-1], "batch_size": 8}:
                with pytest.raises(cf.MismatchError, match=r"a step had 8 rows, has (4|16): `batch_size`"):
                    train_student(TrainStudentConfig(**words))
        on_processes(2, rank, jobs)
    return folder


def config(folder: Path, student: Path, case: str, name: str, **options: Any) -> dict[str, Any]:
    return {
        "cache": tuple(f"{folder}/{each}" for each in CASES[case]),
        "output": str(folder / f"{case} {name}"),
        "student": str(student),
        "device": "cpu",
        "training_args": str(folder / "arguments.json"),
        "gradient_accumulation_steps": 2,
        "max_steps": LAST,
        "save_steps": 1,
        "logging_steps": 1,
        **options,
    }


@pytest.mark.parametrize("name", CONTINUED)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_continue_a_run(folder: Path, case: str, name: str):
    whole, two = weights(folder / f"{case} whole"), weights(folder / f"{case} {name}")
    source, step = CONTINUED[name]
    kept = weights(folder / f"{case} {source}/checkpoint-{step}")
    assert distance(whole, kept) > 0.01 and distance(whole, two) < 2e-6


@pytest.mark.parametrize("name", CONTINUED)
@pytest.mark.parametrize("case", CASES)
def test_each_step_has_the_rows_of_an_uninterrupted_run(folder: Path, case: str, name: str):
    mix = open_mix([f"{folder}/{each}" for each in CASES[case]])
    parts = [CacheDataset(cache) for cache in mix.caches]
    dataset = parts[0] if len(parts) == 1 else MixedDataset(parts, [each.rows for each in mix.portions])
    order = []
    for epoch in range(4):
        sampler = dataset.sampler(seed=0)
        sampler.set_epoch(epoch)
        rows = list(sampler)
        order += [rows[i : i + 8] for i in range(0, len(rows), 8)]
    per_epoch = len(order) // 4
    assert KEPT_BY_ONE % per_epoch and KEPT_BY_TWO % per_epoch and KEPT_BY_TWO > per_epoch and LAST > 2 * per_epoch
    ranks = [json.loads((folder / f"{case} {name}-rank-{rank}.json").read_text()) for rank in (0, 1)]
    micro = list(zip(*(each["seen"] for each in ranks), strict=True))
    batches = iter(micro)
    source, first = CONTINUED[name]
    for step in range(first, LAST):
        wanted = order[step]
        parts = [[], []]
        while len(parts[0] + parts[1]) < len(wanted):
            for part, rows in zip(parts, next(batches), strict=True):
                part += rows
        fillers = {wanted[-1] + len(dataset)}  # without loss tokens
        assert sorted(index for index in parts[0] + parts[1] if index not in fillers) == sorted(wanted)
        places = [[index % len(dataset) for index in part] for part in parts]
        assert places[0] + places[1] == sorted(places[0] + places[1])  # each process has adjacent rows
    for each in ranks:
        found = [warning for warning in each["warnings"] if "was written by 1 process, and 2 continue" in warning]
        assert bool(found) == (source == "whole")


@pytest.mark.parametrize("case", CASES)
def test_one_process_continues_a_run_of_two(folder: Path, student_dir: Path, case: str):
    back = cut(folder / f"{case} two", folder / f"{case} back", KEPT_BY_TWO)
    warnings: list[str] = []
    options = config(folder, student_dir, case, "back", batch_size=8, gradient_accumulation_steps=1)
    train_student(TrainStudentConfig(**{**options, "resume": True}), on_warning=warnings.append)
    assert distance(weights(folder / f"{case} whole"), weights(back)) < 2e-6
    assert any("was written by 2 processes, and 1 continues" in warning for warning in warnings)
