"""What a cache whose checksums are all true, and whose text means harm, can do to who reads it (docs/security.md)."""

from __future__ import annotations

import io
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import cache_format as cf
from benchmarks import fuzzed
from cache_format.codecs import ipc
from cache_format.codecs.packed.lexicon import Lexicon
from cache_format.storage.directory import open_directory, write_bytes
from cache_format.storage.read_cache import ReadCache
from cache_format.write import shard_writer
from cache_samples import SIDECAR, contents, edit_json, sample_metadata, seal_manifest, write_sample

# -- a checksum is the name of a file ---------------------------------------------------------------------------------

DIGESTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "header": lambda sidecar: sidecar["header"],
    "record batch": lambda sidecar: sidecar["record_batches"][0],
    "footer": lambda sidecar: sidecar["footer"],
    "head": lambda manifest: manifest["targets"]["head"],
}


@pytest.mark.long
@pytest.mark.parametrize("said", ["absolute", "../../precious.txt", "AB" * 32, "ab" * 32 + "\n"])
@pytest.mark.parametrize("part", DIGESTS)
def test_no_checksum_leads_out_of_the_local_copies(tmp_path: Path, part: str, said: str):
    """A copy that is not what its checksum says is deleted: with a path for a checksum it would be a file of the
    reader's."""
    precious, path = tmp_path / "precious.txt", tmp_path / "cache"
    precious.write_text("keep")
    said = str(precious) if said == "absolute" else said
    written(path, fuzzed.sound_cache("hidden"))
    if part == "head":
        seal_manifest(path, lambda manifest: DIGESTS[part](manifest).update(sha256=said))
    else:
        edit_json(path / SIDECAR, lambda sidecar: DIGESTS[part](sidecar).update(sha256=said))
        seal_manifest(path)
    url = f"memory://{tmp_path.name}"
    for name, data in contents(path).items():
        write_bytes(open_directory(url), name, data)
    copies = ReadCache(tmp_path / "copies", 10**6)
    with pytest.raises(cf.CacheError, match=r"sha256 is '.*', expected a SHA-256"):
        cache = cf.open_cache(url, read_cache=copies)
        cache.head()
        cache[0]
    assert precious.read_text() == "keep"
    for use in (copies.get, copies.drop, lambda digest: copies.put(digest, pa.py_buffer(b"x"))):
        with pytest.raises(ValueError, match="not a SHA-256"):
            use(said)
    assert precious.read_text() == "keep"


def written(path: Path, files: fuzzed.Files) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


# -- a directory for local copies that is somebody's ------------------------------------------------------------------


def test_local_copies_make_room_among_their_own_files_only(tmp_path: Path):
    """`cache_dir` may name a directory with other things in it, in folders that are named as those of the copies."""
    foreign = {
        f"{folder}/{name}" for folder in ("en", "00", "distill-copies/00") for name in ("corpus.txt", "notes.tmp")
    }
    foreign |= {f"00/{'0' * 64}", f"{'0' * 64}", "distill-copies/keep.txt"}
    written(tmp_path, dict.fromkeys(foreign, b"x" * 5000))
    link = tmp_path / "distill-copies/00" / ("0" * 64)
    link.symlink_to(tmp_path / "en")
    left = tmp_path / "distill-copies/00" / f"{'00' * 32}.killed.tmp"  # of a process that was killed while writing
    left.write_bytes(b"x" * 5000)
    copies = ReadCache(tmp_path, 8000)
    for i in range(1, 30):
        copies.put(f"{i:064x}", pa.py_buffer(bytes(1000)))
    assert all((tmp_path / name).read_bytes() == b"x" * 5000 for name in foreign)
    assert link.is_symlink() and not left.exists()
    ours = [file for file in (tmp_path / "distill-copies").rglob("*") if len(file.name) == 64 and not file.is_symlink()]
    assert 5 <= len(ours) <= 8  # what is not ours does not count either
    assert copies.get(f"{29:064x}") is not None and copies.get(f"{1:064x}") is None


# -- much out of little -----------------------------------------------------------------------------------------------


