"""Packed caches that lie under true checksums: shards, columns, lexicons and manifests."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from test_hostile_packed import HEADER, MEGABYTE, peak_bytes

import cache_format as cf
from benchmarks import fuzz, fuzzed
from cache_format.manifest.manifest import LEXICON
from cache_samples import SHARD, SIDECAR, complaint, contents, edit_json, forge_shard, seal_manifest
from packed_samples import (
    KINDS,
    TOP_K,
    empty_lexicon,
    lexicon_of,
    metadata_of,
    row_of,
    write_cache,
)

pytestmark = pytest.mark.usefixtures("implementation")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "cache"
    write_cache(path, metadata_of(KINDS["threshold, three samples"], encoding="packed"))
    return path


@pytest.fixture
def path(original, tmp_path):
    return shutil.copytree(original, tmp_path / "cache")


def change_blocks(change):
    """`change` gets the blocks of a record batch, one for each of its rows, and returns others."""

    def edit(columns):
        columns["packed"] = pa.array(change(columns["packed"].to_pylist()), pa.binary())

    return edit


def with_header(**changes: int):
    def change(blocks):
        names = ("entries", "lanes", "length")
        header = dict(zip(names, struct.unpack_from(HEADER, blocks[0]), strict=True)) | changes
        return [struct.pack(HEADER, *(header[name] for name in names)) + blocks[0][10:], *blocks[1:]]

    return change


BLOCK_LIES = {
    "in the wrong row": (lambda b: b[::-1], "packed targets in a row that is not the first"),
    "in both rows": (lambda b: [b[0], b[0]], "packed targets in a row that is not the first"),
    "a byte in the second row": (lambda b: [b[0], b"\0"], "packed targets in a row that is not the first"),
    "nowhere": (lambda b: [b"", b""], "packed targets are cut short"),
    "null": (lambda b: [b[0], None], "column packed holds nulls"),
    "header only": (lambda b: [b[0][:10], b""], "frequencies of packed targets"),
    "2^31 entries": (with_header(entries=2**31), "announce 2147483648 entries"),
    "one entry more": (with_header(entries=200), "announce 200 entries|fewer entries"),
    "no entries": (with_header(entries=0), "more entries than they announce"),
    "no lanes": (with_header(lanes=0), "entries in 0 lanes"),
    "more lanes": (with_header(lanes=2), "packed targets"),
    "longer frequencies": (with_header(length=2**31), "packed targets"),
}


@pytest.mark.parametrize("name", BLOCK_LIES)
def test_lying_shard(path, name):
    change, expected = BLOCK_LIES[name]
    forge_shard(path, change_blocks(change))
    message = complaint(path, cf.CorruptShardError)
    assert any(each in message for each in expected.split("|")) and "shard-00000.arrow, record batch 0" in message


def put(name: str, index: int, value: int):
    def change(columns):
        column = columns[name]
        values = column.values.to_numpy(zero_copy_only=False).copy()
        values[index] = value
        columns[name] = pa.ListArray.from_arrays(column.offsets, pa.array(values), type=column.type)

    return change


COLUMN_LIES = {
    "input id": (put("input_ids", 3, 60_000), "an input id is outside the vocabulary of 1000"),
    "loss mask": (put("loss_mask", 6, True), "record batch 0"),
    "segments": (put("segment_lengths", 0, 100), "segments cover"),
    "no block": (lambda c: c.update(hidden_packed=c.pop("packed")), "columns are not those"),
    "text for a block": (lambda c: c.update(packed=pa.array(["", ""])), "columns are not those"),
    "targets as columns besides": (lambda c: c.update(target_counts=c["input_ids"]), "columns are not those"),
    "no rows": (lambda c: c.update({name: column.slice(0, 0) for name, column in c.items()}), "record batch 0"),
}


@pytest.mark.parametrize("name", COLUMN_LIES)
def test_lying_columns(path, name):
    change, expected = COLUMN_LIES[name]
    forge_shard(path, change)
    message = complaint(path, cf.CorruptShardError)
    assert expected in message and "shard-00000.arrow" in message


def test_columns_of_hidden_states_are_passed_over(path):
    forge_shard(path, lambda columns: columns.update(hidden_0=columns["row"]))
    assert cf.verify_cache(path, deep=True).rows == 10


def test_a_block_that_expands_without_end(path):
    """An Arrow buffer that announces more than its entries can take, before anything allocates it."""
    forge_shard(path, change_blocks(lambda blocks: [blocks[0] + bytes(2**22), *blocks[1:]]))
    assert "column packed expands to more bytes than its entries need" in complaint(path, cf.CorruptShardError)


@pytest.mark.parametrize(
    "more, expected", [(2**31, "expand to 17,179,"), (2**22, "entries is")], ids=["too many", "many"]
)
def test_a_sidecar_that_allows_many_entries(path, more, expected):
    """Its promise is not taken for what is there."""

    def lie(sidecar):
        sidecar["record_batches"][0]["entries"] += more
        sidecar["entries"] += more

    edit_json(path / SIDECAR, lie)
    seal_manifest(path, lambda m: m["shards"][0].update(entries=m["shards"][0]["entries"] + more))
    assert peak_bytes(lambda: complaint(path, cf.CorruptShardError)) < 16 * MEGABYTE
    assert expected in complaint(path, cf.CorruptShardError)
    forge_shard(path, change_blocks(with_header(entries=more)))
    expected = "fewer entries than they announce" if more == 2**22 else expected
    assert expected in complaint(path, cf.CorruptShardError)


def test_random_damage_under_true_checksums_never_crashes(path):
    good, rng = contents(path), np.random.default_rng(0)
    outcomes = set()

    def flip(blocks):
        if not blocks or first != blocks[0]:
            return blocks
        damaged = bytearray(blocks[0])
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        return [bytes(damaged), *blocks[1:]]

    with pa.OSFile(str(path / SHARD)) as file:
        first = pa.ipc.open_file(file.read_buffer()).get_batch(0).column("packed")[0].as_py()
    for _ in range(60):
        forge_shard(path, change_blocks(flip))
        try:
            cf.open_cache(path)[0]
            outcomes.add("rows")
        except cf.CorruptShardError:
            outcomes.add("error")
        for name in (SHARD, SIDECAR, "manifest.json"):
            (path / name).write_bytes(good[name])
    assert outcomes >= {"error"}
    assert cf.verify_cache(path, deep=True).rows == 10


# -- the lexicon of a cache -------------------------------------------------------------------------------------------


def test_a_missing_lexicon(path):
    (path / LEXICON).unlink()
    message = complaint(path, cf.FormatError)
    assert f"{LEXICON}: no such file" in message and "Restore it from a copy" in message
    assert len(cf.open_cache(path)) == 10  # what needs no targets goes on


def test_a_changed_lexicon(path):
    data = bytearray((path / LEXICON).read_bytes())
    for position in (0, len(data) // 2, len(data) - 1):
        data[position] ^= 1
        (path / LEXICON).write_bytes(data)
        message = complaint(path, cf.FormatError)
        assert f"{LEXICON}: checksum" in message
        data[position] ^= 1
    (path / LEXICON).write_bytes(data[:-1])
    assert f"{LEXICON}: checksum" in complaint(path, cf.FormatError)
    (path / LEXICON).write_bytes(data)
    assert cf.verify_cache(path, deep=True).rows == 10


def seal_lexicon(path, data: bytes) -> None:
    (path / LEXICON).write_bytes(data)
    digest = cf.sha256(data)
    seal_manifest(path, lambda m: m["lexicon"].update(sha256=digest, bytes=len(data)))


@pytest.mark.parametrize("data", [b"", b"ARROW1", empty_lexicon(999).to_bytes()])
def test_a_lexicon_of_something_else(path, data):
    seal_lexicon(path, data)
    message = complaint(path, cf.FormatError)
    assert f"{LEXICON}: " in message and "lexicon" in message.partition(LEXICON)[2]


def test_another_lexicon_gives_rows_that_obey_the_rules_or_an_error(path):
    """All tokens have other ranks: every id is another one."""
    rows = [row_of(metadata_of(KINDS["threshold, three samples"]), row) for row in range(20, 40)]
    for other in (empty_lexicon(1000), lexicon_of(rows * 2, 1000, 100.0)):
        seal_lexicon(path, other.to_bytes())
        try:
            assert cf.verify_cache(path, deep=True).rows == 10
        except cf.CorruptShardError as error:
            assert "shard-0000" in str(error)


MANIFEST_LIES = {
    "no lexicon": (lambda m: m.pop("lexicon"), "no key 'lexicon'"),
    "lexicon of text": (lambda m: m.update(lexicon="here"), "manifest.json"),
    "lexicon null": (lambda m: m.update(lexicon=None), "manifest.json"),
    "negative size": (lambda m: m["lexicon"].update(bytes=-1), "bytes is -1, expected a count"),
    "checksum as number": (lambda m: m["lexicon"].update(sha256=1), "sha256 is 1, expected a SHA-256"),
    "unknown encoding": (lambda m: m.update(encoding="zip"), "encoding is 'zip', expected columns or packed"),
    "encoding as number": (lambda m: m.update(encoding=1), "encoding is 1"),
}


@pytest.mark.parametrize("name", MANIFEST_LIES)
def test_lying_manifest(path, name):
    change, expected = MANIFEST_LIES[name]
    seal_manifest(path, change)
    message = complaint(path, cf.FormatError)
    assert expected in message and "manifest.json" in message


def test_the_other_encoding_is_claimed(path, tmp_path):
    seal_manifest(path, lambda m: m.update(encoding="columns"))
    assert "not packed with the manifest's lexicon" in complaint(path, cf.CorruptShardError)
    columns = tmp_path / "columns"
    write_cache(columns, metadata_of(KINDS["threshold, three samples"]))
    seal_manifest(columns, lambda m: m.update(encoding="packed"))
    assert "no key 'lexicon'" in complaint(columns, cf.FormatError)
    shutil.copy(path / LEXICON, columns)
    lexicon = json.loads((path / "manifest.json").read_bytes())["lexicon"]
    seal_manifest(columns, lambda m: m.update(lexicon=lexicon))
    assert "not packed with the manifest's lexicon" in complaint(columns, cf.CorruptShardError)


def test_a_manifest_of_before_there_were_two_encodings(tmp_path):
    write_cache(tmp_path / "cache", metadata_of(TOP_K))
    seal_manifest(tmp_path / "cache", lambda m: m.pop("encoding"))
    assert cf.open_cache(tmp_path / "cache").metadata.encoding == "columns"
    assert cf.verify_cache(tmp_path / "cache", deep=True).rows == 10


@pytest.mark.long
@pytest.mark.parametrize("target", ["packed", "lexicon"])
def test_kept_inputs_of_fuzzing(target: str, tmp_path: Path):
    """As tests/cache_format/test_fuzz.py, which runs with one implementation of the loops."""
    _, instead = fuzzed.part_of(*fuzzed.TARGETS[target])
    accepted = [fuzzed.read(instead(data), tmp_path / "cache") for data in fuzz.seeds(target)]
    assert not all(accepted)
