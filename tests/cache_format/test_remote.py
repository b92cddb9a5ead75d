"""Caches on an object store that loses connections, answers 500 and cuts bodies short."""

from __future__ import annotations

import errno
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import cache_format as cf
from cache_format import remote
from cache_format.read_cache import ReadCache
from cache_format.remote import RemoteDirectory, is_transient, repeated
from cache_format.storage import open_directory, write_bytes
from cache_samples import SHARD, contents, sample_metadata, sample_row, several_samples, write_sample
from faults import Outcome, downloaded, faults_of, one_round

FILES = {"tokenizer.json": b"{}"}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote, "LONGEST_WAIT_S", 0.01)


# -- repeating --------------------------------------------------------------------------------------------------------


class Failing:
    """An operation that fails so many times, then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def test_what_may_pass_is_repeated():
    operation = Failing(ConnectionResetError(), TimeoutError(), OSError(errno.EBUSY, "SlowDown"), EOFError())
    assert repeated(operation, "s3://x") == "done" and operation.calls == 5


def test_what_never_passes_is_not():
    for error in (FileNotFoundError("x"), PermissionError("x"), FileExistsError("x"), ZeroDivisionError()):
        operation = Failing(error)
        with pytest.raises(type(error)):
            repeated(operation, "s3://x")
        assert operation.calls == 1


def test_giving_up_says_where_and_why(monkeypatch: pytest.MonkeyPatch):
    waits: list[float] = []
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 1.0)
    monkeypatch.setattr(remote, "LONGEST_WAIT_S", 15.0)
    monkeypatch.setattr(time, "sleep", waits.append)
    operation = Failing(*[ConnectionResetError("by peer")] * 20)
    with pytest.raises(OSError, match="gave up after 8 attempts in 0 s .ConnectionResetError: by peer.") as caught:
        repeated(operation, "s3://bucket/x")
    assert caught.value.filename == "s3://bucket/x" and caught.value.errno == errno.EIO
    assert operation.calls == remote.ATTEMPTS == len(waits) + 1
    assert all(0.5 * 2**i <= wait <= 2**i for i, wait in enumerate(waits[:4])) and max(waits) <= 15.0


def test_missing_credentials_are_not_waited_for():
    from botocore.exceptions import EndpointConnectionError, NoCredentialsError

    assert is_transient(EndpointConnectionError(endpoint_url="http://x"))
    operation = Failing(NoCredentialsError())
    with pytest.raises(OSError, match="NoCredentialsError"):
        repeated(operation, "s3://x")
    assert operation.calls == 1


# -- over a network ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    from s3 import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture(autouse=True)
def sound_again(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").spoil({})


def written(url: str | Path, rows: int = 10, **changes: Any) -> cf.CacheMetadata:
    """In two runs, the second resuming."""
    metadata = sample_metadata(rows, **changes)
    with pytest.raises(KeyboardInterrupt):
        with cf.CacheWriter(url, metadata, tokenizer_files=FILES) as writer:
            writer.write([sample_row(row) for row in range(6)])
            raise KeyboardInterrupt
    with cf.CacheWriter(url, metadata, tokenizer_files=FILES, resume=True) as writer:
        assert writer.next_row == 4
        writer.write([sample_row(row) for row in range(4, rows)])
    return metadata


@pytest.mark.parametrize("encoding", ["columns", pytest.param("packed", marks=pytest.mark.slow)])
def test_a_cache_on_s3_has_the_same_bytes(server: Any, tmp_path: Path, encoding: str):
    written(server.url(encoding), encoding=encoding, **several_samples(1))
    written(tmp_path / "cache", encoding=encoding, **several_samples(1))
    assert downloaded(server.url(encoding)) == contents(tmp_path / "cache")
    assert cf.verify_cache(server.url(encoding)) == cf.verify_cache(tmp_path / "cache")
    assert isinstance(open_directory(server.url("x")), RemoteDirectory)


@pytest.mark.slow
def test_nothing_is_lost_to_faults(server: Any, tmp_path: Path):
    """Written, resumed, verified and read at random, with one request in seven spoilt. `make faults` does thousands."""
    outcome = Outcome(share=0.15)
    for seed in (0, 1):  # straight, and through a local copy
        one_round(server, tmp_path, seed, 14, outcome)
    assert outcome.lost == []
    assert outcome.rows_read == 28 and sum(outcome.requests.values()) > 100
    assert len(outcome.injected) >= 5, outcome.injected


WRITER = """
import sys, time
sys.path[:0] = [{root!r}, {here!r}]
import cache_format as cf
from cache_format import remote
from cache_samples import sample_metadata, sample_row, several_samples

