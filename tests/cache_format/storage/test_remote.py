"""Caches on an object store that loses connections, answers 500 and cuts bodies short."""

from __future__ import annotations

import errno
import re
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import cache_format as cf
from cache_format.storage import remote
from cache_format.storage.directory import open_directory, write_bytes
from cache_format.storage.read_cache import ReadCache
from cache_format.storage.remote import RemoteDirectory, is_transient, repeated
from cache_samples import SHARD, sample_metadata, sample_row, several_samples, write_sample

pytestmark = pytest.mark.usefixtures("short_waits")


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


@pytest.mark.parametrize("name", ["NoCredentialsError", "PermissionError"])
def test_missing_credentials_say_what_to_set(name: str, fickle: Any):
    from botocore.exceptions import NoCredentialsError
    from click.testing import CliRunner

    from cli import main

    def refused(call: Any) -> None:
        raise NoCredentialsError if name == "NoCredentialsError" else PermissionError("Forbidden")

    directory, fs = fickle
    fs.plan["cat_file"] = [refused]
    url = f"s3://bucket/{directory.root.strip('/')}"
    result = CliRunner().invoke(main, ["verify", url])
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: {url}/manifest.json: {name}")
    assert "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE" in line and "permissions" not in line


@pytest.mark.parametrize("name", ["shard-00001.arrow", "shard-00001.json", "tokenizer.json", "lexicon.arrow"])
def test_a_failure_of_the_store_is_not_a_damaged_or_missing_file(
    name: str, fickle: Any, monkeypatch: pytest.MonkeyPatch
):
    from click.testing import CliRunner

    from cli import main

    directory, fs = fickle
    write_sample(directory.url, encoding="packed", **several_samples(1))
    cat = fs.fs.cat_file

    def broken(path: str, *args: Any, **options: Any) -> bytes:
        if path.endswith(name):
            raise ConnectionResetError("by peer")
        return bytes(cat(path, *args, **options))

    monkeypatch.setattr(type(fs.fs), "cat_file", lambda _, *args, **options: broken(*args, **options))
    result = CliRunner().invoke(main, ["verify", directory.url])
    line = result.stderr.splitlines()[-1]
    assert result.exit_code == 1
    assert re.match(rf"Error: {directory.url}/.*{name}: gave up after 8 attempts", line), line
    assert line.endswith("Check the connection (or the disk), and run the same command again.")


# -- stores that are not there ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url, words",
    [
        ("gs://bucket/cache", "gs:// needs a package that is not installed .*gcsfs.* pip install gcsfs"),
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


@pytest.mark.parametrize(
    "url, words",
    [
        ("hf://datasets/owner/name", "can be read as a cache, not written.* distill push DIRECTORY OWNER/NAME"),
        ("https://host/cache", "can be read as a cache, not written. Write to a directory"),
    ],
)
def test_what_is_not_a_store_is_read_and_not_written(url: str, words: str):
    assert isinstance(open_directory(url), RemoteDirectory)
    for write in (
        cf.check_writable,
        cf.remove_cache,
        cf.finish_cache,
        lambda url: cf.CacheWriter(url, sample_metadata()),
    ):
        with pytest.raises(cf.CacheError, match=words):
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


# -- several parts at once --------------------------------------------------------------------------------------------


def test_what_is_asked_for_together_is_fetched_together(fickle: Any):
    """Each part once, several waits at a time; an error is that of reading it, where it is used."""
    directory, fs = fickle
    metadata = sample_metadata(40, rows_per_shard=20, rows_per_record_batch=2)
    with cf.CacheWriter(directory.url, metadata) as writer:
        writer.write([sample_row(row) for row in range(40)])
    cache = cf.open_cache(directory.url, cached_record_batches=12)
    waiting, most = [0], [0]

    def slow(call: Any) -> Any:
        waiting[0] += 1
        most[0] = max(most[0], waiting[0])
        time.sleep(0.02)
        waiting[0] -= 1
        return call()

    rows = [0, 1, 4, 8, 13, 21, 22, 38, 39]
    fs.plan["cat_file"] = [slow] * 100
    cache.fetch(rows)
    assert most[0] > 2
    assert 100 - len(fs.plan["cat_file"]) == 2 * 3 + 7  # sidecar, header, footer of two shards, seven record batches
    assert [row.row for row in cache.rows(rows)] == rows and len(fs.plan["cat_file"]) == 100 - 13
    fs.plan["cat_file"] = [lambda call: call()[:-1] + b"?"] * 3
    with pytest.raises(cf.CorruptShardError, match="record batch 5: checksum"):
        cache.fetch([10])
    assert cache[10].row == 10


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


@pytest.mark.long
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
