"""What a cache whose checksums are all true, and whose text means harm, can do to who reads it (docs/security.md)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import cache_format as cf
from benchmarks import fuzz
from cache_format.read_cache import ReadCache
from cache_format.storage import open_directory, write_bytes
from cache_samples import SIDECAR, contents, edit_json, seal_manifest

# -- a checksum is the name of a file ---------------------------------------------------------------------------------

DIGESTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "header": lambda sidecar: sidecar["header"],
    "record batch": lambda sidecar: sidecar["record_batches"][0],
    "footer": lambda sidecar: sidecar["footer"],
    "head": lambda manifest: manifest["targets"]["head"],
}


@pytest.mark.parametrize("said", ["absolute", "../../precious.txt", "AB" * 32, "ab" * 32 + "\n"])
@pytest.mark.parametrize("part", DIGESTS)
def test_no_checksum_leads_out_of_the_local_copies(tmp_path: Path, part: str, said: str):
    """A copy that is not what its checksum says is deleted: with a path for a checksum it would be a file of the
    reader's."""
    precious, path = tmp_path / "precious.txt", tmp_path / "cache"
    precious.write_text("keep")
    said = str(precious) if said == "absolute" else said
    written(path, fuzz.sound_cache("hidden"))
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
        with pytest.raises(ValueError, match="no SHA-256"):
            use(said)
    assert precious.read_text() == "keep"


def written(path: Path, files: fuzz.Files) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


# -- a directory for local copies that is somebody's ------------------------------------------------------------------


def test_local_copies_make_room_among_their_own_files_only(tmp_path: Path):
    """`--cache-dir` may name a directory with other things in it, in folders that are named as those of the copies."""
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
