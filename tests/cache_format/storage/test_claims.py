"""Claims: of several that want one thing one gets it, the dead lose theirs, the living do not."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cache_format.storage import directory as storage
from cache_format.storage.claims import CLAIMS, Claims, refused, this_process
from cache_format.storage.directory import LocalDirectory, open_directory

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(params=["local", "memory"])
def directory(request, tmp_path) -> storage.Directory:
    return open_directory(tmp_path if request.param == "local" else f"memory://claims-{uuid.uuid4().hex}")


@pytest.fixture(autouse=True)
def no_heart_goes_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Claims that a test abandons would touch their files in the background of later tests."""
    made: list[Claims] = []
    begin = Claims.__init__

    def remembered(self: Claims, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(Claims, "__init__", remembered)
    yield
    for claims in made:
        claims._closed.set()


def plant(directory: storage.Directory, name: str, age_s: float = 0.0, **owner: Any) -> None:
    """Somebody else's claim."""
    data = json.dumps(asdict(replace(this_process(), **owner))).encode()
    assert directory.create_new(f"{CLAIMS}/{name}.0.json", data)
    if isinstance(directory, LocalDirectory):
        then = time.time() - age_s
        os.utime(directory.root / f"{CLAIMS}/{name}.0.json", (then, then))
    else:
        store = directory.fs.store[directory.full(f"{CLAIMS}/{name}.0.json")]
        store.modified = type(store.modified).fromtimestamp(time.time() - age_s, store.modified.tzinfo)


ELSEWHERE = {"host": "other", "machine": "another boot", "pid": 1}


def test_of_two_one_gets_it_and_the_other_learns_who(directory):
    first, second = Claims(directory), Claims(directory)
    assert first.take("shard-00001") is None
    assert first.take("shard-00001") is None  # has it already
    holder = second.take("shard-00001")
    assert holder is not None and holder.owner is not None and holder.owner.pid == os.getpid()
    assert str(refused(directory, holder, 300.0)).startswith(f"{directory.path()}: process {os.getpid()} on ")
    assert second.take("shard-00002") is None
    assert [h.name for h in first.others()] == ["shard-00002"]
    first.release("shard-00001")
    assert second.take("shard-00001") is None
    assert not second.lost("shard-00001") and first.lost("shard-00001")
    second.close()
    assert directory.names(CLAIMS) == []


def test_names_of_claims_leave_no_folder(tmp_path):
    claims = Claims(open_directory(tmp_path))
    claims.take("all")
    assert (tmp_path / CLAIMS / "all.0.json").exists()
    claims.close()
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from cache_format.storage.claims import Claims
from cache_format.storage.directory import open_directory
assert Claims(open_directory(sys.argv[1])).take("all") is None
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the age tells")
def test_claim_of_a_killed_process_of_this_machine_is_taken_over_at_once(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    while not (tmp_path / CLAIMS / "all.0.json").exists():
        time.sleep(0.01)
    claims = Claims(open_directory(tmp_path))
    while process.poll() is None and claims.take("all") is not None:  # first alive, then dead, then collected
        time.sleep(0.01)
    process.wait()
    assert claims.take("all") is None
    assert [holder.owner.pid for holder in claims.taken_over] == [process.pid]
    assert sorted(os.listdir(tmp_path / CLAIMS)) == ["all.0.json", "all.1.json"]
    claims.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the age tells")
def test_another_process_with_the_number_of_the_dead_one_does_not_keep_its_claim(tmp_path):
    directory = open_directory(tmp_path)
    plant(directory, "all", pid_started=this_process().pid_started - 1)
    assert Claims(directory).take("all") is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the age tells")
def test_living_process_of_this_machine_keeps_its_claim_however_long_it_is_silent(directory):
    plant(directory, "all", age_s=1e6)
    holder = Claims(directory).take("all")
    assert holder is not None and holder.age_s == pytest.approx(1e6, abs=5)
    assert "last heard of 278 hours ago" in str(refused(directory, holder, 300.0))


def test_process_of_another_machine_loses_its_claim_by_silence_alone(directory):
    plant(directory, "all", age_s=290.0, **ELSEWHERE)
    claims = Claims(directory, stale_after_s=300.0)
    assert claims.take("all") is not None and len(claims.others()) == 1
    assert Claims(directory, stale_after_s=280.0).others() == []
    assert Claims(directory, stale_after_s=280.0).take("all") is None


def test_unreadable_claim_is_somebody_s_until_it_is_old(directory):
    assert directory.create_new(f"{CLAIMS}/all.0.json", b"{half a cla")
    holder = Claims(directory, stale_after_s=0.5).take("all")
    assert holder is not None and holder.owner is None and "an unknown process" in str(holder)
    time.sleep(0.6)
    assert Claims(directory, stale_after_s=0.5).take("all") is None


class SlowTouch:
    """An object store: a touch reads the file and writes it, here with a long pause between the two."""

    def __init__(self, directory: storage.Directory) -> None:
        self.directory, self.reading, self.done = directory, threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.directory, name)

    def touch(self, name: str) -> None:
        data = self.directory.read_bytes(name)
        self.reading.set()
        time.sleep(0.3)
        self.directory.fs.pipe_file(self.directory.full(name), data)
        self.done.set()


@pytest.mark.parametrize("end", ["release", "close"])
def test_heartbeat_does_not_bring_a_released_claim_back(end: str) -> None:
    slow = SlowTouch(open_directory(f"memory://claims-{uuid.uuid4().hex}"))
    claims = Claims(slow, stale_after_s=0.1)  # type: ignore[arg-type]
    assert claims.take("all") is None and slow.reading.wait(10)
    claims.release("all") if end == "release" else claims.close()
    assert slow.done.wait(10) and slow.directory.names(CLAIMS) == []
    assert Claims(slow.directory).take("all") is None


def test_no_heart_beats_after_close(directory) -> None:
    claims = Claims(directory)
    assert claims.take("all") is None
    claims.close()
    assert not claims._heart.is_alive()


@pytest.mark.long
def test_heart_keeps_a_claim_alive(directory):
    plant(directory, "all", **ELSEWHERE)
    owner = directory.read_bytes(f"{CLAIMS}/all.0.json")
    claims = Claims(directory, stale_after_s=1.0)
    claims._held["all"] = f"{CLAIMS}/all.0.json"  # as if we were that machine
    claims._start_heart()
    other = Claims(directory, stale_after_s=1.0)
    until = time.monotonic() + 1.8
    while time.monotonic() < until:
        assert other.take("all") is not None
        time.sleep(0.1)
    claims._closed.set()
    time.sleep(1.2)
    assert other.take("all") is None
    assert directory.read_bytes(f"{CLAIMS}/all.0.json") == owner  # never deleted by who takes over


def test_suspended_owner_learns_that_it_has_lost(directory):
    slow = Claims(directory, stale_after_s=300.0)
    assert slow.take("shard-00000") is None
    (file,) = directory.names(CLAIMS)
    directory.remove(f"{CLAIMS}/{file}")  # as if it were of another machine, and old
    plant(directory, "shard-00000", age_s=301.0, **ELSEWHERE)
    assert not slow.lost("shard-00000")  # nobody has wanted it
    quick = Claims(directory, stale_after_s=300.0)
    assert quick.take("shard-00000") is None
    assert slow.lost("shard-00000") and not quick.lost("shard-00000")
    slow.release("shard-00000")
    assert not quick.lost("shard-00000")


def test_of_many_that_find_a_stale_claim_one_takes_it_over(directory):
    for round_ in range(5):
        plant(directory, f"shard-{round_}", age_s=400.0, **ELSEWHERE)
        everybody = [Claims(directory) for _ in range(8)]
        start = threading.Barrier(8)
        got: list[Claims] = []

        def take(claims: Claims, round_: int = round_, start: Any = start, got: list[Claims] = got) -> None:
            start.wait()
            if claims.take(f"shard-{round_}") is None:
                got.append(claims)

        threads = [threading.Thread(target=take, args=(claims,)) for claims in everybody]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1
        assert [claims for claims in everybody if not claims.lost(f"shard-{round_}")] == got
        got[0].close()
        assert directory.names(CLAIMS) == []


def test_sweeping_leaves_only_what_is_held(tmp_path):
    directory = open_directory(tmp_path)
    plant(directory, "shard-00003", **ELSEWHERE)
    claims = Claims(directory)
    claims.take("manifest")
    claims.sweep()
    assert directory.names(CLAIMS) == ["manifest.0.json"]


# -- creating what must not exist yet ----------------------------------------------------------------------------------


def test_new_file_is_whole_or_not_there(tmp_path, monkeypatch):
    directory = LocalDirectory(tmp_path)
    link = os.link
    seen = []

    def looking(source: Path, final: Path) -> None:
        seen.append((Path(source).read_bytes(), Path(final).exists()))
        link(source, final)

    monkeypatch.setattr(os, "link", looking)
    assert directory.create_new("a/b.json", b"contents")
    assert not directory.create_new("a/b.json", b"others")
    assert seen == [(b"contents", False), (b"others", True)]
    assert (tmp_path / "a/b.json").read_bytes() == b"contents"
    assert os.listdir(tmp_path / "a") == ["b.json"]


def test_file_system_without_hard_links(tmp_path, monkeypatch):
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    directory = LocalDirectory(tmp_path)
    assert directory.create_new("a/b.json", b"contents")
    assert not directory.create_new("a/b.json", b"others")
    assert (tmp_path / "a/b.json").read_bytes() == b"contents"
    assert os.listdir(tmp_path / "a") == ["b.json"]


def test_link_whose_answer_was_lost_was_made(tmp_path, monkeypatch):
    """NFS repeats a request that was not answered, and the repetition finds the file."""
    link = os.link

    def repeated(source: Path, final: Path) -> None:
        link(source, final)
        link(source, final)

    monkeypatch.setattr(os, "link", repeated)
    assert LocalDirectory(tmp_path).create_new("a.json", b"contents")


def test_full_disk_leaves_no_half_a_claim(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "_fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Claims(LocalDirectory(tmp_path)).take("all")
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []
