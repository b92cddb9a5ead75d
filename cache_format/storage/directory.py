"""The directory of a cache: local, or anything that fsspec can reach, with the same few operations.

Locally a file appears under its name only when it is complete and on disk (temporary name, fsync, rename, fsync of the
directory), and shards are memory-mapped. Object stores have no rename, but an upload is visible only when it is
finished, so files go straight to their final names.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import pyarrow as pa

from cache_format.cache_errors import FormatError
from cache_format.storage.remote import TEMPORARY_SUFFIX, RemoteDirectory, file_system_of

# Errors of file systems without hard links (FAT, some network and user-space file systems).
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


Buffer: TypeAlias = bytes | pa.Buffer


class ShardFile(Protocol):
    @property
    def size(self) -> int: ...

    @property
    def readings(self) -> int:
        """Number of attempts to read a range whose checksum is wrong."""

    def read(self, start: int, stop: int) -> pa.Buffer: ...


class Directory(Protocol):
    """A directory of plain files; names are relative, with forward slashes."""

    def names(self, name: str = "") -> list[str]:
        """Entries directly inside; empty if there is no such directory."""

    def sizes(self, name: str) -> dict[str, int]:
        """Bytes of each file directly inside, without opening any; empty if there is no such directory."""

    def exists(self) -> bool: ...

    def read_bytes(self, name: str) -> bytes:
        """Raises: FileNotFoundError."""

    def open(self, name: str) -> ShardFile:
        """Raises: FileNotFoundError."""

    def create(self, name: str) -> AbstractContextManager[str]:
        """Context manager: a path to write to; the file gets its name if the block succeeds."""

    def create_new(self, name: str, data: bytes) -> bool:
        """Write a small file unless the name exists: of several processes exactly one gets True.

        Local: a hard link, which network file systems make atomically as well. Object stores: a conditional upload
        where the store supports it, otherwise a check before.
        """

    def touch(self, name: str) -> None:
        """Set `modified` to now. Raises: FileNotFoundError."""

    def modified(self, name: str) -> float | None:
        """Time in seconds by the storage's clock; None if it has no times. Raises: FileNotFoundError."""

    def remove(self, name: str) -> None: ...

    def remove_folder(self, name: str) -> None:
        """Remove an empty folder; does nothing if it is missing or not empty."""

    def remove_tree(self, name: str) -> None:
        """Remove a folder and its contents, if it exists."""

    def path(self, name: str = "") -> str:
        """Full path, for messages."""


def open_directory(location: str | os.PathLike[str]) -> Directory:
    """A directory by its path, in which ~ is the user's own, or by its URL.

    Raises: CacheError for a file, or a URL that fsspec does not support."""
    text = os.fspath(location)
    if "://" not in text:
        return _local(Path(os.path.expanduser(text)))
    fs, root = file_system_of(text)
    if "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        return _local(Path(root))
    return RemoteDirectory(text.rstrip("/"), root.rstrip("/"))


def inside(inner: str | os.PathLike[str], outer: str | os.PathLike[str]) -> bool:
    """Whether `inner` is `outer` or lies in it, after resolving links, `..` and spellings."""
    (store, one), (other_store, other) = _place(inner), _place(outer)
    if store != other_store:
        return False
    if store is not None:
        return one[: len(other)] == other
    # Ask the file system about the existing part: names may differ in case, or by a mount.
    here, there = Path(*one), Path(*other)
    parents = [path for path in (here, *here.parents) if path.exists()]
    return there in (here, *here.parents) or (there.exists() and any(os.path.samefile(path, there) for path in parents))


def _place(location: str | os.PathLike[str]) -> tuple[str | None, tuple[str, ...]]:
    """The store, None for local disks, and the parts of the path in it."""
    text = os.fspath(location)
    if "://" not in text:
        return None, Path(os.path.realpath(os.path.expanduser(text))).parts
    fs, root = file_system_of(text)
    names = fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)
    if "file" in names:
        return None, Path(os.path.realpath(root)).parts
    return min(names), tuple(part for part in root.split("/") if part)


