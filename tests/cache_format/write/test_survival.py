"""Power cuts, full disks and damaged shards: what a sidecar vouches for is there, everything else is written again."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import cache_format as cf
from cache_format.storage import directory as storage
from cache_format.storage.claims import CLAIMS
from cache_format.storage.directory import is_temporary
from cache_samples import SHARD, SIDECAR, contents, edit_json, sample_metadata, sample_row

ROWS = 10
FILES = {"tokenizer.json": b"{}"}


def write(path: Path, *, resume: bool = True, metadata: cf.CacheMetadata | None = None, **options: bool) -> int:
    """Write what is missing. Returns: the first row written."""
    metadata = metadata or sample_metadata(ROWS)
    with cf.CacheWriter(path, metadata, tokenizer_files=FILES, resume=resume, **options) as writer:
        first = writer.next_row
        while (shard := writer.begin_shard()) is not None:
            writer.write([sample_row(row) for row in metadata.shard_rows(shard)])
    return first


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("whole") / "cache"
    write(path)
    return contents(path)


# -- power cuts --------------------------------------------------------------------------------------------------------


class Disk:
    """Watches what reaches the disk: a file's bytes with its fsync, its name with that of the directory."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.images: list[dict[str, bytes]] = []  # after every step, what is certainly there if the power fails now
        self._bytes: dict[int, bytes] = {}  # by inode, flushed
        self._names: dict[str, dict[str, int]] = {}  # by flushed directory, name -> inode
        fsync, replace, link = storage._fsync, os.replace, os.link

        def flush(path: Path | str) -> None:
            path = Path(path)
            fsync(path)
            if path.is_dir():
                self._names[self._inside(path)] = {f.name: f.stat().st_ino for f in path.iterdir()}
            else:
                self._bytes[path.stat().st_ino] = path.read_bytes()
            self._remember()

        def after(function):
            def call(*args) -> None:
                function(*args)
                self._remember()

            return call

        monkeypatch.setattr(storage, "_fsync", flush)
        monkeypatch.setattr(os, "replace", after(replace))
        monkeypatch.setattr(os, "link", after(link))

    def _inside(self, path: Path) -> str:
        return path.relative_to(self.root.parent).as_posix()

    def _remember(self) -> None:
        """Names that were not flushed may be there or not; here they are not. Their bytes, if not flushed, are lost."""
        image = {}
        for folder, names in self._names.items():
            inside = Path(folder).relative_to(self.root.name) if folder.startswith(self.root.name) else None
            if inside is None or not self._reachable(folder):
                continue
            for name, inode in names.items():
                if inode in self._bytes and folder != f"{self.root.name}/{CLAIMS}":  # claims of a former boot
                    image[(inside / name).as_posix()] = self._bytes[inode]
        self.images.append(image)

    def _reachable(self, folder: str) -> bool:
        path = Path(folder)
        return path == Path(self.root.name) or path.name in self._names.get(path.parent.as_posix(), {})


def test_whenever_the_power_fails_what_a_sidecar_vouches_for_is_on_disk(tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path / "cache", patch)
        (tmp_path / "cache").mkdir()
        write(tmp_path / "cache")
    different = [image for i, image in enumerate(disk.images) if i == 0 or image != disk.images[i - 1]]
    assert len(different) > 10
    complete = []
    for index, image in enumerate(different):
        path = tmp_path / str(index)
        for name, data in image.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        sidecars = [name for name in image if name.endswith(".json") and name.startswith("shards/")]
        if "manifest.json" in image:
            assert cf.verify_cache(path).rows == ROWS
        first = write(path, allow_finished=True)
        assert first == min(4 * len(sidecars), ROWS), "a shard with a sidecar was written again"
        complete.append(len(sidecars))
        assert contents(path) == whole
        shutil.rmtree(path)
    assert complete == sorted(complete) and set(complete) == {0, 1, 2, 3}


# -- full disks --------------------------------------------------------------------------------------------------------


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


STEPS = {
    "bytes of a file": (storage.Path, "write_bytes"),
    "flush": (storage, "_fsync"),
    "name": (os, "replace"),
}


