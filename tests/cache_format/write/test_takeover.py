"""A shard whose writer dies, falls silent or is suspended is taken over, and the cache has the bytes of one writer."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_claims import ELSEWHERE, plant

import cache_format as cf
from cache_format.storage.claims import CLAIMS
from cache_format.storage.directory import open_directory
from cache_samples import contents
from shared_writing import alone, sample_row, shared, work, write_shard

ROOT = Path(__file__).resolve().parents[3]

KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
from shared_writing import shared, write_shard, sample_row
writer = shared(sys.argv[1])
write_shard(writer)
writer.begin_shard()
writer.write([sample_row(row) for row in range(4, 7)])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_shard_of_a_killed_process_is_taken_over_by_a_living_one(tmp_path):
    expected = alone(tmp_path / "whole")
    folders = [str(ROOT), str(ROOT / "tests/helpers"), str(ROOT / "tests/cache_format")]
    with shared(tmp_path / "cache") as writer:
        subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "cache"), *folders], cwd=ROOT, check=False)
        assert os.listdir(tmp_path / "cache" / CLAIMS) == ["shard-00001.0.json"]
        (half,) = (tmp_path / "cache/shards").glob(".shard-00001*.tmp")
        assert [write_shard(writer) for _ in range(7)] == [1, 2, 3, 4, 5, 6, None]
        assert not half.exists()
        assert [holder.name for holder in writer.taken_over] == ["shard-00001"]
    assert contents(tmp_path / "cache") == expected


def test_last_writer_waits_for_one_elsewhere_and_takes_over_when_it_is_silent(tmp_path):
    with shared(tmp_path / "cache"):
        pass
    plant(open_directory(tmp_path / "cache"), "shard-00002", **ELSEWHERE)
    said: list[str] = []
    start = time.monotonic()
    assert work(tmp_path / "cache", on_wait=said.append, stale_after_s=1.0) == [0, 1, 3, 4, 5, 6, 2]
    assert time.monotonic() - start > 0.8
    assert said and "shard-00002: process 1 on other" in said[0]
    assert contents(tmp_path / "cache") == alone(tmp_path / "whole")


def test_suspended_writer_drops_what_another_has_taken_over(tmp_path):
    expected = alone(tmp_path / "whole")
    with shared(tmp_path / "cache") as slow:
        assert slow.begin_shard() == 0
        slow.write([sample_row(row) for row in range(3)])
        os.remove(tmp_path / "cache" / CLAIMS / "shard-00000.0.json")  # as if of another machine, and old
        plant(open_directory(tmp_path / "cache"), "shard-00000", age_s=9.0, **ELSEWHERE)
        with shared(tmp_path / "cache") as quick:
            assert write_shard(quick) == 0
            before = contents(tmp_path / "cache/shards")
            with pytest.raises(cf.ClaimLostError, match="shard 0 was taken over"):
                slow.write([sample_row(3)])
            assert contents(tmp_path / "cache/shards") == before
            slow.abandon_shard()
            assert write_shard(slow) == 1
            while write_shard(quick) is not None:
                pass
    assert contents(tmp_path / "cache") == expected


def test_suspended_writer_that_was_overtaken_in_the_last_moment_drops_its_shard(tmp_path, monkeypatch):
    with shared(tmp_path / "cache") as slow:
        assert slow.begin_shard() == 0
        slow.write([sample_row(row) for row in range(3)])
        answers = iter([False])
        lost = slow._claims.lost
        monkeypatch.setattr(slow._claims, "lost", lambda name: next(answers, None) is None and lost(name))
        os.remove(tmp_path / "cache" / CLAIMS / "shard-00000.0.json")
        plant(open_directory(tmp_path / "cache"), "shard-00000", age_s=9.0, **ELSEWHERE)
        with shared(tmp_path / "cache") as quick:
            assert quick.begin_shard() == 0
            with pytest.raises(cf.ClaimLostError, match="shard 0 was taken over"):
                slow.write([sample_row(3)])
            quick.write([sample_row(row) for row in range(4)])
            while write_shard(quick) is not None:
                pass
    assert contents(tmp_path / "cache") == alone(tmp_path / "whole")


def test_shards_begun_ahead_are_written_in_order_and_begun_again_once_abandoned(tmp_path):
    expected = alone(tmp_path / "whole")
    with shared(tmp_path / "cache", cf.Share(index=1, count=2)) as writer:
        assert [writer.begin_shard(wait=False) for _ in range(3)] == [1, 3, 5]
        writer.write([sample_row(row) for row in (*range(4, 8), *range(12, 14))])
        assert writer.complete.shards == 1 and writer.complete_without({1}).shards == 0
        writer.abandon_shard()
        with pytest.raises(ValueError, match="row 12 given"):
            writer.write([sample_row(12)])
        assert [writer.begin_shard() for _ in range(2)] == [3, 5]
        writer.write([sample_row(row) for row in (*range(12, 16), *range(20, 24))])
        while write_shard(writer) is not None:
            pass
    assert contents(tmp_path / "cache") == expected


def test_without_waiting_no_shard_is_free_while_another_writes_the_last(tmp_path):
    with shared(tmp_path / "cache") as writer:
        assert writer.begin_shard() == 0
        with shared(tmp_path / "cache", cf.Share(stop=1)) as other:
            assert other.begin_shard(wait=False) is None
        writer.write([sample_row(row) for row in range(4)])


def test_interrupted_writer_gives_its_shard_back(tmp_path):
    with pytest.raises(KeyboardInterrupt), shared(tmp_path / "cache") as writer:
        assert write_shard(writer) == 0
        writer.begin_shard()
        writer.write([sample_row(4)])
        raise KeyboardInterrupt
    assert not (tmp_path / "cache" / CLAIMS).exists()
    assert not list((tmp_path / "cache").rglob(".*"))
    assert work(tmp_path / "cache") == [1, 2, 3, 4, 5, 6]
    assert contents(tmp_path / "cache") == alone(tmp_path / "whole")
