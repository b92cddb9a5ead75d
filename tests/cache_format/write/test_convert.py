"""Conversions change what they are told to and nothing else: not the other numbers, not the source, not the bytes."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest

import cache_format as cf
from cache_format.manifest.manifest import LEXICON
from cache_format.read.shard_reader import ShardReader
from cache_format.write.shard_writer import ShardWriter
from cache_samples import contents
from converting import assert_same_rows, convert, shards
from packed_samples import (
    KINDS,
    TOP_K,
    assert_same_batch,
    metadata_of,
    write_cache,
)

# -- the encoding -----------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("kind, alignment", [*((kind, "next") for kind in KINDS), ("top-k", "same")])
def test_packed_and_back_gives_the_same_bytes(tmp_path, kind, alignment):
    write_cache(tmp_path / "first", metadata_of(KINDS[kind], alignment=alignment))
    packed = convert(tmp_path / "first", tmp_path / "packed", encoding="packed")
    again = convert(tmp_path / "packed", tmp_path / "again", encoding="columns")
    assert packed.metadata.encoding == "packed" and again.metadata.encoding == "columns"
    assert shards(tmp_path / "again") == shards(tmp_path / "first")
    first = cf.open_cache(tmp_path / "first")
    for found, expected in zip(packed.iter_record_batches(), first.iter_record_batches(), strict=True):
        assert_same_batch(found, expected)
    assert not (tmp_path / "again" / LEXICON).exists()


@pytest.mark.parametrize("kind", ["top-k", "threshold, three samples"])
def test_converted_is_what_would_have_been_written(tmp_path, caches, kind):
    """The lexicon included, which is learned from decoded rows here and from given ones there."""
    write_cache(tmp_path / "written", metadata_of(KINDS[kind], encoding="packed"))
    convert(caches[kind], tmp_path / "converted", encoding="packed")
    written, converted = contents(tmp_path / "written"), contents(tmp_path / "converted")
    for name in written:
        if name not in ("manifest.json", "README.md"):
            assert written[name] == converted[name], name
    assert set(written) == set(converted)
    found, expected = (json.loads(files["manifest.json"]) for files in (converted, written))
    assert [key for key in expected if expected[key] != found[key]] == ["capture", "manifest_sha256"]


def test_nothing_named_changes_nothing(tmp_path, caches):
    converted = convert(caches["top-k"], tmp_path / "same")
    assert shards(tmp_path / "same") == shards(caches["top-k"])
    old, new = cf.open_cache(caches["top-k"]).metadata.to_json(), converted.metadata.to_json()
    assert new.pop("capture") == {"converted": [{}]} and old.pop("capture") == {}
    assert new == old


def test_every_conversion_is_recorded(tmp_path, caches):
    convert(caches["top-k"], tmp_path / "a", encoding="packed", top_k=5)
    found = convert(tmp_path / "a", tmp_path / "b", compression_level=1)
    assert found.metadata.capture["converted"] == [{"encoding": "packed", "top_k": 5}, {"compression_level": 1}]
    assert found.tokenizer_files() == {"tokenizer.json": b"{}"}
    assert found.metadata.encoding == "packed" and found.metadata.max_entries == 5


# -- shards and compression -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "encoding, per_shard, per_batch",
    [
        *[("columns", *geometry) for geometry in [(1, 1), (3, 2), (5, 3), (10, 10), (100, 4), (7, 100)]],
        *[("packed", *geometry) for geometry in [(3, 2), (7, 100)]],
    ],
)
def test_other_shards(tmp_path, caches, per_shard, per_batch, encoding):
    """As if they had been written like this, wherever the source's batches end; and back."""
    kind = "threshold, three samples"
    geometry = {"rows_per_shard": per_shard, "rows_per_record_batch": per_batch}
    write_cache(tmp_path / "written", metadata_of(KINDS[kind], encoding=encoding, **geometry))
    found = convert(caches[kind], tmp_path / "other", encoding=encoding, **geometry)
    assert shards(tmp_path / "other") == shards(tmp_path / "written")
    assert len(found.manifest.shards) == -(-10 // per_shard)
    convert(tmp_path / "other", tmp_path / "back", encoding="columns", rows_per_shard=4, rows_per_record_batch=2)
    assert shards(tmp_path / "back") == shards(caches[kind])


def test_other_compression(tmp_path):
    write_cache(tmp_path / "nine", metadata_of(TOP_K, rows=40, rows_per_shard=40, rows_per_record_batch=40), tokens=50)
    sizes = {}
    for level in (1, 22):
        found = convert(tmp_path / "nine", tmp_path / str(level), compression_level=level)
        assert found.metadata.compression == {"codec": "zstd", "level": level}
        assert_same_rows(found, cf.open_cache(tmp_path / "nine"))
        sizes[level] = found.manifest.shard_bytes
    assert sizes[22] < sizes[1]
    convert(tmp_path / "1", tmp_path / "again", compression_level=9)
    assert shards(tmp_path / "again") == shards(tmp_path / "nine")


# -- other codebooks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [38, 64, 256])
@pytest.mark.parametrize("kind", ["top-k", "threshold"])
def test_other_levels(tmp_path, caches, three_samples, kind, levels):
    source = cf.open_cache(caches["top-k"] if kind == "top-k" else three_samples)
    found = convert(Path(source.path), tmp_path / "other", levels=levels)
    book = found.metadata.codebooks["target_logprobs"]
    weight = np.float32(np.log(0.4 / 3))
    expected = cf.sqrt_probability_codebook(levels) if kind == "top-k" else cf.weight_codebook(levels, 0.4 / 3)
    np.testing.assert_array_equal(book.values, expected.values)
    for name in ("residual_logprob", "entropy"):
        assert found.metadata.codebooks[name].to_json() == source.metadata.codebooks[name].to_json()
    for row, old in zip(found, source, strict=True):
        np.testing.assert_array_equal(row.targets.ids, old.targets.ids)
        np.testing.assert_array_equal(row.targets.residual_logprob, old.targets.residual_logprob)
        roots = [np.exp(each.targets.logprobs.astype(np.float64) / 2) for each in (row, old)]
        np.testing.assert_allclose(*roots, atol=book.max_error + 1e-6)
        if kind == "threshold":
            sampled = old.targets.logprobs == weight
            assert sampled.any() and (row.targets.logprobs[sampled] == weight).all()


@pytest.mark.parametrize("samples", [{}, {"samples": None}])
def test_a_threshold_without_samples_is_no_sample(tmp_path, samples):
    """As another program may write it."""
    write_cache(tmp_path / "source", metadata_of({**TOP_K, "tail_threshold": 0.4, **samples}))
    found = convert(tmp_path / "source", tmp_path / "other", levels=64)
    expected = cf.sqrt_probability_codebook(64).values
    np.testing.assert_array_equal(found.metadata.codebooks["target_logprobs"].values, expected)
    with pytest.raises(cf.MismatchError, match="top-k targets have none"):
        convert(tmp_path / "source", tmp_path / "thinner", tail_threshold=0.5)


def test_levels_and_samples_together(tmp_path, three_samples):
    found = convert(three_samples, tmp_path / "both", levels=128, samples=2)
    book = found.metadata.codebooks["target_logprobs"]
    np.testing.assert_array_equal(book.values, cf.weight_codebook(128, 0.2).values)
    assert np.float32(np.log(0.2)) in found[0].targets.logprobs


# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSALS = {
    "entries of a sample": ("threshold, one sample", {"top_k": 5}, "`top_k`: threshold targets are unbiased only with"),
    "entries of draws": ("random, three samples", {"top_k": 5}, "`top_k`: random targets are unbiased only with"),
    "more entries": ("top-k", {"top_k": 10}, "`top_k` 10: found up to 9 entries per position"),
    "samples of none": ("top-k", {"samples": 1}, "`samples` 1: top-k targets have none"),
    "more samples": ("threshold, three samples", {"samples": 4}, "`samples` 4: found 3 per position"),
    "no samples": ("threshold, three samples", {"samples": 0}, "`samples` 0: found 3 per position"),
    "two of one": ("random, one sample", {"samples": 2}, "`samples` 2: found 1 per position"),
    "levels of draws": ("random, one sample", {"levels": 64}, "`levels`: the codebook of random targets holds"),
    "too few levels": ("top-k", {"levels": 35}, "`levels` 35: too few to reach down to probability 1e-12"),
    "too many levels": ("top-k", {"levels": 257}, "`levels` 257: codebook sqrt-probability: "),
    "too few beside the weight": ("threshold, one sample", {"levels": 37}, "`levels` 37: too few to reach down to"),
    "too many beside the weight": ("threshold, one sample", {"levels": 257}, "`levels` 257: too many, expected up to"),
    "threshold of none": ("top-k", {"tail_threshold": 0.5}, "`tail_threshold` 0.5: top-k targets have none"),
    "threshold of draws": ("random, one sample", {"tail_threshold": 0.5}, "`tail_threshold` 0.5: random targets have"),
    "the same threshold": ("threshold, one sample", {"tail_threshold": 0.4}, "found 0.4, expected a larger one, up to"),
    "no probability": ("threshold, one sample", {"tail_threshold": 1.5}, "`tail_threshold` 1.5: found 0.4, expected a"),
    "one of several": ("top-k", {"encoding": "packed", "rows_per_shard": 1, "samples": 2}, "`samples` 2: top-k"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_a_reason_and_nothing_is_written(tmp_path, caches, name):
    kind, changes, expected = REFUSALS[name]
    before = contents(caches[kind])
    with pytest.raises(cf.MismatchError) as caught:
        list(cf.convert_cache(caches[kind], tmp_path / "output", cf.Conversion(**changes)))
    message = str(caught.value)
    assert expected in message and str(caches[kind]) in message and "\n" not in message
    assert message.endswith("Leave this change out.")
    assert not (tmp_path / "output").exists() and contents(caches[kind]) == before


@pytest.mark.parametrize("changes", [{"encoding": "zip"}, {"top_k": 0}, {"rows_per_shard": 0}])
def test_values_that_make_no_sense_are_refused(tmp_path, caches, changes):
    with pytest.raises(ValueError):
        list(cf.convert_cache(caches["top-k"], tmp_path / "output", cf.Conversion(**changes)))
    assert not (tmp_path / "output").exists()


def test_places_that_are_taken(tmp_path, caches):
    source = shutil.copytree(caches["top-k"], tmp_path / "source")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").write_text("years of work")
    convert(source, tmp_path / "finished", encoding="packed")
    before = contents(tmp_path)
    for output, error, expected in (
        (tmp_path / "foreign", cf.CacheError, "found 'thesis.tex', expected an empty directory"),
        (tmp_path / "finished", cf.CacheError, "found a finished cache with all its shards"),
        (source, cf.CacheError, "it is the cache to convert"),
    ):
        with pytest.raises(error, match=expected):
            list(cf.convert_cache(source, output, cf.Conversion(encoding="packed")))
        assert contents(tmp_path) == before


def test_sources_that_are_none(tmp_path, caches):
    unfinished = shutil.copytree(caches["top-k"], tmp_path / "unfinished")
    (unfinished / "manifest.json").rename(unfinished / "manifest.partial.json")
    for source, expected in ((tmp_path / "nowhere", "no such directory"), (unfinished, "an unfinished cache")):
        with pytest.raises(cf.FormatError, match=expected):
            list(cf.convert_cache(source, tmp_path / "output", cf.Conversion()))
    assert not (tmp_path / "output").exists()


def test_a_damaged_source_makes_no_cache(tmp_path, caches):
    source = shutil.copytree(caches["top-k"], tmp_path / "source")
    shard = source / "shards/shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(cf.CorruptShardError, match="source/shards/shard-00001.arrow"):
        list(cf.convert_cache(source, tmp_path / "output", cf.Conversion(encoding="packed")))
    assert not (tmp_path / "output/manifest.json").exists()
    shutil.copy(caches["top-k"] / "shards/shard-00001.arrow", shard)
    list(cf.convert_cache(source, tmp_path / "output", cf.Conversion(encoding="packed")))
    assert cf.verify_cache(tmp_path / "output", deep=True).rows == 10


# -- interruptions ----------------------------------------------------------------------------------------------------

CHANGES = {
    "packed": {"encoding": "packed"},
    "other shards": {"rows_per_shard": 3, "rows_per_record_batch": 2, "compression_level": 1},
    "thinned": {"tail_threshold": 0.6, "samples": 2},
    "packed in other shards": {"encoding": "packed", "rows_per_shard": 5, "rows_per_record_batch": 3},
}


@pytest.mark.long
@pytest.mark.parametrize("name", CHANGES)
def test_interrupted_and_continued_gives_the_same_bytes(tmp_path, three_samples, name):
    source, conversion = three_samples, cf.Conversion(**CHANGES[name])
    list(cf.convert_cache(source, tmp_path / "whole", conversion))
    whole = contents(tmp_path / "whole")
    for stops in ((0, 1), (1, 4), (3, 3)):  # stopped twice, each time after so many record batches of the source
        path = tmp_path / f"stopped-{stops}"
        for number, stop in enumerate(stops):
            running = cf.convert_cache(source, path, conversion)
            for _ in range(stop):
                next(running)
            if number:
                running.close()
            elif stop:
                with pytest.raises(KeyboardInterrupt):
                    running.throw(KeyboardInterrupt)
            assert not (path / "manifest.json").exists() and not list(path.rglob(".*"))
        assert list(cf.convert_cache(source, path, conversion))[-1] == 10
        assert contents(path) == whole


def test_what_is_complete_is_not_written_again(tmp_path, caches, monkeypatch):
    running = cf.convert_cache(caches["top-k"], tmp_path / "output", cf.Conversion(encoding="packed"))
    for _ in range(4):
        next(running)
    running.close()
    assert len(list((tmp_path / "output/shards").glob("*.json"))) == 2
    written, write = [], ShardWriter.write

    def counting(shard, batch):
        written.append(int(batch.rows[0]))
        write(shard, batch)

    monkeypatch.setattr(ShardWriter, "write", counting)
    list(cf.convert_cache(caches["top-k"], tmp_path / "output", cf.Conversion(encoding="packed")))
    assert written == [8]


def test_continued_with_other_changes_is_refused(tmp_path, caches):
    running = cf.convert_cache(caches["top-k"], tmp_path / "output", cf.Conversion(encoding="packed"))
    for _ in range(3):
        next(running)
    running.close()
    before = contents(tmp_path / "output")
    with pytest.raises(cf.MismatchError, match="compression.level recorded 9, given 1"):
        list(
            cf.convert_cache(
                caches["top-k"], tmp_path / "output", cf.Conversion(encoding="packed", compression_level=1)
            )
        )
    assert contents(tmp_path / "output") == before


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"top_k": 3}, {"encoding": "packed"}, {"rows_per_record_batch": 4}])
def test_record_batches_do_not_pile_up(tmp_path, monkeypatch, changes):
    """Of 20, one is in work and at most one more waits; packed, also those of the first shard, which teach."""
    write_cache(tmp_path / "source", metadata_of(TOP_K, rows=40, rows_per_shard=8))
    entries: list[weakref.ref] = []
    read = ShardReader.record_batch

    def remember(shard, index, *streams):
        batch = read(shard, index, *streams)
        entries.append(weakref.ref(batch.logprobs))  # which any row of the batch keeps alive
        return batch

    monkeypatch.setattr(ShardReader, "record_batch", remember)
    alive = []
    for _ in cf.convert_cache(tmp_path / "source", tmp_path / "output", cf.Conversion(**changes)):
        alive.append(sum(each() is not None for each in entries))
    assert len(entries) == len(alive) == 20
    waiting = 4 if "encoding" in changes else 0
    assert max(alive[waiting:]) <= 2
    assert max(alive) <= max(2, waiting + 1)