@pytest.mark.long
@pytest.mark.parametrize("step", STEPS)
def test_disk_that_is_full_at_any_step_keeps_the_complete_shards(tmp_path, whole, monkeypatch, step):
    module, name = STEPS[step]
    real, after = getattr(module, name), 0
    while True:
        path, calls = tmp_path / str(after), 0

        def sometimes(*args, after: int = after, **options):
            nonlocal calls
            calls += 1
            if calls > after:
                full()
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, sometimes)
            try:
                write(path)
            except OSError as error:
                assert error.errno == errno.ENOSPC
            else:
                break  # it was never full
        left = contents(path) if path.exists() else {}
        assert not [name for name in left if name.startswith("claims/")]
        assert "manifest.json" not in left or left["manifest.json"] == whole["manifest.json"]
        vouched = sum(name.endswith(".json") for name in left if name.startswith("shards/"))
        assert write(path, allow_finished=True) == min(4 * vouched, ROWS)
        assert contents(path) == whole
        after += 1
    assert after >= 8


def test_shard_that_the_disk_has_no_room_for_leaves_nothing_behind(tmp_path, whole, monkeypatch):
    """The Arrow writer itself runs out of space, and once more when its file is closed."""

    class Full(pa.OSFile):
        def close(self):
            super().close()
            full()

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(pa, "OSFile", Full)
        write(tmp_path / "cache")
    assert not [file for file in tmp_path.rglob("*") if is_temporary(file.name)]
    assert write(tmp_path / "cache") == 0
    assert contents(tmp_path / "cache") == whole


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount")
def test_small_file_system_that_fills_up(tmp_path):
    mount, options = tmp_path / "small", "size=96k"
    mount.mkdir()
    if os.system(f"mount -t tmpfs -o {options} none {mount} 2>/dev/null") != 0:
        pytest.skip("mounting is not allowed here")
    try:
        rows = 2000
        metadata = sample_metadata(rows, rows_per_shard=50, rows_per_record_batch=50)
        with pytest.raises(OSError) as caught:
            write(mount / "cache", metadata=metadata)
        assert caught.value.errno == errno.ENOSPC
        kept = contents(mount / "cache")
        assert not [name for name in kept if is_temporary(name.rpartition("/")[2]) or name.startswith("claims")]
        os.system(f"mount -o remount,size=64m {mount}")
        with cf.CacheWriter(mount / "cache", metadata, tokenizer_files=FILES, resume=True) as writer:
            assert writer.complete.shards >= 5
            while (shard := writer.begin_shard()) is not None:
                writer.write([sample_row(row) for row in metadata.shard_rows(shard)])
        after = contents(mount / "cache")
        assert {name: data for name, data in kept.items() if name in after and "partial" not in name}.items() <= (
            after.items()
        )
        write(tmp_path / "whole", metadata=metadata)
        assert after == contents(tmp_path / "whole")
    finally:
        os.system(f"umount {mount}")


# -- damage found on resuming ------------------------------------------------------------------------------------------


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def swap_counts(sidecar: dict) -> None:
    first, second = sidecar["record_batches"][:2]
    first["rows"], second["rows"] = 1, 3


DAMAGE = {
    "shorter": lambda cache: (cache / SHARD).write_bytes((cache / SHARD).read_bytes()[:-1]),
    "longer": lambda cache: (cache / SHARD).write_bytes((cache / SHARD).read_bytes() + b"\0"),
    "empty": lambda cache: (cache / SHARD).write_bytes(b""),
    "zeros, as some file systems leave": lambda cache: (cache / SHARD).write_bytes(
        bytes((cache / SHARD).stat().st_size)
    ),
    "bit of the header": lambda cache: flip(cache / SHARD, 40),
    "bit of the footer": lambda cache: flip(cache / SHARD, -20),
    "sidecar cut": lambda cache: (cache / SIDECAR).write_bytes((cache / SIDECAR).read_bytes()[:-30]),
    "sidecar empty": lambda cache: (cache / SIDECAR).write_bytes(b""),
    "sidecar of another shard": lambda cache: shutil.copy(cache / "shards/shard-00001.json", cache / SIDECAR),
    "shard and sidecar of another": lambda cache: [
        shutil.copy(cache / f"shards/shard-00001.{kind}", cache / f"shards/shard-00000.{kind}")
        for kind in ("json", "arrow")
    ],
    "rows that are cut elsewhere": lambda cache: edit_json(cache / SIDECAR, swap_counts),
}