def is_temporary(name: str) -> bool:
    """Whether this is a file of a run that was killed, or is still writing."""
    return name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)


def write_bytes(directory: Directory, name: str, data: Buffer) -> None:
    with directory.create(name) as path:
        Path(path).write_bytes(memoryview(data))


@dataclass(frozen=True)
class MappedFile:
    buffer: pa.Buffer
    readings = 1

    @property
    def size(self) -> int:
        return int(self.buffer.size)

    def read(self, start: int, stop: int) -> pa.Buffer:
        return self.buffer.slice(start, stop - start)


@dataclass(frozen=True)
class LocalDirectory:
    root: Path

    def names(self, name: str = "") -> list[str]:
        try:
            return sorted(os.listdir(self.root / name))
        except FileNotFoundError:
            return []

    def sizes(self, name: str) -> dict[str, int]:
        try:
            with os.scandir(self.root / name) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except FileNotFoundError:
            return {}

    def exists(self) -> bool:
        return self.root.exists()

    def read_bytes(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def open(self, name: str) -> ShardFile:
        path = self.root / name
        if not path.stat().st_size:  # an empty file cannot be mapped
            return MappedFile(pa.py_buffer(b""))
        with pa.memory_map(str(path)) as file:
            return MappedFile(file.read_buffer())

    @contextmanager
    def create(self, name: str) -> Iterator[str]:
        final = self.root / name
        _make_folder(final.parent)
        temporary = _temporary(final)
        try:
            yield str(temporary)
            _fsync(temporary)
            os.replace(temporary, final)
            _fsync(final.parent)  # the rename itself
        finally:
            temporary.unlink(missing_ok=True)

    def create_new(self, name: str, data: bytes) -> bool:
        final = self.root / name
        for attempt in range(8):
            try:
                _make_folder(final.parent)
                return _link_new(final, data)
            except FileNotFoundError:  # another process just removed the empty folder
                if attempt == 7:
                    raise
        raise AssertionError

    def touch(self, name: str) -> None:
        os.utime(self.root / name)

    def modified(self, name: str) -> float | None:
        return (self.root / name).stat().st_mtime

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def remove_folder(self, name: str) -> None:
        with contextlib.suppress(OSError):
            (self.root / name).rmdir()

    def remove_tree(self, name: str) -> None:
        if (self.root / name).is_dir():
            shutil.rmtree(self.root / name)

    def path(self, name: str = "") -> str:
        return str(self.root / name)


def _local(root: Path) -> LocalDirectory:
    if root.exists() and not root.is_dir():
        raise FormatError(
            f"{root}: found a file, expected a directory: a cache is the directory that holds "
            "manifest.json. Give that directory."
        )
    return LocalDirectory(root)


def _temporary(final: Path) -> Path:
    """A name that no other process or machine uses."""
    return final.with_name(f".{final.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


def _link_new(final: Path, data: bytes) -> bool:
    temporary = _temporary(final)
    try:
        temporary.write_bytes(data)
        _fsync(temporary)
        try:
            os.link(temporary, final)
        except FileExistsError:
            # On NFS the answer to a successful link may get lost, and its retry fails: the link count decides.
            return temporary.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return _open_new(final, data)
        _flush_or_remove(final, final.parent)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _open_new(final: Path, data: bytes) -> bool:
    try:
        file = final.open("xb")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(data)
    except OSError:
        final.unlink()
        raise
    _flush_or_remove(final, final, final.parent)
    return True


def _flush_or_remove(final: Path, *paths: Path) -> None:
    """Flush a new file, or remove it: after an error the caller does not know that it exists."""
    try:
        for path in paths:
            _fsync(path)
    except OSError:
        final.unlink()
        raise


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents and flush each, so that a power cut cannot remove them."""
    if not folder.exists():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _fsync(folder.parent)


def _fsync(path: Path) -> None:
    if os.name == "nt":  # neither a directory nor a file opened for reading can be flushed there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
