"""Several students from one pass over a cache: each batch is read and collated once, everything else is each one's own.

Every student is a whole run of `train.perform` in a thread of its own: its own Trainer, optimizer, schedule, clipping,
log, checkpoints, early stop. Only one thread runs at a time. Before every batch a student hands the turn on, and
goes on when it comes back: they advance in lockstep, batch by batch, and the batch that the first of them has read is
still there for the others. With the turn go the states of the global random generators, so that dropout sees what it
would see alone. Hence **each equals its own single run, bit by bit**; nothing is summed, shared or re-implemented.

Held-out evaluations are shared the same way. Students that a resume finds at different steps are merely out of phase:
their batches are read again, and are right. Threads, not processes: the students must fit side by side on one device.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

import cache_format as cf
from cache_format.cache_errors import DistillError
from pipeline.errors import ConfigError
from pipeline.student.data.dataset import Batch
from pipeline.student.data.mixed_dataset import Rows
from pipeline.student.train_config import TrainStudentConfig
from pipeline.student.training.output_directory import CONFIG_FILE, is_finished, last_checkpoint
from pipeline.student.training.train import TrainSummary, perform
from pipeline.student.validation.run_checks import CheckedRun, check_run

BATCHES_KEPT = 2
"""In lockstep one is enough; the second is there where training and evaluation meet."""


def train_students(
    config: TrainStudentConfig,
    students: Sequence[str],
    *,
    on_stage: Callable[[str], None] = lambda _: None,
    on_step: Callable[[int, int], None] = lambda step, total: None,
    on_log: Callable[[dict[str, Any]], None] = lambda _: None,
    on_warning: Callable[[str], None] = lambda _: None,
) -> dict[str, TrainSummary]:
    """Trains `students`, all by one configuration, into OUTPUT/NAME each; `config.student` is not looked at.

    Args:
        on_step: gets the step of the one that is furthest behind.
        on_log: logs have the "student" they are of besides.

    Returns: a summary for each one that had something left to do.

    Raises: as `train_student`, before anything is touched if any of them cannot be trained.
    """
    runs = _check(config, students)
    for name, run in runs.items():
        for warning in run.warnings:
            on_warning(f"{name}: {warning}")
    turns, shared = _Turns(len(runs)), _SharedBatches()
    summaries: dict[str, TrainSummary] = {}
    failed: list[BaseException] = []
    steps = dict.fromkeys(runs, 0)

    def report_step(name: str, step: int, total: int) -> None:
        steps[name] = step
        on_step(min(steps.values()), total)

    def train(place: int, name: str, run: CheckedRun) -> None:
        try:
            turns.wait(place)
            summaries[name] = perform(
                run,
                on_stage=lambda text: on_stage(f"{name}: {text}"),
                on_step=lambda step, total: report_step(name, step, total),
                on_log=lambda logs: on_log({**logs, "student": name}),
                when_loaded=lambda: turns.hand_on(place),  # the turn comes back when all of them have been loaded
                shared=lambda rows: _SharedRows(rows, shared, lambda: turns.hand_on(place)),
            )
            del steps[name]
        except _Cancelled:
            pass
        except BaseException as error:  # also an interrupt: for the thread that waits for this one
            failed.append(_named(name, error))
            turns.cancel()
        finally:
            turns.leave(place)

    threads = [
        threading.Thread(target=train, args=(place, name, run), name=name, daemon=True)
        for place, (name, run) in enumerate(runs.items())
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # so that signals are seen
    except BaseException:
        turns.cancel()
        for thread in threads:
            thread.join()
        raise
    if failed:
        raise failed[0]
    return {name: summaries[name] for name in runs}


def _check(config: TrainStudentConfig, students: Sequence[str]) -> dict[str, CheckedRun]:
    """The runs that are to be made, by name. Nothing is touched."""
    names: dict[str, str] = {}
    output = Path(config.output).expanduser()
    for student in students:
        name = Path(student).expanduser().resolve().name if Path(student).exists() else student.rpartition("/")[2]
        name = name.removesuffix(".gguf")
        if name in names:
            raise ConfigError(
                f"--student {student}: {names[name]} is called {name} too, and each gets a directory of its name in "
                f"{output}. Rename one of them."
            )
        names[name] = student
    if (output / CONFIG_FILE).is_file():
        raise ConfigError(
            f"{output}: holds one student, expected a directory for several. Choose another --output, or give one "
            "--student."
        )
    runs = {}
    for name, student in names.items():
        own = replace(config, student=student, output=str(output / name))
        if config.resume:
            if is_finished(output / name):
                continue
            if last_checkpoint(output / name) is None:  # interrupted before its first one, but after another's
                own = replace(own, resume=False, overwrite=(output / name / CONFIG_FILE).is_file())
        try:
            runs[name] = check_run(own)
        except DistillError as error:
            raise _named(name, error) from error
    if not runs or (
        config.resume and all(run.resume_from is None for run in runs.values()) and len(runs) == len(names)
    ):
        what = "found no checkpoint to resume from. Start without --resume" if runs else "found finished runs only"
        raise ConfigError(f"{output}: {what}, or choose another --output.")
    for run in runs.values():
        for refused, found, why in (
            (run.arguments.world_size > 1, f"{run.arguments.world_size} processes", "batches are shared within one"),
            (run.arguments.dataloader_num_workers > 0, "--num-workers", "a worker would read for one student alone"),
            (run.config.cross_tokenizer is not None, "--cross-tokenizer", "each would need batches in its own tokens"),
            (bool(run.arguments.report_to), f"report_to {run.arguments.report_to}", "such a log is of one run"),
        ):
            if refused:
                raise ConfigError(f"several students with {found}: {why}. Leave it out, or train them one by one.")
    return runs


def _named(name: str, error: BaseException) -> BaseException:
    if not isinstance(error, DistillError) or str(error).startswith(f"{name}: "):
        return error
    named = type(error)(f"{name}: {error}")
    named.__cause__ = error
    return named


class _Cancelled(BaseException):
    """Another student has failed, or the user has had enough."""


class _Turns:
    """Lets one of several threads run at a time, each in its turn, with random generators of its own."""

    def __init__(self, count: int) -> None:
        self._changed = threading.Condition()
        self._ring = list(range(count))
        self._current = 0
        self._cancelled = False
        self._states: dict[int, Callable[[], None]] = dict.fromkeys(range(count), _random_state())

    def wait(self, place: int) -> None:
        """Until it is this one's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or self._current == place)
            if self._cancelled:
                raise _Cancelled
        self._states[place]()

    def hand_on(self, place: int) -> None:
        """The turn goes to the next; returns when it has come back."""
        if self._ring == [place] and not self._cancelled:
            return
        self._states[place] = _random_state()
        with self._changed:
            self._current = self._after(place)
            self._changed.notify_all()
        self.wait(place)

    def leave(self, place: int) -> None:
        """For good."""
        with self._changed:
            if self._current == place:
                self._current = self._after(place)
            self._ring.remove(place)
            self._changed.notify_all()

    def cancel(self) -> None:
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    def _after(self, place: int) -> int:
        return self._ring[(self._ring.index(place) + 1) % len(self._ring)]