@pytest.mark.long
@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_shard_is_noticed_on_resuming_and_written_again(tmp_path, whole, damage, finished):
    cache = tmp_path / "cache"
    write(cache)
    if not finished:
        shutil.copy(cache / "manifest.json", cache / "manifest.partial.json")
        (cache / "manifest.json").unlink()
    DAMAGE[damage](cache)
    assert write(cache, allow_finished=True) == 0
    assert contents(cache) == whole


def test_sidecar_that_the_manifest_does_not_know_is_noticed_where_there_is_a_manifest(tmp_path, whole):
    write(tmp_path / "cache")
    edit_json(tmp_path / "cache" / SIDECAR, lambda sidecar: sidecar["annotations"].update(batch_size=2))
    assert write(tmp_path / "cache", allow_finished=True) == 0
    assert contents(tmp_path / "cache") == whole


# -- differences -------------------------------------------------------------------------------------------------------

MACHINE = {
    "capture": {"device": "A100", "threads": 2, "batch_size": 8},
    "libraries": {"torch": "2.13.0"},
}


def begun(path: Path) -> dict[str, bytes]:
    """An unfinished cache of one shard, made on a certain machine."""
    with pytest.raises(InterruptedError), cf.CacheWriter(path, sample_metadata(ROWS, **MACHINE)) as writer:
        writer.write([sample_row(row) for row in range(4)])
        raise InterruptedError
    return contents(path)


def elsewhere(**changes) -> cf.CacheMetadata:
    capture = {**MACHINE["capture"], "device": "H100", "threads": 1}
    return sample_metadata(ROWS, **{"capture": capture, "libraries": {"torch": "2.14.0"}, **changes})


def test_differences_that_only_change_rounding_are_named_as_such(tmp_path):
    before = begun(tmp_path / "cache")
    with pytest.raises(cf.MismatchError) as caught:
        cf.CacheWriter(tmp_path / "cache", elsewhere(), resume=True)
    message = str(caught.value)
    for words in (
        'capture.device recorded "A100", given "H100" (only rounding: another kind of device',
        "capture.threads recorded 2, given 1 (only rounding: sums split over another number of threads",
        'libraries.torch recorded "2.13.0", given "2.14.0" (only rounding: another version',
        "allow it with `allow_rounding=True`",
    ):
        assert words in message
    assert "batch_size" not in message
    assert contents(tmp_path / "cache") == before


def test_other_differences_come_first_and_are_never_allowed(tmp_path):
    before = begun(tmp_path / "cache")
    other = elsewhere(rows_per_record_batch=4, teacher={"name": "sample", "revision": None, "dtype": "bfloat16"})
    for allow in (False, True):
        with pytest.raises(cf.MismatchError) as caught:
            cf.CacheWriter(tmp_path / "cache", other, resume=True, allow_rounding=allow)
        message = str(caught.value)
        assert "allow_rounding" not in message
        places = [message.index(key) for key in ("rows_per_record_batch", "teacher.dtype", "capture.device")]
        assert places == sorted(places)
    assert contents(tmp_path / "cache") == before


def test_rounding_that_was_allowed_is_recorded_with_the_shards_it_is_in(tmp_path):
    before = begun(tmp_path / "cache")
    with cf.CacheWriter(tmp_path / "cache", elsewhere(), resume=True, allow_rounding=True) as writer:
        writer.write([sample_row(row) for row in range(4, ROWS)])
    cache = cf.open_cache(tmp_path / "cache")
    assert cache.metadata.capture == MACHINE["capture"] and cache.metadata.libraries == MACHINE["libraries"]
    sidecars = [(tmp_path / f"cache/shards/shard-0000{i}.json").read_bytes() for i in range(3)]
    notes = [json.loads(sidecar)["annotations"] for sidecar in sidecars]
    made = {"capture.device": "H100", "capture.threads": 1, "libraries.torch": "2.14.0"}
    assert notes == [{}, {"made_with": made}, {"made_with": made}]
    assert contents(tmp_path / "cache")[SHARD] == before[SHARD]
    np.testing.assert_array_equal(cache[9].input_ids, sample_row(9).input_ids)
