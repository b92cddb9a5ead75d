"""Caches on a real S3 server that loses connections, answers 500 and cuts bodies short."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cache_format as cf
from cache_format.storage import remote
from cache_format.storage.directory import open_directory, write_bytes
from cache_format.storage.remote import RemoteDirectory
from cache_samples import contents, sample_metadata, sample_row, several_samples
from faults import Outcome, downloaded, faults_of, one_round

FILES = {"tokenizer.json": b"{}"}

pytestmark = pytest.mark.usefixtures("short_waits")


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


@pytest.mark.long
@pytest.mark.parametrize("encoding", ["columns", "packed"])
def test_a_cache_on_s3_has_the_same_bytes(server: Any, tmp_path: Path, encoding: str):
    written(server.url(encoding), encoding=encoding, **several_samples(1))
    written(tmp_path / "cache", encoding=encoding, **several_samples(1))
    assert downloaded(server.url(encoding)) == contents(tmp_path / "cache")
    assert cf.verify_cache(server.url(encoding)) == cf.verify_cache(tmp_path / "cache")
    assert isinstance(open_directory(server.url("x")), RemoteDirectory)


@pytest.mark.long
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
sys.path[:0] = [{root!r}, {helpers!r}]
import cache_format as cf
from cache_format.storage import remote
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
    helpers = Path(__file__).resolve().parents[1]  # of the tests of the format
    code = WRITER.format(root=str(helpers.parents[1]), helpers=str(helpers), files=FILES, pause=0.02)
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


@pytest.mark.long
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


@pytest.mark.long
def test_what_somebody_else_has_just_created_is_found(server: Any):
    """s3fs remembers listings, in which it is missing."""
    from s3fs import S3FileSystem

    directory = open_directory(server.url("new"))
    write_bytes(directory, "old", b"")
    assert directory.names() == ["old"]
    other = S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    other.pipe_file(f"{server.bucket}/new/file", b"data")
    assert directory.read_bytes("file") == b"data"


@pytest.mark.long
def test_a_folder_that_the_console_created_is_empty(server: Any):
    """The S3 console's "Create folder" makes an empty object with the name of the folder and a slash."""
    from s3fs import S3FileSystem

    fs = S3FileSystem()
    for name in ("folder", "folder/shards"):
        fs.call_s3("put_object", Bucket=server.bucket, Key=f"{name}/", Body=b"")
    directory = open_directory(server.url("folder"))
    assert directory.names() == ["shards"] and directory.names("shards") == [] and directory.sizes("shards") == {}
    cf.check_writable(server.url("folder"))
    written(server.url("folder"))
    assert cf.verify_cache(server.url("folder")).rows == 10
    assert [batch for batch in cf.open_cache(server.url("folder")).record_batches()][-1] == (8, 10)


@pytest.mark.long
def test_reading_survives_a_fork(server: Any):
    written(server.url("fork"))
    cache = cf.open_cache(server.url("fork"))
    cache[0]
    child = os.fork()
    if not child:
        os._exit(0 if cache[9].row == 9 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pickle.loads(pickle.dumps(cache))[5].row == 5
