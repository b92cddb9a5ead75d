"""What already lies where a cache is to be written, and what may be deleted."""

from __future__ import annotations

from pathlib import Path

import pytest

import cache_format as cf
from cache_samples import contents, sample_metadata, sample_row


def write_cache(path: Path, rows: int = 10, stop_after: int | None = None) -> None:
    metadata = sample_metadata(rows)
    with cf.CacheWriter(path, metadata, tokenizer_files={"tokenizer.json": b"{}", "deep/x.jinja": b"-"}) as writer:
        writer.write([sample_row(i) for i in range(10)][:stop_after])
        if stop_after is not None:
            raise InterruptedError


def test_nothing_and_an_empty_directory_are_writable(tmp_path: Path) -> None:
    cf.check_writable(tmp_path / "new")
    cf.check_writable(tmp_path)
    cf.remove_cache(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_unfinished_cache_can_be_continued_and_a_finished_one_not(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        write_cache(tmp_path / "unfinished", stop_after=5)
    cf.check_writable(tmp_path / "unfinished")
    write_cache(tmp_path / "finished")
    with pytest.raises(cf.CacheError, match=r"finished: found a finished cache .* `overwrite=True`"):
        cf.check_writable(tmp_path / "finished")
    next((tmp_path / "finished" / "shards").glob("*.arrow")).unlink()
    cf.check_writable(tmp_path / "finished")  # it can be repaired


@pytest.mark.parametrize("name", ["notes.txt", "shards/model.bin"])
def test_anything_else_is_refused_and_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    for function in (cf.check_writable, cf.remove_cache):
        with pytest.raises(cf.CacheError, match="nothing was changed"):
            function(tmp_path)
    assert contents(tmp_path) == {name: b"mine"}


def test_a_foreign_file_protects_the_whole_directory(tmp_path: Path) -> None:
    write_cache(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(cf.CacheError, match="notes.txt"):
        cf.remove_cache(tmp_path)
    assert contents(tmp_path) == before


def test_a_removed_cache_leaves_room_for_another(tmp_path: Path) -> None:
    write_cache(tmp_path)
    cf.remove_cache(tmp_path)
    assert contents(tmp_path) == {}
    write_cache(tmp_path)
    cf.verify_cache(tmp_path, deep=True)


def test_on_an_object_store() -> None:
    url = "memory://occupancy/cache"
    metadata = sample_metadata(10)
    with cf.CacheWriter(url, metadata) as writer:
        writer.write([sample_row(i) for i in range(10)])
    with pytest.raises(cf.CacheError, match="finished cache"):
        cf.check_writable(url)
    cf.remove_cache(url)
    cf.check_writable(url)
