"""Claims: small files in `claims/` that say which writer works on what, for as long as it works on it.

    claims/all.0.json          the whole directory, one writer (`CacheWriter`, also a run of `train_student`)
    claims/shard-00007.0.json  one shard, several writers (`SharedCacheWriter`)

Every storage can create a file that must not exist yet; locks of the operating system work on one machine only. A claim
is stale if its process on this machine has ended, or, for another machine, if its heartbeat (a touch every tenth of
`stale_after_s`) is older than `stale_after_s` by the clock of the storage. To take over a stale claim, a writer creates
the next generation (`all.1.json`) and never deletes the old one first, which could delete a newer claim. The highest
generation owns. Claims only save work: the bytes of a shard depend on its rows alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cache_format.cache_errors import CacheError
from cache_format.storage.directory import Directory, is_temporary
from cache_format.wording import quantity

CLAIMS = "claims"
WHOLE = "all"
STALE_AFTER_S = 300.0
HEARTBEATS = 10  # per STALE_AFTER_S
CLOCK_EVERY_S, MOST_PAUSE_S = 60.0, 5.0


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process, identified so that others can tell whether it is still running."""

    host: str
    machine: str  # boot and process namespace: where `pid` means something; empty if unknown
    pid: int
    pid_started: int  # in ticks since boot, because process numbers are reused; 0 if unknown
    since: str  # UTC, for messages
    token: str  # of one `Claims`

    def died(self) -> bool:
        """True only if it certainly ended: it was a process of this machine."""
        if not self.machine or self.machine != _machine():
            return False
        started = _pid_started(self.pid)
        return started is None or (self.pid_started != 0 and started != self.pid_started)


@dataclass(frozen=True)
class Holder:
    """A claim of another writer."""

    name: str
    generation: int
    owner: Owner | None  # None: unreadable, perhaps because it is just being written
    age_s: float | None  # since the last heartbeat; None if the storage has no times
    stale: bool

    def __str__(self) -> str:
        who = "an unknown process"
        if self.owner is not None:
            who = f"process {self.owner.pid} on {self.owner.host}, since {self.owner.since}"
        return who if self.age_s is None else f"{who}, last heard of {_duration(self.age_s)} ago"


class Claims:
    """The claims of one writer in a directory, renewed in the background until `close`."""

    def __init__(self, directory: Directory, stale_after_s: float = STALE_AFTER_S) -> None:
        self._directory = directory
        self.stale_after_s = stale_after_s
        self._owner = this_process()
        self.taken_over: list[Holder] = []  # whose claims were stale
        self._held: dict[str, str] = {}  # name -> file
        self._lost: set[str] = set()
        # Held while a claim is touched or removed: on an object store a touch is a read and a write, and a removal
        # between the two would be undone.
        self._guard = threading.Lock()
        self._closed = threading.Event()
        self._heart: threading.Thread | None = None
        self._clock = -CLOCK_EVERY_S, 0.0  # monotonic time of a look at the storage's clock, its lead over that

    def take(self, name: str) -> Holder | None:
        """Claim `name` unless a living writer has it. Returns: that writer, or None if the claim is ours."""
        if name in self._held:
            return None
        before = self._holder(name)
        if before is not None and not before.stale:
            return before
        file = _file(name, 0 if before is None else before.generation + 1)
        if not self._directory.create_new(file, json.dumps(asdict(self._owner)).encode()):
            return self._holder(name) or Holder(name, 0, None, None, False)  # just released: the caller asks again
        with self._guard:
            self._held[name] = file
        # Meanwhile the stale claim may have been released and taken again, or another writer was faster.
        for holder in self._generations(name):
            faster = holder.owner is not None and holder.owner != self._owner
            if faster and not holder.stale and (before is None or holder.owner != before.owner):
                self.release(name)
                return holder
        if before is not None:
            self.taken_over.append(before)
        self._start_heart()
        return None

    def release(self, name: str) -> None:
        """Release a claim; lower generations first, so that none of them becomes the highest."""
        with self._guard, contextlib.suppress(OSError):  # no space, no network: it becomes stale
            file = self._held.pop(name, None)
            self._lost.discard(name)
            if file is None:
                return
            generation = _parse(file)[1]
            for below in range(generation):
                self._directory.remove(_file(name, below))
            self._directory.remove(file)
            self._directory.remove_folder(CLAIMS)

    def lost(self, name: str) -> bool:
        """Whether somebody else took over a claim of ours, because this process was silent for too long."""
        if name in self._lost or name not in self._held:
            return True
        found = [holder.generation for holder in self._generations(name)]
        return not found or max(found) != _parse(self._held[name])[1]

    def others(self) -> list[Holder]:
        """Claims of other writers that are not stale, sorted by name."""
        highest: dict[str, str] = {}
        for file in sorted(self._files(), key=lambda file: _parse(file)[1]):
            highest[_parse(file)[0]] = file
        found = []
        for name in sorted(highest.keys() - self._held.keys()):
            with contextlib.suppress(FileNotFoundError):  # released meanwhile
                found.append(self._look(highest[name]))
        return [holder for holder in found if not holder.stale]

    def sweep(self) -> None:
        """Remove the claims of all other writers, when nothing is left to claim."""
        for file in self._files():
            if file not in self._held.values():
                self._directory.remove(file)
        self._directory.remove_folder(CLAIMS)

    def close(self) -> None:
        """Release all claims."""
        self._closed.set()
        if self._heart is not None:
            self._heart.join()
        for name in list(self._held):
            self.release(name)

    def _files(self) -> list[str]:
        names = (f"{CLAIMS}/{name}" for name in self._directory.names(CLAIMS) if not is_temporary(name))
        return [name for name in names if _is_claim(name)]

    def _holder(self, name: str) -> Holder | None:
        """The holder of the highest generation of a claim."""
        return max(self._generations(name), key=lambda holder: holder.generation, default=None)

    def _generations(self, name: str) -> list[Holder]:
        found = []
        for file in self._files():
            if _parse(file)[0] != name:
                continue
            with contextlib.suppress(FileNotFoundError):  # released meanwhile
                found.append(self._look(file))
        return found

    def _look(self, file: str) -> Holder:
        name, generation = _parse(file)
        owner = _read_owner(self._directory.read_bytes(file))
        if owner == self._owner:
            return Holder(name, generation, owner, 0.0, False)
        modified = self._directory.modified(file)
        age = None if modified is None else max(0.0, self._now() - modified)
        stale = owner.died() if owner is not None else False
        if not stale and age is not None and age > self.stale_after_s:
            # A living process of this machine keeps its claim, even without heartbeats.
            stale = owner is None or owner.machine != self._owner.machine or not owner.machine
        return Holder(name, generation, owner, age, stale)

    def _now(self) -> float:
        """Time by the storage's clock, measured now and then with a probe file."""
        asked, lead = self._clock
        if time.monotonic() - asked >= CLOCK_EVERY_S:
            probe = f"{CLAIMS}/.now.{secrets.token_hex(4)}.tmp"
            with contextlib.suppress(FileNotFoundError):  # swept meanwhile: keep the last measurement
                self._directory.create_new(probe, b"")
                asked = time.monotonic()
                lead = (self._directory.modified(probe) or 0.0) - asked
                self._clock = asked, lead
            self._directory.remove(probe)
            self._directory.remove_folder(CLAIMS)
        return time.monotonic() + lead

    def _start_heart(self) -> None:
        if self._heart is None:
            self._heart = threading.Thread(target=self._beat, name="cache-claims", daemon=True)
            self._heart.start()

    def _beat(self) -> None:
        while not self._closed.wait(self.stale_after_s / HEARTBEATS):
            for name in list(self._held):
                with self._guard:
                    self._touch(name)

    def _touch(self, name: str) -> None:
        if name not in self._held or self._closed.is_set():
            return
        try:
            self._directory.touch(self._held[name])
        except FileNotFoundError:
            self._lost.add(name)
        except OSError:
            pass  # the next heartbeat may succeed