remote.FIRST_WAIT_S, remote.LONGEST_WAIT_S = 0.001, 0.01
url, index = sys.argv[1], int(sys.argv[2])
metadata = sample_metadata(26, **several_samples(1))
share = cf.Share(index=index, count=2)
with cf.SharedCacheWriter(url, metadata, share=share, tokenizer_files={files!r}) as writer:
    while (shard := writer.begin_shard()) is not None:
        print(shard, flush=True)
        for row in metadata.shard_rows(shard):
            writer.write([sample_row(row)])
            time.sleep({pause})
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.2])  # in the middle of a shard, and of its upload
def test_of_two_writers_one_is_killed_and_the_store_holds_what_a_disk_holds(server: Any, tmp_path: Path, delay: float):
    """With one request in seven spoilt; of the one that is killed a claim is left, and perhaps half a shard."""
    here = Path(__file__).resolve().parent
    code = WRITER.format(root=str(here.parents[1]), here=str(here), files=FILES, pause=0.02)
    url = server.url(f"killed-{delay}")
    server.spoil(faults_of(0.15))

    def start(index: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, url, str(index)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    victim = start(1)
    assert victim.stdout is not None
    assert [int(victim.stdout.readline()) for _ in range(2)] == [1, 3]
    survivor = start(0)  # when the other has something to lose
    time.sleep(delay)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    assert open_directory(url).names("claims") != []
    done, problem = survivor.communicate(timeout=100)
    assert survivor.returncode == 0, problem
    assert {int(shard) for shard in done.split()} >= {0, 2, 4, 6}
    assert sum(server.counts()["injected"].values()) >= 10
    server.spoil({})
    metadata = sample_metadata(26, **several_samples(1))
    with cf.CacheWriter(tmp_path / "cache", metadata, tokenizer_files=FILES) as writer:
        writer.write([sample_row(row) for row in range(26)])
    assert downloaded(url) == contents(tmp_path / "cache")
    assert open_directory(url).names("claims") == []


@pytest.mark.slow
def test_a_server_that_is_gone_is_named_in_one_line(server: Any, monkeypatch: pytest.MonkeyPatch):
    from click.testing import CliRunner
    from s3fs import S3FileSystem

    from cli import main

    written(server.url("gone"))
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    server.spoil({}, down=True)
    url = server.url("gone")
    result = CliRunner().invoke(main, ["verify", url])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert f"{url}/manifest.json: gave up after 2 attempts" in line and "Check the connection" in line
    server.spoil({})
    with pytest.raises(cf.FormatError, match="no such directory"):
        cf.open_cache(server.url("never-was"))


@pytest.mark.slow
def test_what_somebody_else_has_just_created_is_found(server: Any):
    """s3fs remembers listings, in which it is missing."""
    from s3fs import S3FileSystem

    directory = open_directory(server.url("new"))
    write_bytes(directory, "old", b"")
    assert directory.names() == ["old"]
    other = S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    other.pipe_file(f"{server.bucket}/new/file", b"data")
    assert directory.read_bytes("file") == b"data"


def test_reading_survives_a_fork(server: Any):
    written(server.url("fork"))
    cache = cf.open_cache(server.url("fork"))
    cache[0]
    child = os.fork()
    if not child:
        os._exit(0 if cache[9].row == 9 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pickle.loads(pickle.dumps(cache))[5].row == 5


# -- stores that are not there ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url, words",
    [
        ("gs://bucket/cache", "gs:// needs a package that is not here .*gcsfs.* pip install gcsfs"),
        ("s4://bucket/cache", "found s4://, expected .* s3://bucket/cache .*Check the spelling"),
    ],
)
def test_a_store_that_fsspec_has_nothing_for_is_one_line(url: str, words: str, monkeypatch: pytest.MonkeyPatch):
    from click.testing import CliRunner

    from cli import main

    monkeypatch.setitem(sys.modules, "gcsfs", None)  # where it is installed too
    for command in (["verify", url], ["cache-teacher", "--teacher", "t", "--data", "d.txt", "--output", url]):
        result = CliRunner().invoke(main, command)
        (line,) = result.stderr.splitlines()
        assert result.exit_code == 1 and re.search(f"^Error: {re.escape(url)}: {words}", line), line


def test_a_repository_of_the_hub_is_read_and_not_written():
    url = "hf://datasets/owner/name"
    assert isinstance(open_directory(url), RemoteDirectory)
    for write in (
        cf.check_writable,
        cf.remove_cache,
        cf.finish_cache,
        lambda url: cf.CacheWriter(url, sample_metadata()),
    ):
        with pytest.raises(
            cf.CacheError, match="can be read as a cache, not written.* distill push DIRECTORY OWNER/NAME"
        ):
            write(url)


# -- what a repetition could spoil ------------------------------------------------------------------------------------


class Fickle:
    """fsspec's memory file system, whose answers can get lost or cut."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.fs, self.root = fsspec.core.url_to_fs(url)
        self.plan: dict[str, list[Any]] = {}  # method -> what happens to its next calls

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.fs, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            step = self.plan.get(name, [])
            change = step.pop(0) if step else None
            return real(*args, **kwargs) if change is None else change(lambda: real(*args, **kwargs))

        return call if callable(real) else real


@pytest.fixture()
def fickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RemoteDirectory, Fickle]:
    url = f"memory://{tmp_path.name}"
    found = Fickle(url)
    monkeypatch.setattr(remote, "_file_system", lambda *_: found)
    directory = open_directory(url)
    assert isinstance(directory, RemoteDirectory)
    return directory, found


def lost_answer(call: Any) -> None:
    call()
    raise ConnectionResetError


def test_a_file_that_was_created_although_the_answer_got_lost_is_ours(fickle: Any):
    directory, fs = fickle
    fs.plan["pipe_file"] = [lost_answer]
    assert directory.create_new("claim", b"mine")
    assert not directory.create_new("claim", b"yours")
    fs.plan["pipe_file"] = [lambda call: (_ for _ in ()).throw(ConnectionResetError())]
    assert not directory.create_new("claim", b"yours")  # not even after a failure


def test_so_is_one_that_the_client_library_created_twice(fickle: Any):
    """botocore and s3fs repeat requests themselves, and are then told that the file is there."""
    directory, fs = fickle

    def twice(call: Any) -> None:
        call()
        call()

    fs.plan["pipe_file"] = [twice]
    assert directory.create_new("claim", b"mine")
    assert not directory.create_new("claim", b"yours")


def test_an_upload_of_which_a_part_is_missing_is_made_again(fickle: Any):
    directory, fs = fickle

    def half(call: Any) -> None:
        call()
        fs.fs.store[f"{directory.root}/file"].truncate(3)

    fs.plan["put_file"] = [half]
    write_bytes(directory, "file", b"whole file")
    assert directory.read_bytes("file") == b"whole file"
    assert not fs.plan["put_file"]


def test_a_body_cut_short_is_fetched_again(fickle: Any):
    directory, fs = fickle
    write_bytes(directory, "file", bytes(range(100)))
    fs.plan["cat_file"] = [lambda call: call()[:7], lambda call: b""]
    assert directory.read_bytes("file") == bytes(range(100))
    fs.plan["cat_file"] = [lambda call: call()[:7]]
    assert directory.open("file").read(10, 20) == pa.py_buffer(bytes(range(10, 20)))


def test_a_part_spoilt_on_its_way_is_read_again_and_one_spoilt_at_rest_is_not_believed(fickle: Any):
    directory, fs = fickle
    write_sample(directory.url)
    cache = cf.open_cache(directory.url)

    def flipped(call: Any) -> bytes:
        data = bytearray(call())
        data[len(data) // 2] ^= 1
        return bytes(data)

    fs.plan["cat_file"] = [None, None, None, flipped, flipped]  # sidecar, header, footer, then the rows
    assert cache[0].row == 0 and not fs.plan["cat_file"]
    fs.plan["cat_file"] = [flipped] * 3
    with pytest.raises(cf.CorruptShardError, match="record batch 1: checksum"):
        cache[2]


# -- a local copy of what was read ------------------------------------------------------------------------------------


def reads(fs: Fickle, action: Any) -> int:
    """How many parts were fetched meanwhile."""
    seen: list[int] = []

    def watched(call: Any) -> Any:
        seen.append(1)
        return call()

    fs.plan["cat_file"] = [watched] * 1000
    action()
    fs.plan["cat_file"] = []
    return len(seen)


def test_a_second_epoch_fetches_no_rows(fickle: Any, tmp_path: Path):
    directory, fs = fickle
    write_sample(directory.url)

    def epoch(limit: int) -> int:
        cache = cf.open_cache(directory.url, read_cache=ReadCache(tmp_path / "copies", limit))
        return reads(fs, lambda: [cache[i].row for i in range(10)])

    parts, sidecars = 1 + 3 + 5, 3  # header (the same in all three shards), footers, record batches; sidecars are small
    assert epoch(10**6) == parts + sidecars
    assert epoch(10**6) == sidecars
    for file in (tmp_path / "copies").rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged" + file.read_bytes()[7:])
    assert epoch(10**6) == parts + sidecars  # noticed, and mended
    assert epoch(10**6) == sidecars


def test_the_copy_stays_below_its_limit_and_keeps_what_was_used_last(tmp_path: Path):
    copies = ReadCache(tmp_path, 100_000)
    favourite = "ab" * 32
    copies.put(favourite, pa.py_buffer(b"x" * 1000))
    for i in range(250):
        copies.put(f"{i:064x}"[::-1], pa.py_buffer(bytes(1000)))
        if i % 3 == 0:
            found = copies.get(favourite)
            assert found is not None and found.to_pybytes() == b"x" * 1000
        time.sleep(0.0005)  # file times must tell them apart
        if i % 10 == 0:
            total = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
            assert total <= 105_000
    assert copies.get(f"{249:064x}"[::-1]) is not None and copies.get(f"{0:064x}"[::-1]) is None
    assert 80_000 < total


def test_what_does_not_fit_or_cannot_be_written_is_no_error(tmp_path: Path):
    copies = ReadCache(tmp_path / "copies", 100)
    copies.put("aa" * 32, pa.py_buffer(bytes(101)))
    assert copies.get("aa" * 32) is None and not (tmp_path / "copies").exists()
    (tmp_path / "file").write_bytes(b"")
    blocked = ReadCache(tmp_path / "file", 1000)
    blocked.put("aa" * 32, pa.py_buffer(b"1"))
    assert blocked.get("aa" * 32) is None


def test_a_local_cache_needs_no_copy(tmp_path: Path):
    write_sample(tmp_path / "cache")
    cache = cf.open_cache(tmp_path / "cache", read_cache=ReadCache(tmp_path / "copies", 10**6))
    assert cache[3].row == 3 and not (tmp_path / "copies").exists()
    assert (tmp_path / "cache" / SHARD).exists()
