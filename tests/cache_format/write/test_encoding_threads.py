"""Record batches encoded in several threads: the same bytes in the same order, and nothing left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import cache_format as cf
from cache_format.codecs.codec import Codec
from cache_format.rows.row_batch import RowBatch
from cache_samples import contents
from packed_samples import TOP_K, exact_row, metadata_of

ROWS = 34
THREADS = 4
Encode = Callable[[Codec, RowBatch], pa.RecordBatch]


def metadata(**changes: Any) -> cf.CacheMetadata:
    return metadata_of(TOP_K, ROWS, rows_per_shard=16, rows_per_record_batch=2, **changes)


def rows(start: int = 0) -> list[cf.CacheRow]:
    return [exact_row(row) for row in range(start, ROWS)]


@pytest.fixture
def encode(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[RowBatch], None]], None]:
    """Calls a function before each record batch is encoded."""

    def install(before: Callable[[RowBatch], None]) -> None:
        def encode(self: Codec, batch: RowBatch, plain: Encode = Codec.encode) -> pa.RecordBatch:
            before(batch)
            return plain(self, batch)

        monkeypatch.setattr(Codec, "encode", encode)

    return install


def encoders() -> int:
    return sum(thread.name.startswith("cache-encoder") for thread in threading.enumerate())


@pytest.mark.parametrize("encoding", ["columns", "packed"])
def test_bytes_do_not_depend_on_the_number_of_threads(tmp_path: Path, encoding: str, encode) -> None:
    """The later record batches of a shard are encoded first."""
    given = metadata(encoding=encoding)
    with cf.CacheWriter(tmp_path / "one", given) as writer:
        writer.write(rows())
    done: list[int] = []

    def slowly(batch: RowBatch) -> None:
        first = int(batch.rows[0])
        time.sleep(0.03 if first % 8 == 0 else 0)
        done.append(first)

    encode(slowly)
    with cf.CacheWriter(tmp_path / "several", given, encoding_threads=THREADS) as writer:
        for row in rows():
            writer.write([row])
    assert done != sorted(done) and sorted(done) == list(range(0, ROWS, 2))
    assert contents(tmp_path / "several") == contents(tmp_path / "one")
    assert encoders() == 0


def test_no_more_threads_and_record_batches_than_allowed(tmp_path: Path, encode) -> None:
    begun: list[int] = []
    may_end = threading.Event()

    def wait(batch: RowBatch) -> None:
        begun.append(int(batch.rows[0]))
        assert may_end.wait(20)

    encode(wait)
    with cf.CacheWriter(tmp_path / "cache", metadata(), encoding_threads=THREADS) as writer:
        writer.write(rows()[: 2 * THREADS])
        assert sorted(begun) == [0, 2, 4, 6] and encoders() == THREADS
        assert writer.tokens_written == 0
        held = threading.Thread(target=writer.write, args=(rows()[2 * THREADS :],))
        held.start()
        held.join(0.2)
        assert held.is_alive() and writer.next_row == 2 * THREADS + 2  # until the first one is written
        may_end.set()
        held.join()
    assert cf.verify_cache(tmp_path / "cache", deep=True).rows == ROWS


def test_one_thread_does_if_it_is_fast_enough(tmp_path: Path, encode) -> None:
    seen: list[str] = []
    encode(lambda batch: seen.append(threading.current_thread().name))
    with cf.CacheWriter(tmp_path / "cache", metadata(), encoding_threads=THREADS) as writer:
        for row in rows():
            writer.write([row])
            time.sleep(0.01)
    assert set(seen) == {"cache-encoder_0"}


@pytest.mark.parametrize("bad", [6, 14])
def test_an_error_of_a_thread_ends_the_shard(tmp_path: Path, encode, bad: int) -> None:
    """In the middle of a shard, and in its last record batch; the shards before it are kept."""
    with cf.CacheWriter(tmp_path / "whole", metadata()) as writer:
        writer.write(rows())

    faulty = True

    def fail(batch: RowBatch) -> None:
        if faulty and int(batch.rows[0]) == 16 + bad:
            raise ValueError("no code for row 7")

    encode(fail)
    given: dict[str, Any] = {"resume": True, "encoding_threads": THREADS}
    with pytest.raises(ValueError, match="no code"), cf.CacheWriter(tmp_path / "cache", metadata(), **given) as writer:
        writer.write(rows())
    assert encoders() == 0
    assert sorted(each.name for each in (tmp_path / "cache/shards").iterdir()) == [
        "shard-00000.arrow",
        "shard-00000.json",
    ]
    faulty = False
    with cf.CacheWriter(tmp_path / "cache", metadata(), **given) as writer:
        writer.write(rows(writer.next_row))
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_an_abandoned_shard_is_begun_again(tmp_path: Path, encode) -> None:
    encode(lambda batch: time.sleep(0.02))
    with cf.CacheWriter(tmp_path / "cache", metadata(), encoding_threads=THREADS) as writer:
        writer.write(rows()[:13])
        writer.abandon_shard()
        assert encoders() == 0 and writer.next_row == 0 and not list((tmp_path / "cache/shards").iterdir())
        writer.write(rows())
    with cf.CacheWriter(tmp_path / "one", metadata()) as writer:
        writer.write(rows())
    assert contents(tmp_path / "cache") == contents(tmp_path / "one")