def test_kept_rows_would_be_noticed(tmp_path):
    """What the test above counts: a row that is kept keeps its record batch."""
    write_cache(tmp_path / "source", metadata_of(TOP_K))
    batch = next(cf.open_cache(tmp_path / "source").iter_record_batches())
    entries, row = weakref.ref(batch.logprobs), batch.row(0)
    del batch
    assert entries() is not None
    del row
    assert entries() is None


# -- where it goes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, output, how",
    [
        ("cache", "cache", "is"),
        ("cache", "cache/", "is"),
        ("cache", "other/../cache", "is"),
        ("link", "cache", "is"),
        ("cache", "link", "is"),
        ("cache", "cache/sub", "lies inside"),
        ("link", "cache/shards/a/b", "lies inside"),
        ("cache", "link/sub", "lies inside"),
        ("cache", ".", "contains"),
        ("file://{}/cache", "{}/cache/sub", "lies inside"),
        ("{}/cache", "file://{}/cache", "is"),
    ],
)
def test_an_output_that_is_its_source_or_in_it_or_around_it_is_refused(
    source: str, output: str, how: str, caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(caches["top-k"], tmp_path / "cache")
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path / "cache")
    with pytest.raises(cf.CacheError, match=f": it {how} the cache to convert .* Choose another `output`"):
        list(cf.convert_cache(source.format(tmp_path), output.format(tmp_path), cf.Conversion(encoding="packed")))
    assert contents(tmp_path / "cache") == before


def test_the_same_on_an_object_store(caches: dict[str, Path]) -> None:
    source = "memory://apart/cache"
    list(cf.convert_cache(caches["top-k"], source, cf.Conversion()))
    for output in (source, source + "/", source + "/sub", "memory://apart", "memory:///apart/cache/sub"):
        with pytest.raises(cf.CacheError, match=": it .* the cache to convert"):
            list(cf.convert_cache(source, output, cf.Conversion(encoding="packed")))
    cf.verify_cache(source, deep=True)


def test_a_neighbour_whose_name_begins_alike_is_another_place(caches: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(caches["top-k"], tmp_path / "cache")
    for output in (tmp_path / "cache-2", tmp_path / "cach", tmp_path / "deep/cache"):
        convert(tmp_path / "cache", output, encoding="packed")
    list(cf.convert_cache(tmp_path / "cache", "memory://apart/neighbour", cf.Conversion()))
    list(cf.convert_cache("memory://apart/neighbour", "memory://apart/neighbour-2", cf.Conversion()))
    assert_same_rows(cf.open_cache("memory://apart/neighbour-2"), cf.open_cache(tmp_path / "cache"))
