"""Writing packed caches: the lexicon is learned once, and whatever happens on the way changes no byte."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import fsspec
import numpy as np
import pytest

import cache_format as cf
from cache_format.codecs.packed.lexicon import Lexicon
from cache_format.manifest.manifest import LEXICON
from cache_format.write import shard_writer
from cache_format.write.shard_writer import ShardWriter
from cache_samples import SHARD, SIDECAR, contents
from packed_samples import (
    KINDS,
    TOP_K,
    assert_same_batch,
    empty_lexicon,
    metadata_of,
    row_of,
    write_cache,
)

METADATA = metadata_of(KINDS["threshold, three samples"], encoding="packed")
ROWS = [row_of(METADATA, row) for row in range(10)]


class Killed(Exception):
    pass


def write_until(path, stop: int, *, resume: bool = False) -> int:
    """Write up to row `stop`, then die. Returns where the writer started."""
    with pytest.raises(Killed), cf.CacheWriter(path, METADATA, resume=resume) as writer:
        first = writer.next_row
        writer.write(ROWS[first:stop])
        raise Killed
    return first


def finish(path) -> int:
    """Write what is missing. Returns where the writer started."""
    with cf.CacheWriter(path, METADATA, resume=True) as writer:
        first = writer.next_row
        writer.write(ROWS[first:])
    return first


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The files of a cache that was written without interruption, by name."""
    path = tmp_path_factory.mktemp("packed") / "whole"
    with cf.CacheWriter(path, METADATA) as writer:
        writer.write(ROWS)
    assert cf.verify_cache(path, deep=True).rows == 10
    return contents(path)


# -- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alignment", ["next", "same"])
def test_rows_are_those_of_the_columns(tmp_path, kind, alignment):
    for encoding in ("columns", "packed"):
        write_cache(tmp_path / encoding, metadata_of(KINDS[kind], encoding=encoding, alignment=alignment))
    columns, packed = (cf.open_cache(tmp_path / encoding) for encoding in ("columns", "packed"))
    assert packed.metadata.encoding == "packed" and packed.manifest.lexicon is not None
    for found, expected in zip(packed.iter_record_batches(), columns.iter_record_batches(), strict=True):
        assert_same_batch(found, expected)
    assert [row.row for row in packed.rows([7, 0, 7, -1])] == [7, 0, 7, 9]
    summary, expected = cf.verify_cache(tmp_path / "packed", deep=True), cf.verify_cache(tmp_path / "columns")
    assert replace(summary, bytes=0) == replace(expected, bytes=0)


def test_the_lexicon_is_recorded_beside_the_shards_and_with_each_of_them(tmp_path, whole):
    manifest = json.loads(whole["manifest.json"])
    digest = hashlib.sha256(whole[LEXICON]).hexdigest()
    assert manifest["lexicon"] == {"sha256": digest, "bytes": len(whole[LEXICON])}
    sidecars = [json.loads(data) for name, data in whole.items() if name.startswith("shards/") and ".json" in name]
    assert [sidecar["annotations"] for sidecar in sidecars] == [{"lexicon_sha256": digest}] * 3
    write_cache(tmp_path / "columns", metadata_of(KINDS["top-k"]))
    assert LEXICON not in contents(tmp_path / "columns")
    assert "lexicon" not in json.loads((tmp_path / "columns/manifest.json").read_bytes())


def test_sizes_include_the_lexicon(tmp_path, whole):
    finish(tmp_path / "cache")
    cache = cf.open_cache(tmp_path / "cache")
    shards = sum(len(data) for name, data in whole.items() if name.endswith(".arrow") and name != LEXICON)
    assert cache.manifest.shard_bytes == shards
    assert cache.manifest.stored_bytes == cf.verify_cache(cache.path, deep=True).bytes == shards + len(whole[LEXICON])
    columns = cache.column_bytes()
    assert set(columns) == {"row", "input_ids", "loss_mask", "segment_lengths", "packed"}
    assert 0 < sum(columns.values()) < shards


def test_only_the_first_shard_teaches(tmp_path, whole):
    other = [*ROWS[:4], *(replace(row_of(METADATA, row + 50), row=row) for row in range(4, 10))]
    with cf.CacheWriter(tmp_path / "cache", METADATA) as writer:
        writer.write(other)
    found = contents(tmp_path / "cache")
    assert found[LEXICON] == whole[LEXICON] and found[SHARD] == whole[SHARD]
    assert found[SHARD.replace("00000", "00001")] != whole[SHARD.replace("00000", "00001")]
    assert cf.verify_cache(tmp_path / "cache", deep=True).rows == 10