def this_process() -> Owner:
    return Owner(
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        pid_started=_pid_started(os.getpid()) or 0,
        since=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        token=secrets.token_hex(8),
    )


def refused(directory: Directory, holder: Holder, stale_after_s: float) -> CacheError:
    """The error of a writer that finds another writer at work."""
    what = "this cache" if holder.name == WHOLE else holder.name
    return CacheError(
        f"{directory.path()}: {holder} writes {what}: nothing was changed. Wait for it or stop it; if it is gone, its "
        f"claim ends {_duration(stale_after_s)} after its last sign of life (`stale_after`). To write one cache with "
        "several processes, start all of them with `num_workers` or torchrun."
    )


def wait_for(claims: Claims, name: str) -> None:
    """Take a claim, waiting until it is free."""
    for pause in pauses():
        if claims.take(name) is None:
            return
        time.sleep(pause)


def pauses() -> Iterator[float]:
    """Seconds between two checks, growing without end: short waits are noticed soon, long ones cost little."""
    pause = 0.02
    while True:
        yield pause
        pause = min(1.5 * pause, MOST_PAUSE_S)


def _file(name: str, generation: int) -> str:
    return f"{CLAIMS}/{name}.{generation}.json"


def _parse(file: str) -> tuple[str, int]:
    name, generation, _ = file.rpartition("/")[2].rsplit(".", 2)
    return name, int(generation)


def _is_claim(file: str) -> bool:
    parts = file.rpartition("/")[2].rsplit(".", 2)
    return len(parts) == 3 and parts[1].isdecimal() and parts[2] == "json"


def _read_owner(data: bytes) -> Owner | None:
    try:
        raw = json.loads(data)
        known: dict[str, Any] = {f.name: raw[f.name] for f in fields(Owner)}
        numbers = known.pop("pid"), known.pop("pid_started")
        return Owner(pid=int(numbers[0]), pid_started=int(numbers[1]), **{k: str(v) for k, v in known.items()})
    except (ValueError, TypeError, KeyError):
        return None


def _machine() -> str:
    """Boot and process namespace; equal where a process number means the same process. Empty if not Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _pid_started(pid: int) -> int | None:
    """Start time in ticks since boot; None if there is no such process, or only a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])


def _duration(seconds: float) -> str:
    if seconds < 120:
        return quantity(round(seconds), "second")
    return quantity(round(seconds / 60), "minute") if seconds < 7200 else quantity(round(seconds / 3600), "hour")