def claims(rows: int, of_batch: int, **of_shard: int) -> Callable[[dict[str, Any]], None]:
    """A manifest of one shard with so many rows."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["corpus"]["rows"] = manifest["rows_per_shard"] = rows
        manifest["rows_per_record_batch"] = of_batch
        manifest["shards"] = [{**manifest["shards"][0], "rows": rows, **of_shard}]

    return change


CLAIMS = {
    "a list of record batches": (claims(10**12, 1), "record batches in a shard, expected at most 1,048,576"),
    "more than its bytes hold": (claims(2**20, 1), "bytes cannot hold 1,048,576 record batches"),
    "more than its file holds": (claims(2**20, 1, bytes=2**40, tokens=2**40), "expected 1099511627776"),
    "a record batch of many rows": (claims(10**12, 10**12), "1,000,000,000,000 rows of 28 tokens"),
    "rows without tokens": (claims(30, 30, tokens=29), "30 rows of 29 tokens"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", CLAIMS)
def test_a_manifest_cannot_ask_for_more_memory_than_the_files_are_worth(tmp_path: Path, name: str):
    change, expected = CLAIMS[name]
    write_sample(tmp_path / "cache")
    seal_after(tmp_path / "cache", change)
    for read in (
        lambda cache: cache.record_batches(),  # what an order to train in is made of
        lambda cache: cache[0],
        lambda cache: list(cache.check_bytes()),
        lambda cache: next(cache.iter_rows()),
    ):
        tracemalloc.start()
        with pytest.raises(cf.CacheError) as caught:
            read(cf.open_cache(tmp_path / "cache"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert expected in str(caught.value) or "not those of the manifest" in str(caught.value)
        assert peak < 5e6


def seal_after(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """`seal_manifest` takes the sizes of the shards from their sidecars, this leaves them as `change` does."""
    edit_json(path / "manifest.json", change)
    files = contents(path)
    fuzzed.seal_manifest(files)
    (path / "manifest.json").write_bytes(files["manifest.json"])


def zeros(tokens: int) -> cf.CacheRow:
    nothing, none = np.zeros(tokens, np.uint8), np.zeros(tokens, np.float32)
    targets = cf.SparseTargets(nothing, np.zeros(0, np.uint16), none[:0], nothing, none, none)
    return cf.CacheRow(0, nothing.astype(np.uint16), nothing.astype(bool), np.array([tokens]), targets)


@pytest.mark.long
@pytest.mark.parametrize("encoding", ["columns", "packed"])
def test_what_compresses_a_thousandfold_is_neither_read_nor_written(
    tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
):
    """15 kB can hold a row of 20 million tokens, which takes 757 MB to read; here are fewer, and a lower limit."""
    metadata = sample_metadata(1, rows_per_shard=1, rows_per_record_batch=1, encoding=encoding)

    def write(tokens: int) -> None:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        with cf.CacheWriter(tmp_path / "cache", metadata) as writer:
            writer.write([zeros(tokens)])

    write(1_000_000)  # nobody's memory is too small for these
    assert len(cf.open_cache(tmp_path / "cache")[0].input_ids) == 1_000_000
    monkeypatch.setattr(ipc, "EXPANDS_ANYWAY", 2**16)
    with pytest.raises(cf.CorruptShardError, match=r"record batch 0: .* bytes expand to .*, expected at most 64 times"):
        cf.open_cache(tmp_path / "cache")[0]
    with pytest.raises(ValueError, match="expected at most 64 times"):
        write(1_000_000)
    assert not (tmp_path / "cache/manifest.json").exists()
    monkeypatch.setattr(shard_writer, "check_expansion", lambda *_: None)
    write(10_000)
    assert cf.verify_cache(tmp_path / "cache").rows == 1


def test_a_lexicon_cannot_expand_without_limit_either(monkeypatch: pytest.MonkeyPatch):
    row = pa.record_batch({"order": pa.array([np.zeros(2**20, np.uint16)], pa.list_(pa.uint16()))})
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, row.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as file:
        file.write_batch(row)
    monkeypatch.setattr(ipc, "EXPANDS_ANYWAY", 2**16)
    with pytest.raises(cf.FormatError, match=r"here: not a lexicon \(.* expand to .* 64 times as many"):
        Lexicon.from_bytes(sink.getvalue(), 1000, "here")


def test_a_row_is_no_longer_than_the_windows_are_said_to_be(tmp_path: Path):
    """By that a student is chosen, and what a step takes is planned."""
    write_sample(tmp_path / "cache")
    seal_manifest(tmp_path / "cache", lambda manifest: manifest["corpus"].update(window_length=7))
    assert cf.verify_cache(tmp_path / "cache", deep=True).rows == 10
    seal_manifest(tmp_path / "cache", lambda manifest: manifest["corpus"].update(window_length=6))
    with pytest.raises(cf.CorruptShardError, match="row 0: 7 tokens, expected at most 6"):
        cf.open_cache(tmp_path / "cache")[0]