@pytest.mark.parametrize("sizes", [[1] * 10, [3, 0, 6, 1], [10]])
def test_bytes_do_not_depend_on_the_calls(tmp_path, whole, sizes):
    with cf.CacheWriter(tmp_path / "cache", METADATA) as writer:
        for size in sizes:
            writer.write(ROWS[writer.next_row : writer.next_row + size])
    assert contents(tmp_path / "cache") == whole


def test_only_the_first_shard_waits(tmp_path, monkeypatch):
    """Its record batches are written when its last row is there; those of other shards at once."""
    written, write = [], ShardWriter.write

    def counting(shard, batch):
        written.append(int(batch.rows[0]))
        write(shard, batch)

    monkeypatch.setattr(ShardWriter, "write", counting)
    with cf.CacheWriter(tmp_path / "cache", METADATA) as writer:
        seen = []
        for row in ROWS:
            writer.write([row])
            seen.append((list(written), writer.tokens_written))
        assert writer.bytes_written == sum(file.stat().st_size for file in (tmp_path / "cache/shards").glob("*.arrow"))
    assert [starts for starts, _ in seen] == [
        *([[]] * 3),
        *([[0, 2]] * 2),
        *([[0, 2, 4]] * 2),
        *([[0, 2, 4, 6]] * 2),
        [0, 2, 4, 6, 8],
    ]
    assert [tokens // 7 for _, tokens in seen] == [0, 0, 0, 4, 4, 6, 6, 8, 8, 10]


def test_rows_without_any_entry_teach_nothing_and_harm_nothing(tmp_path):
    """A first shard of nothing but prompts."""
    metadata = metadata_of(TOP_K, encoding="packed")
    nothing = np.zeros(7, np.int64)
    rows = []
    for row in range(10):
        made = row_of(metadata, row)
        if row < 4:
            targets = replace(made.targets, counts=nothing, exact_counts=nothing, ids=nothing[:0], logprobs=nothing[:0])
            made = replace(made, loss_mask=np.zeros(7, bool), targets=targets)
        rows.append(made)
    with cf.CacheWriter(tmp_path / "cache", metadata) as writer:
        writer.write(rows)
    cache = cf.open_cache(tmp_path / "cache")
    assert cache.manifest.shards[0].entries == 0 and cf.verify_cache(cache.path, deep=True).rows == 10
    for row in range(4, 10):
        np.testing.assert_array_equal(cache[row].targets.ids, rows[row].targets.ids)
    with cf.CacheWriter(tmp_path / "columns", replace(metadata, encoding="columns")) as writer:
        writer.write(rows)
    for found, expected in zip(
        cache.iter_record_batches(), cf.open_cache(tmp_path / "columns").iter_record_batches(), strict=True
    ):
        assert_same_batch(found, expected)


def test_bad_rows_leave_no_lexicon(tmp_path):
    spoilt = replace(ROWS[3], targets=replace(ROWS[3].targets, entropy=np.full(7, np.nan, np.float32)))
    with pytest.raises(ValueError, match="row 3, position 0: entropy nan"):
        with cf.CacheWriter(tmp_path / "cache", METADATA) as writer:
            writer.write([*ROWS[:3], spoilt])
    assert set(contents(tmp_path / "cache")) == {"manifest.partial.json"}
    assert finish(tmp_path / "cache") == 0


def test_other_places(whole):
    """An object store has no rename; and a cache that lies there is read like any other."""
    url = f"memory://{uuid.uuid4().hex}/cache"
    with pytest.raises(Killed), cf.CacheWriter(url, METADATA) as writer:
        writer.write(ROWS[:6])
        raise Killed
    with cf.CacheWriter(url, METADATA, resume=True) as writer:
        assert writer.next_row == 4
        writer.write(ROWS[4:])
    assert cf.verify_cache(url, deep=True).rows == 10
    fs, root = fsspec.core.url_to_fs(url)
    assert fs.cat_file(f"{root}/{LEXICON}") == whole[LEXICON]
    assert fs.cat_file(f"{root}/manifest.json") == whole["manifest.json"]


def test_pickles_and_threads_share_a_cache(tmp_path):
    finish(tmp_path / "cache")
    cache = pickle.loads(pickle.dumps(cf.open_cache(tmp_path / "cache", cached_record_batches=2)))
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(cache.__getitem__, list(range(10)) * 5))
    assert [row.row for row in rows] == list(range(10)) * 5
    for row in rows[:10]:
        np.testing.assert_array_equal(row.targets.ids, ROWS[row.row].targets.ids)
        np.testing.assert_array_equal(row.targets.sample_counts, ROWS[row.row].targets.sample_counts)