def _random_state() -> Callable[[], None]:
    """Puts the global generators back to what they are now."""
    states: list[tuple[Callable[[Any], None], Any]] = [
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),
        (torch.set_rng_state, torch.get_rng_state()),
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    if torch.backends.mps.is_available():
        states.append((torch.mps.set_rng_state, torch.mps.get_rng_state()))

    def restore() -> None:
        for set_state, state in states:
            set_state(state)

    return restore


class _SharedBatches:
    """The last batches that were read, by dataset and rows."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, tuple[int, ...]], Batch] = {}

    def get(self, name: str, indices: Sequence[int], read: Callable[[], Batch]) -> Batch:
        key = (name, tuple(indices))
        batch = self._kept.pop(key, None) or read()
        self._kept[key] = batch
        while len(self._kept) > BATCHES_KEPT:
            del self._kept[next(iter(self._kept))]
        return dict(batch)


class _SharedRows(Dataset[cf.CacheRow]):
    """Gives whole batches of `rows`, read by whichever student came first; `hand_on` is called before each."""

    def __init__(self, rows: Rows, shared: _SharedBatches, hand_on: Callable[[], None]) -> None:
        self.rows, self.shared, self.hand_on = rows, shared, hand_on
        self.sampler = rows.sampler

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> cf.CacheRow:
        return self.rows[index]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        self.hand_on()
        return self.shared.get(self.rows.name, indices, lambda: self.rows.collate(self.rows.__getitems__(indices)))

    def collate(self, rows: Any) -> Batch:
        return rows if isinstance(rows, dict) else self.rows.collate(rows)
