"""Several writers of one cache: the bytes of one, whoever writes what or joins late, and who may write."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import uuid

import fsspec
import pytest
from test_claims import ELSEWHERE, plant

import cache_format as cf
from cache_format.manifest.manifest import LEXICON
from cache_format.storage.claims import CLAIMS, Claims
from cache_format.storage.directory import open_directory
from cache_samples import contents, sample_metadata
from shared_writing import FILES, ROWS, alone, metadata, sample_row, shared, work, write_shard


@pytest.fixture(scope="module", params=["columns", "packed"])
def whole(request, tmp_path_factory) -> tuple[str, dict[str, bytes]]:
    return request.param, alone(tmp_path_factory.mktemp("whole") / "cache", request.param)


@pytest.mark.parametrize("writers", [1, 2, 3])
def test_any_number_of_writers_leave_the_bytes_of_one(tmp_path, whole, writers):
    encoding, expected = whole
    written: dict[int, list[int]] = {}

    def run(index: int) -> None:
        written[index] = work(tmp_path / "cache", cf.Share(index=index, count=writers), encoding=encoding)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(tmp_path / "cache") == expected
    assert not (tmp_path / "cache" / CLAIMS).exists()
    assert sorted(shard for shards in written.values() for shard in shards) == list(range(7))


def test_on_an_object_store(whole, tmp_path):
    encoding, expected = whole
    url = f"memory://{uuid.uuid4().hex}/cache"
    threads = [threading.Thread(target=work, args=(url, cf.Share(index=i, count=2))) for i in range(2)]
    if encoding == "packed":
        work(url, encoding=encoding)
    else:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    fsspec.filesystem("memory").get(url, str(tmp_path / "copy"), recursive=True)
    assert contents(tmp_path / "copy") == expected


def test_each_prefers_its_own_and_then_helps(tmp_path):
    with shared(tmp_path / "cache", cf.Share(index=1, count=3)) as writer:
        assert [write_shard(writer) for _ in range(8)] == [1, 4, 0, 2, 3, 5, 6, None]
    assert cf.verify_cache(tmp_path / "cache").rows == ROWS


def test_joining_late_finds_nothing_to_do(tmp_path):
    work(tmp_path / "cache")
    cf.check_writable(tmp_path / "cache", shared=True)
    with pytest.raises(cf.CacheError, match="finished cache"):
        cf.check_writable(tmp_path / "cache")
    before = contents(tmp_path / "cache")
    assert work(tmp_path / "cache") == []
    assert contents(tmp_path / "cache") == before


def test_a_range_of_shards_is_all_that_is_written(tmp_path, whole):
    encoding, expected = whole
    with shared(tmp_path / "cache", cf.Share(first=0, stop=3), encoding=encoding) as writer:
        assert [write_shard(writer) for _ in range(4)] == [0, 1, 2, None]
    assert not writer.is_finished and writer.complete.rows == 12
    with pytest.raises(cf.FormatError, match="unfinished cache with 3 complete shards"):
        cf.open_cache(tmp_path / "cache")
    assert work(tmp_path / "cache", cf.Share(first=3, stop=99), encoding=encoding) == [3, 4, 5, 6]
    assert contents(tmp_path / "cache") == expected
    with pytest.raises(cf.CacheError, match="shards from 7 on are asked for, it has 7"):
        shared(tmp_path / "cache", cf.Share(first=7), encoding=encoding)


@pytest.mark.parametrize("text, expected", [("0:3", (0, 3)), (":3", (0, 3)), ("3:", (3, None))])
def test_range_of_shards_in_words(text, expected):
    assert cf.parse_shard_range(text) == expected


@pytest.mark.parametrize("text", ["", ":", "3", "3:2:1", "-1:3", "a:b"])
def test_what_is_no_range_of_shards(text):
    with pytest.raises(ValueError, match="not a range"):
        cf.parse_shard_range(text)


@pytest.mark.parametrize("share", [{"index": 2, "count": 2}, {"index": -1}, {"first": 3, "stop": 3}])
def test_shares_that_are_none(share):
    with pytest.raises(ValueError):
        cf.Share(**share)


# -- the lexicon -------------------------------------------------------------------------------------------------------


def test_packed_shards_wait_for_the_lexicon_of_shard_0(tmp_path):
    expected = alone(tmp_path / "whole", "packed")
    said: list[str] = []
    began = threading.Event()

    def second() -> None:
        with shared(tmp_path / "cache", encoding="packed", on_wait=said.append) as writer:
            began.set()
            while write_shard(writer) is not None:
                pass

    with shared(tmp_path / "cache", encoding="packed") as writer:
        assert writer.begin_shard() == 0
        thread = threading.Thread(target=second)
        thread.start()
        began.wait()
        time.sleep(0.5)
        assert os.listdir(tmp_path / "cache" / CLAIMS) == ["shard-00000.0.json"]
        assert not (tmp_path / "cache" / LEXICON).exists()
        writer.write([sample_row(row) for row in range(4)])
        assert (tmp_path / "cache" / LEXICON).read_bytes() == expected[LEXICON]
        while write_shard(writer) is not None:
            pass
    thread.join()
    assert said[0].startswith(f"waiting for shard-00000: process {os.getpid()}")
    assert contents(tmp_path / "cache") == expected


def test_packed_shards_without_a_lexicon_to_come_are_refused(tmp_path):
    with pytest.raises(cf.CacheError, match="Write shard 0 first"):
        work(tmp_path / "cache", cf.Share(first=2), encoding="packed", stale_after_s=0.3)


# -- who may write -----------------------------------------------------------------------------------------------------


def test_second_writer_is_refused_and_the_first_goes_on(tmp_path):
    with cf.CacheWriter(tmp_path / "cache", metadata(), tokenizer_files=FILES) as writer:
        writer.write([sample_row(row) for row in range(6)])
        before = contents(tmp_path / "cache")
        for second in (
            lambda: cf.CacheWriter(tmp_path / "cache", metadata(), tokenizer_files=FILES, resume=True),
            lambda: shared(tmp_path / "cache"),
            lambda: cf.check_writable(tmp_path / "cache"),
            lambda: cf.check_writable(tmp_path / "cache", shared=True),
            lambda: cf.remove_cache(tmp_path / "cache"),
            lambda: cf.finish_cache(tmp_path / "cache"),
        ):
            with pytest.raises(cf.CacheError, match=rf"process {os.getpid()} on .* writes this cache.*nothing was"):
                second()
            assert contents(tmp_path / "cache") == before
        writer.write([sample_row(row) for row in range(6, ROWS)])
    assert contents(tmp_path / "cache") == alone(tmp_path / "whole")


def test_one_alone_is_refused_where_several_write(tmp_path):
    with shared(tmp_path / "cache") as writer:
        writer.begin_shard()
        for alone_ in (
            lambda: cf.CacheWriter(tmp_path / "cache", metadata(), tokenizer_files=FILES, resume=True),
            lambda: cf.check_writable(tmp_path / "cache"),
            lambda: cf.remove_cache(tmp_path / "cache"),
        ):
            with pytest.raises(cf.CacheError, match="writes shard-00000: nothing was changed"):
                alone_()
        cf.check_writable(tmp_path / "cache", shared=True)
        assert os.listdir(tmp_path / "cache" / CLAIMS) == ["shard-00000.0.json"]


def test_writer_alone_that_comes_between_two_shards_keeps_the_others_out(tmp_path):
    with pytest.raises(cf.CacheError, match="writes this cache"), shared(tmp_path / "cache") as writer:
        assert write_shard(writer) == 0
        other = cf.CacheWriter(tmp_path / "cache", metadata(), tokenizer_files=FILES, resume=True)
        with other:
            other.write([sample_row(row) for row in range(4, 6)])
            write_shard(writer)


def test_of_writers_with_different_settings_one_begins(tmp_path):
    results: list[str] = []
    start = threading.Barrier(2)

    def run(level: int) -> None:
        start.wait()
        try:
            given = metadata(compression={"codec": "zstd", "level": level})
            with cf.SharedCacheWriter(tmp_path / "cache", given, share=cf.Share()) as writer:
                writer.begin_shard()
            results.append("began")
        except cf.MismatchError:
            results.append("refused")

    threads = [threading.Thread(target=run, args=(level,)) for level in (3, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["began", "refused"]


# -- finishing ---------------------------------------------------------------------------------------------------------


def test_shards_of_two_machines_are_brought_together_and_finished(tmp_path, whole):
    encoding, expected = whole
    work(tmp_path / "a", cf.Share(stop=3), encoding=encoding)
    if encoding == "packed":  # the lexicon comes from whoever has shard 0
        (tmp_path / "b").mkdir()
        shutil.copy(tmp_path / "a/manifest.partial.json", tmp_path / "b")
        shutil.copy(tmp_path / "a" / LEXICON, tmp_path / "b")
    work(tmp_path / "b", cf.Share(first=3), encoding=encoding)
    with pytest.raises(cf.CacheError, match=r"4 missing shards \(3, 4, 5, 6\), 0 being written"):
        cf.finish_cache(tmp_path / "a")
    shutil.copytree(tmp_path / "b/shards", tmp_path / "a/shards", dirs_exist_ok=True)
    for _ in range(2):  # it may be said twice
        assert cf.finish_cache(tmp_path / "a").num_rows == ROWS
        assert contents(tmp_path / "a") == expected


def test_finishing_changes_nothing_where_something_is_missing(tmp_path):
    work(tmp_path / "cache")
    (tmp_path / "cache/shards/shard-00004.json").unlink()
    before = contents(tmp_path / "cache")
    with pytest.raises(cf.CacheError, match=r"1 missing shard \(4\).*Run cache-teacher again"):
        cf.finish_cache(tmp_path / "cache")
    assert contents(tmp_path / "cache") == before

    (tmp_path / "cache/tokenizer/tokenizer.json").write_text("another")
    with pytest.raises(cf.CacheError, match="1 missing shard "):
        cf.finish_cache(tmp_path / "cache")
    assert work(tmp_path / "cache") == [4]  # which also puts the tokenizer right
    assert contents(tmp_path / "cache") == alone(tmp_path / "whole")

    (tmp_path / "cache/tokenizer/tokenizer.json").unlink()
    with pytest.raises(cf.CacheError, match=r"tokenizer.json: missing or not the recorded file"):
        cf.finish_cache(tmp_path / "cache")
    with pytest.raises(cf.CacheError, match="no cache there, finished or not"):
        cf.finish_cache(tmp_path / "nothing")


def test_a_cache_without_its_answers_is_not_finished(tmp_path):
    path = tmp_path / "cache"
    answers = cf.write_answers(path, [{"row": row} for row in range(10)])
    corpus = {"source": "nowhere", "rows": 10, "generation": {"answers_file": answers}}
    with cf.CacheWriter(path.with_name("written"), sample_metadata(corpus=corpus)) as writer:
        writer.write([sample_row(row) for row in range(10)])
    shutil.copytree(path.with_name("written"), path, dirs_exist_ok=True)
    (path / "manifest.json").rename(path / "manifest.partial.json")
    data = (path / "answers.jsonl").read_bytes()
    (path / "answers.jsonl").unlink()
    with pytest.raises(cf.CacheError, match=r"answers.jsonl: missing or not the recorded file. Copy it here"):
        cf.finish_cache(path)
    assert not (path / "manifest.json").exists()
    (path / "answers.jsonl").write_bytes(data)
    cf.finish_cache(path)
    assert cf.open_cache(path).answers_bytes() == data


def test_killed_after_the_manifest_leaves_a_finished_cache_that_is_tidied(tmp_path):
    expected = alone(tmp_path / "cache")
    (tmp_path / "cache/manifest.partial.json").write_bytes(
        json.dumps({**json.loads(expected["manifest.json"]), "shards": None}).encode()
    )
    (tmp_path / "cache/shards/.shard-00002.arrow.99.tmp").write_bytes(b"half a shard")
    plant(open_directory(tmp_path / "cache"), "shard-00002", **ELSEWHERE)
    assert cf.open_cache(tmp_path / "cache").num_rows == ROWS
    assert work(tmp_path / "cache") == []
    assert contents(tmp_path / "cache") == expected


def test_removal_that_was_killed_can_be_repeated(tmp_path, monkeypatch):
    alone(tmp_path / "cache")

    class Killed(Exception):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("cache_format.storage.directory.LocalDirectory.remove_tree", die)
        cf.remove_cache(tmp_path / "cache")
    with pytest.raises(cf.FormatError, match="unfinished cache"):
        cf.open_cache(tmp_path / "cache")
    cf.remove_cache(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_claims_alone_are_no_cache_and_in_nobody_s_way(tmp_path):
    plant(open_directory(tmp_path / "cache"), "all", pid=2**22 + 1, pid_started=1)
    work(tmp_path / "cache")
    assert contents(tmp_path / "cache") == alone(tmp_path / "whole")
    assert Claims(open_directory(tmp_path / "cache")).others() == []