# -- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [[0], [3], [4], [5, 6, 9], [10]])
def test_interrupted_and_resumed_gives_the_same_bytes(tmp_path, whole, stops):
    for attempt, stop in enumerate(stops):
        first = write_until(tmp_path / "cache", stop, resume=attempt > 0)
        assert first == (0 if attempt == 0 else stops[attempt - 1] // 4 * 4)
        assert not (tmp_path / "cache" / "manifest.json").exists()
        assert (tmp_path / "cache" / LEXICON).exists() == (stop >= 4)
        assert not list((tmp_path / "cache").rglob(".*"))
    finish(tmp_path / "cache")
    assert contents(tmp_path / "cache") == whole


def die(*_: object) -> None:
    raise Killed


@pytest.mark.parametrize("place", ["before the shard", "in the shard", "before its sidecar"])
def test_killed_between_the_lexicon_and_the_first_sidecar(tmp_path, whole, monkeypatch, place):
    """It has been learned, and is not learned again."""
    with monkeypatch.context() as patch:
        if place == "before the shard":
            patch.setattr(ShardWriter, "__init__", die)
        elif place == "in the shard":
            patch.setattr(ShardWriter, "write", die)
        else:
            patch.setattr(shard_writer, "write_bytes", die)
        with pytest.raises(Killed), cf.CacheWriter(tmp_path / "cache", METADATA) as writer:
            writer.write(ROWS)
    left = contents(tmp_path / "cache")
    assert left[LEXICON] == whole[LEXICON] and SIDECAR not in left
    assert (SHARD in left) == (place == "before its sidecar")
    with monkeypatch.context() as patch:
        patch.setattr(Lexicon, "learn", die)
        assert finish(tmp_path / "cache") == 0
    assert contents(tmp_path / "cache") == whole


def test_killed_while_the_lexicon_was_written(tmp_path, whole):
    write_until(tmp_path / "cache", 3)
    (tmp_path / "cache/.lexicon.arrow.99.tmp").write_bytes(whole[LEXICON][:50])
    assert finish(tmp_path / "cache") == 0
    assert contents(tmp_path / "cache") == whole


@pytest.mark.parametrize("shard, kind", [(0, "arrow"), (0, "json"), (1, "arrow"), (2, "json")])
def test_only_a_lost_shard_is_written_again(tmp_path, whole, shard, kind):
    finish(tmp_path / "cache")
    (tmp_path / f"cache/shards/shard-0000{shard}.{kind}").unlink()
    with cf.CacheWriter(tmp_path / "cache", METADATA, resume=True) as writer:
        assert writer.next_row == 4 * shard
        writer.write(ROWS)
        assert writer.tokens_written == 7 * len(METADATA.shard_rows(shard))
    assert contents(tmp_path / "cache") == whole


def test_an_abandoned_shard_starts_again(tmp_path, whole):
    """Rows that waited to teach the lexicon are dropped as well."""
    with cf.CacheWriter(tmp_path / "cache", METADATA) as writer:
        for reach, start in ((0, 0), (1, 0), (3, 0), (4, 4), (7, 4), (9, 8)):
            writer.write(ROWS[writer.next_row : reach])
            writer.abandon_shard()
            assert writer.next_row == start
            assert (tmp_path / "cache" / LEXICON).exists() == (reach >= 4)
        writer.write(ROWS[8:])
    assert contents(tmp_path / "cache") == whole


def test_shards_that_were_abandoned_do_not_teach(tmp_path, whole):
    other = [replace(row_of(METADATA, row + 70), row=row) for row in range(3)]
    with cf.CacheWriter(tmp_path / "cache", METADATA) as writer:
        writer.write(other)
        writer.abandon_shard()
        writer.write(ROWS)
    assert contents(tmp_path / "cache") == whole


# -- a lost lexicon ---------------------------------------------------------------------------------------------------


def test_shards_of_a_lost_lexicon_are_not_written_over(tmp_path, whole):
    """A copy may exist, and a lexicon from a teacher that rounds differently would cost every shard."""
    for name, stop in (("finished", None), ("unfinished", 8)):
        path = tmp_path / name
        finish(path) if stop is None else write_until(path, stop)
        lexicon = (path / LEXICON).read_bytes()
        (path / LEXICON).unlink()
        before = contents(path)
        shards = sum(name.startswith("shards/") and name.endswith(".json") for name in before)
        lost = f"{LEXICON}: no such file, and {shards} shards cannot be read without it. Copy it here"
        with pytest.raises(cf.CacheError, match=lost):
            cf.CacheWriter(path, METADATA, resume=True)
        with pytest.raises(cf.CacheError, match=lost):
            cf.SharedCacheWriter(path, METADATA, share=cf.Share())
        with pytest.raises(cf.CacheError, match=lost):
            cf.finish_cache(path)
        assert contents(path) == before
        (path / LEXICON).write_bytes(lexicon)
        if stop is not None:
            assert finish(path) == stop
        assert contents(path) == whole


def test_without_lexicon_and_shards_both_are_made_again(tmp_path, whole):
    finish(tmp_path / "cache")
    (tmp_path / "cache" / LEXICON).unlink()
    shutil.rmtree(tmp_path / "cache/shards")
    assert finish(tmp_path / "cache") == 0
    assert contents(tmp_path / "cache") == whole


def test_shards_of_another_lexicon_are_written_again(tmp_path):
    """Nothing is mixed: the lexicon that lies there decides."""
    write_until(tmp_path / "cache", 8)
    (tmp_path / "cache" / LEXICON).write_bytes(empty_lexicon(1000).to_bytes())
    assert finish(tmp_path / "cache") == 0
    assert cf.verify_cache(tmp_path / "cache", deep=True).rows == 10
    for row in cf.open_cache(tmp_path / "cache"):
        np.testing.assert_array_equal(row.targets.ids, ROWS[row.row].targets.ids)


def test_a_damaged_lexicon_is_not_written_over(tmp_path):
    """A copy may exist, and every shard hangs on it."""
    write_until(tmp_path / "cache", 6)
    data = (tmp_path / "cache" / LEXICON).read_bytes()
    (tmp_path / "cache" / LEXICON).write_bytes(data[:-40])
    before = contents(tmp_path / "cache")
    with pytest.raises(cf.FormatError, match="lexicon.arrow: not a lexicon .* Restore it from a copy"):
        cf.CacheWriter(tmp_path / "cache", METADATA, resume=True)
    assert contents(tmp_path / "cache") == before


@pytest.mark.parametrize("given, recorded", [("columns", "packed"), ("packed", "columns")])
def test_a_cache_is_continued_in_its_own_encoding_only(tmp_path, given, recorded):
    with pytest.raises(Killed), cf.CacheWriter(tmp_path / "cache", replace(METADATA, encoding=recorded)) as writer:
        writer.write(ROWS[:5])
        raise Killed
    before = contents(tmp_path / "cache")
    with pytest.raises(cf.MismatchError, match=f'encoding recorded "{recorded}", given "{given}"'):
        cf.CacheWriter(tmp_path / "cache", replace(METADATA, encoding=given), resume=True)
    assert contents(tmp_path / "cache") == before


# -- the directory ----------------------------------------------------------------------------------------------------


def test_a_packed_cache_is_removed_as_a_whole(tmp_path):
    for name, stop in (("finished", None), ("unfinished", 6)):
        path = tmp_path / name
        finish(path) if stop is None else write_until(path, stop)
        assert (path / LEXICON).exists()
        cf.check_writable(path, replace=True)
        cf.remove_cache(path)
        assert not contents(path)


def test_a_lexicon_alone_is_nobody_s(tmp_path):
    (tmp_path / LEXICON).write_bytes(empty_lexicon(1000).to_bytes())
    with pytest.raises(cf.CacheError, match="found 'lexicon.arrow' but no manifest: nothing was changed"):
        cf.CacheWriter(tmp_path, METADATA, resume=True)


def test_the_card_s_example_runs_as_it_stands(tmp_path, monkeypatch):
    finish(tmp_path / "cache")
    card = (tmp_path / "cache/README.md").read_text()
    assert "| encoding | packed |" in card
    monkeypatch.chdir(tmp_path / "cache")
    names: dict = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    np.testing.assert_array_equal(names["ids"], ROWS[0].targets.at(0)[0])
