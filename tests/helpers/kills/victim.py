"""A process that runs `cache-teacher` on a tiny teacher and says, through a shared page of memory, what it is doing.

For `torture.py`, which kills it. It is a fork of a process that has imported everything and computed nothing, so that a
start costs milliseconds. Must be imported before `datasets` and `transformers`: it sets their environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOME = tempfile.mkdtemp(prefix="distill-torture-")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HOME=HOME,
    HF_DATASETS_CACHE=os.path.join(HOME, "datasets"),
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    CUDA_VISIBLE_DEVICES="",
)

import torch  # noqa: E402
from transformers.utils import logging  # noqa: E402

import cache_format as cf  # noqa: E402
from cache_format.storage.directory import LocalDirectory  # noqa: E402
from cache_format.write import unfinished  # noqa: E402
from pipeline.models.head import Head  # noqa: E402
from pipeline.teacher.cache_config import CacheTeacherConfig  # noqa: E402
from pipeline.teacher.capture import cache_teacher  # noqa: E402
from pipeline.teacher.targets.rules import TargetRule  # noqa: E402
from pipeline.teacher.text.data_config import DataConfig  # noqa: E402
from pipeline.teacher.writing.worker_config import WorkerConfig  # noqa: E402
from tiny import english, tiny_llama, tiny_tokenizer  # noqa: E402

DEADLINE_S = 120.0  # of a process that nobody kills

# What a process may be doing, in the order of the flow.
STAGES = (
    "starting",
    "tokenising",
    "loading the teacher",
    "claiming",
    "recording the settings",
    "forward",
    "encoding a shard",
    "lexicon",
    "naming a shard",
    "between shard and sidecar",
    "sidecar",
    "card",
    "manifest",
    "between manifest and end",
    "waiting for others",
)


class Page:
    """Shared by the killer and its processes: what each is doing. Two bytes each: the main thread and the writer's."""

    def __init__(self, processes: int) -> None:
        self.memory = mmap.mmap(-1, max(2 * processes, 1))

    def set(self, process: int, stage: str | None, *, writer: bool = False) -> None:
        self.memory[2 * process + writer] = 0 if stage is None else 1 + STAGES.index(stage)

    def stage(self, process: int) -> str:
        main, writer = self.memory[2 * process], self.memory[2 * process + 1]
        return STAGES[(writer or main or 1) - 1]


@dataclass
class Aim:
    """Kills its own process at the n-th time that it comes to a stage."""

    stage: str
    count: int = 1
    tries: int = 6  # a process may end before it comes there


AIMS = (
    *("tokenising", "recording the settings", "forward", "encoding a shard", "naming a shard"),
    *("between shard and sidecar", "sidecar", "card", "manifest", "between manifest and end", "lexicon"),
)
ONCE = {"tokenising", "recording the settings", "lexicon", "card", "manifest", "between manifest and end"}


def settings(folder: Path, output: Path, encoding: str, worker: tuple[int, int] | None) -> CacheTeacherConfig:
    """worker: index and count, or None for a process that torchrun or nobody has told."""
    index, count = worker or (None, None)
    return CacheTeacherConfig(
        teacher=str(folder / "teacher"),
        data=DataConfig(data=str(folder / "text.txt"), sample_by="line", seq_len=48),
        output=str(output),
        targets=TargetRule(kind="threshold", top_k=1, tail_threshold=0.05, samples=1, seed=7),
        batch_size=4,
        device="cpu",
        rows_per_shard=8,
        encoding=encoding,
        workers=WorkerConfig(num_workers=count, worker_index=index, stale_after=20.0),
    )


def instrument(mark: Callable[..., None]) -> None:
    """Makes the code say what it is doing. Nothing else about it is changed."""

    def wrap(owner: Any, name: str, before: str | None = None, after: str | None = None, writer: bool = False) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            if before:
                mark(before, writer)
            try:
                return real(*args, **options)
            finally:
                if after:
                    mark(None if after == "nothing" else after, writer)

        setattr(owner, name, call)

    wrap(Head, "hidden_states", before="forward")
    wrap(cf.CacheWriter, "write", before="encoding a shard", after="nothing", writer=True)
    wrap(unfinished.UnfinishedCache, "learn_lexicon", before="lexicon", after="encoding a shard", writer=True)
    wrap(cf.SharedCacheWriter, "begin_shard", before="claiming")
    wrap(unfinished.UnfinishedCache, "begin", before="recording the settings")
    create = LocalDirectory.create

    @contextlib.contextmanager
    def creating(directory: LocalDirectory, name: str) -> Iterator[str]:
        kind = name.rpartition("/")[2]
        shard, sidecar = kind.endswith(".arrow"), kind.startswith("shard-") and kind.endswith(".json")
        before = {"README.md": "card", "manifest.json": "manifest"}.get(kind, "sidecar" if sidecar else None)
        if before:
            mark(before, sidecar)
        with create(directory, name) as path:
            yield path
            if shard:
                mark("naming a shard", True)
        if shard:
            mark("between shard and sidecar", True)
        elif sidecar:
            mark("encoding a shard", True)
        elif kind == "manifest.json":
            mark("between manifest and end", False)

    LocalDirectory.create = creating  # type: ignore[method-assign]


def process(config: CacheTeacherConfig, page: Page, slot: int, aim: Aim | None, log: Path) -> None:
    """What a fork does. Never returns."""
    # Without its killer it would be nobody's.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    left = 0 if aim is None else aim.count

    def mark(stage: str | None, writer: bool = False) -> None:
        nonlocal left
        page.set(slot, stage, writer=writer)
        if aim is not None and stage == aim.stage:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def on_stage(text: str) -> None:
        stages = {"reading": "tokenising", "loading": "loading the teacher", "waiting": "waiting for others"}
        mark(stages.get(text.split()[0], "claiming"))

    status = 1
    try:
        torch.set_num_threads(1)
        logging.disable_progress_bar()
        instrument(mark)
        cache_teacher(config, on_stage=on_stage)
        status = 0
    except OSError as error:
        log.write_text(f"{type(error).__name__}: {error}")
        status = 28 if error.errno == errno.ENOSPC else 1
    except BaseException as error:
        log.write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(status)


def fork(
    config: CacheTeacherConfig,
    page: Page,
    slot: int,
    aim: Aim | None,
    log: Path,
    variables: Mapping[str, str] | None = None,
) -> int:
    """variables: of its environment."""
    page.set(slot, "starting")
    page.set(slot, None, writer=True)
    pid = os.fork()
    if pid == 0:
        os.environ.update(variables or {})
        process(config, page, slot, aim, log)
    return pid


def ended(pid: int, seconds: float) -> int | None:
    """Exit status within so many seconds, negative for a signal; None if it still runs."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)


def prepare(folder: Path) -> None:
    """Teacher and text. In a fork, so that the parent of all others has computed nothing."""
    pid = os.fork()
    if pid == 0:
        try:
            tiny_llama(folder / "teacher", tiny_tokenizer(), seed=1)
            (folder / "text.txt").write_text(english(260, seed=3), encoding="utf-8")
            os._exit(0)
        finally:
            os._exit(1)
    if ended(pid, DEADLINE_S) != 0:
        raise RuntimeError("the tiny teacher could not be made")
