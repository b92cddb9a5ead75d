"""Damaged and lying caches: always a CacheError of one line that names the file and what to do.

Two kinds. *Damage* changes bytes, and some checksum notices before anything parses them. *Lies*
have all their checksums recomputed (`cache_samples.reseal`), so only the rules can notice.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

import cache_format as cf
from cache_samples import (
    SHARD,
    SIDECAR,
    complaint,
    edit_json,
    forge_shard,
    reseal,
    seal_manifest,
    write_sample,
)
from forging import damaged, put, relist, swap_ids


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "cache"
    write_sample(path)
    return path


@pytest.fixture
def path(original, tmp_path):
    return shutil.copytree(original, tmp_path / "cache")


def flip(file, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << (position % 8)
    file.write_bytes(data)


@pytest.mark.parametrize("region", ["header", "record batch 0", "record batch 1", "footer"])
def test_flipped_bit_in_a_shard(path, region):
    sidecar = json.loads((path / SIDECAR).read_bytes())
    parts = {"header": sidecar["header"], "footer": sidecar["footer"]}
    parts |= {f"record batch {i}": part for i, part in enumerate(sidecar["record_batches"])}
    start, stop = parts[region]["start"], parts[region]["stop"]
    good = (path / SHARD).read_bytes()
    for position in {start, (start + stop) // 2, stop - 1}:
        flip(path / SHARD, position)
        message = complaint(path, cf.CorruptShardError)
        assert f"shard-00000.arrow, {region}: checksum" in message
        assert "Delete shards/shard-00000.arrow and run cache-teacher again" in message
        (path / SHARD).write_bytes(good)


def test_damage_is_found_where_it_is_touched_and_nowhere_else(path):
    batch = json.loads((path / SIDECAR).read_bytes())["record_batches"][1]
    flip(path / SHARD, batch["start"] + 100)
    cache = cf.open_cache(path)
    assert [cache[row].row for row in (0, 1, 4, 9)] == [0, 1, 4, 9]
    for _ in range(2):  # an error is not remembered as a success
        with pytest.raises(cf.CorruptShardError, match="record batch 1"):
            cache[2]


def test_every_bit_of_the_json_files_counts(path):
    """Each byte of the manifest and of a sidecar is covered by some checksum."""
    for name in ("manifest.json", SIDECAR):
        good = (path / name).read_bytes()
        for position in [*range(0, len(good), max(1, len(good) // 60)), len(good) - 1]:
            flip(path / name, position)
            message = complaint(path)
            # The manifest has to be parsed before its checksum can be found; a sidecar has not.
            assert "manifest.json" in message if name != SIDECAR else f"{SIDECAR}: checksum" in message
            (path / name).write_bytes(good)


@pytest.mark.parametrize("name", [SHARD, SIDECAR, "manifest.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("keep", [0, 1, 0.5, 0.99])
def test_truncated(path, name, keep):
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: int(keep if keep == 1 else keep * len(data))])
    message = complaint(path)
    assert name in message
    if name == SHARD:
        assert f"expected {len(data)}: the file was cut short" in message


@pytest.mark.parametrize("name", [SHARD, SIDECAR, "tokenizer/tokenizer.json"])
def test_missing_file(path, name):
    (path / name).unlink()
    assert name in complaint(path)


def test_appended_bytes(path):
    with open(path / SHARD, "ab") as file:
        file.write(b"more")
    assert "bytes, expected" in complaint(path, cf.CorruptShardError)


def test_swapped_shards(path):
    second = path / SHARD.replace("00000", "00001")
    shutil.move(path / SHARD, path / "x")
    shutil.move(second, path / SHARD)
    shutil.move(path / "x", second)
    complaint(path, cf.CorruptShardError)


def test_swapped_record_batches(path):
    """Both batches are intact, and the sidecar has been made to agree."""
    sidecar = json.loads((path / SIDECAR).read_bytes())
    data = (path / SHARD).read_bytes()
    first, second = (data[b["start"] : b["stop"]] for b in sidecar["record_batches"])
    start, stop = sidecar["header"]["stop"], sidecar["footer"]["start"]
    (path / SHARD).write_bytes(data[:start] + second + first + data[stop:])
    reseal(path)
    assert "row numbers 2 to 3, expected 0 to 1" in complaint(path, cf.CorruptShardError)


def test_places_without_a_cache(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"")
    for path, expected in (
        (tmp_path / "nowhere", "no such directory"),
        (tmp_path, "found no manifest.json: not a cache"),
        (tmp_path / "holiday.jpg", "found a file, expected a directory"),
    ):
        with pytest.raises(cf.FormatError, match=expected):
            cf.open_cache(path)


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"", "Expecting value"),
        (b"[]", "not a JSON object"),
        (b"{}", "found format None"),
        (b"\x80", "decode"),
        (b"[" * 100_000, "manifest.json"),
        (b'{"format": "distill-cache", "format_version": 3}', "found format version 3, expected 1 or 2"),
        (b'{"format": "distill-cache", "format_version": 1}', "its checksum is"),
    ],
)
def test_other_manifests(tmp_path, data, expected):
    (tmp_path / "manifest.json").write_bytes(data)
    assert expected in complaint(tmp_path, cf.FormatError)


def first_shard(**changes):
    return lambda manifest: manifest["shards"][0].update(changes)


def codebook(name: str, **changes):
    return lambda manifest: manifest["codebooks"][name].update(changes)


MANIFEST_LIES = {
    "shard elsewhere": (first_shard(name="../../etc/x.arrow"), "shard '../../etc/x.arrow'"),
    "tokenizer elsewhere": (
        lambda m: m["tokenizer_files"].update({"../../.bashrc": "0" * 64}),
        "not a plain relative path",
    ),
    "shard forgotten": (lambda m: m["shards"].pop(), "2 shards, expected 3"),
    "rows moved": (first_shard(rows=3), "3 rows do not fit"),
    "negative size": (first_shard(entries=-1), "entries is -1"),
    "size as text": (first_shard(tokens="28"), "tokens is '28'"),
    "name as number": (first_shard(name=1), "name is 1"),
    "absurd row count": (lambda m: m["corpus"].update(rows=10**18), "3 shards, expected"),
    "infinite row count": (lambda m: m["corpus"].update(rows=float("inf")), "Infinity is not JSON"),
    "no vocabulary": (lambda m: m.pop("vocab_size"), "no key 'vocab_size'"),
    "codebook above 0": (codebook("target_logprobs", values=[-1, 0.5]), "above 0"),
    "codebook with NaN": (codebook("entropy", values=["nan"]), "values[0] is 'nan', expected a number"),
    "codebook too long": (codebook("entropy", values=list(range(257))), "up to 256"),
    "codebook of text": (codebook("entropy", values=["one"]), "values[0] is 'one', expected a number"),
    "codebook missing": (lambda m: m["codebooks"].pop("entropy"), "no key 'codebooks.entropy'"),
    "shards of text": (lambda m: m.update(tokenizer_files=["x"]), "tokenizer_files is ['x'], expected an object"),
}


@pytest.mark.parametrize("name", MANIFEST_LIES)
def test_lying_manifest(path, name):
    change, expected = MANIFEST_LIES[name]
    seal_manifest(path, change)
    message = complaint(path, cf.FormatError)
    assert expected in message and "manifest.json" in message


@pytest.mark.parametrize("said", [[], "answers.jsonl", 7])
def test_a_lie_about_answers(path, said):
    seal_manifest(path, lambda manifest: manifest["corpus"].update(generation={"answers_file": said}))
    for read in (lambda: list(cf.open_cache(path).answers()), lambda: cf.verify_cache(path)):
        with pytest.raises(cf.FormatError, match=r"manifest\.json: corpus\.generation\.answers_file"):
            read()


def first_batch(**changes):
    return lambda sidecar: sidecar["record_batches"][0].update(changes)


def more(sidecar, key):
    """One more in the first record batch and in the total, so that they add up."""
    sidecar["record_batches"][0][key] += 1
    sidecar[key] += 1


SIDECAR_LIES = {
    "gap between ranges": (first_batch(stop=5000), "ranges do not cover"),
    "range beyond the file": (lambda s: s["footer"].update(stop=10**15), "ranges do not cover"),
    "file size": (lambda s: s.update(file_bytes=s["file_bytes"] + 1), "ranges do not cover"),
    "first row": (first_batch(first_row=1), "rows or bytes are not those of the manifest"),
    "tokens": (first_batch(tokens=1), "the tokens of its record batches do not add up"),
    "more tokens": (lambda s: more(s, "tokens"), "its tokens are not those of the manifest"),
    "batch forgotten": (lambda s: s["record_batches"].pop(), "ranges do not cover"),
    "not an object": (lambda s: s.update(header=[]), "shard-00000.json"),
}


@pytest.mark.parametrize("name", SIDECAR_LIES)
def test_lying_sidecar(path, name):
    change, expected = SIDECAR_LIES[name]
    edit_json(path / SIDECAR, change)
    seal_manifest(path)
    message = complaint(path, cf.CorruptShardError)
    assert expected in message and "shards/shard-00000" in message


@pytest.mark.parametrize("key", ["tokens", "counted_tokens", "entries"])
def test_totals_that_agree_with_each_other_but_not_with_the_rows(path, key):
    edit_json(path / SIDECAR, lambda sidecar: more(sidecar, key))
    seal_manifest(path, lambda m: m["shards"][0].update({key: m["shards"][0][key] + 1}))
    assert f"{key} is" in complaint(path, cf.CorruptShardError)


def shift_offsets(columns):
    offsets = columns["target_ids"].offsets.to_numpy().copy()
    offsets[1] -= 1
    column = columns["target_ids"]
    columns["target_ids"] = relist(column, column.values, pa.array(offsets))


def wild_offsets(columns):
    offsets = columns["input_ids"].offsets.to_numpy().copy()
    offsets[1] = 2**31 - 1
    column = columns["input_ids"]
    buffers = [None, pa.py_buffer(offsets)]
    columns["input_ids"] = pa.Array.from_buffers(column.type, len(column), buffers, children=[column.values])


def other_dictionary(columns):
    column = columns["target_logprobs"]
    values = column.values.dictionary.to_numpy().copy()
    values[7] = np.nextafter(values[7], np.float32(0))
    forged = pa.DictionaryArray.from_arrays(column.values.indices, pa.array(values))
    columns["target_logprobs"] = relist(column, forged)


def short_dictionary(columns):
    column = columns["entropy"]
    dictionary = column.values.dictionary[:10]
    forged = pa.DictionaryArray.from_arrays(column.values.indices, dictionary, safe=False)
    columns["entropy"] = relist(column, forged)


def null_entry(columns):
    column = columns["target_ids"]
    values = pa.array([None, *column.values.to_pylist()[1:]], pa.uint16())
    columns["target_ids"] = relist(column, values)


SHARD_LIES = {
    "target id": (put("target_ids", 3, 1000), "target id 1000, expected below 1000"),
    "input id": (put("input_ids", 3, 60_000), "row 0, position 3: input id outside"),
    "target count": (put("target_counts", 0, 250), "target count outside 0 to 9"),
    "exact count": (put("exact_counts", 0, 9), "row 0, position 0: more exact entries"),
    "loss mask": (put("loss_mask", 6, True), "loss_mask set at the end of a segment"),
    "segments": (put("segment_lengths", 0, 100), "segments cover"),
    "negative segment": (put("segment_lengths", 0, -1), "segment length -1"),
    "descending ids": (swap_ids, "expected ascending ids"),
    "rows of entries": (shift_offsets, "target_logprobs and target_ids differ in length"),
    "wild offsets": (wild_offsets, "record batch 0"),
    "dictionary": (other_dictionary, "the dictionary of target_logprobs is not the codebook"),
    "codes beyond it": (short_dictionary, "record batch 0"),
    "nulls": (null_entry, "target_ids holds nulls"),
    "row numbers": (lambda c: c.update(row=pa.array([5, 6], pa.uint64())), "expected 0 to 1"),
    "no entropy": (lambda c: c.pop("entropy"), "columns are not those"),
    "another column": (lambda c: c.update(more=c["row"]), "columns are not those"),
    "column type": (lambda c: c.update(row=c["row"].cast(pa.int64())), "columns are not those"),
}


@pytest.mark.parametrize("name", SHARD_LIES)
def test_lying_shard(path, name):
    change, expected = SHARD_LIES[name]
    if name == "no entropy":

        def drop(columns):
            columns["hidden_entropy"] = columns.pop("entropy")

        change = drop
    forge_shard(path, change)
    message = complaint(path, cf.CorruptShardError)
    assert expected in message and "shard-00000.arrow" in message


def test_samples_that_are_not_there(path):
    """Of a cache that has none."""
    seal_manifest(path, lambda m: m["targets"].update(samples=3))
    assert "columns are not those" in complaint(path, cf.CorruptShardError)


def test_columns_of_hidden_states_are_passed_over(path):
    forge_shard(path, lambda columns: columns.update(hidden_0=columns["row"]))
    assert cf.verify_cache(path, deep=True).rows == 10


def test_compression_bomb(path):
    """A buffer that says it expands to 2^40 bytes is refused before anything allocates them."""
    data = (path / SHARD).read_bytes()
    batch = json.loads((path / SIDECAR).read_bytes())["record_batches"][0]
    body = data[batch["start"] : batch["stop"]]
    frame = body.index(b"\x28\xb5\x2f\xfd")  # zstd's magic; the announced size stands before it
    at = batch["start"] + frame - 8
    (path / SHARD).write_bytes(data[:at] + (2**40).to_bytes(8, "little") + data[at + 8 :])
    reseal(path)
    assert "expands to more bytes" in complaint(path, cf.CorruptShardError)


@pytest.mark.long
@pytest.mark.parametrize("part", ["header", "record batch"])
def test_random_damage_under_true_checksums_never_crashes(path, part):
    """Fuzzing: whatever the bytes of a shard say, the answer is rows or a CacheError."""
    outcomes = set()
    for _ in damaged(path, part):
        try:
            cf.open_cache(path)[0]
            outcomes.add("rows")
        except cf.CacheError:
            outcomes.add("error")
    assert outcomes == {"rows", "error"}
