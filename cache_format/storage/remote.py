"""A cache on an object store, through fsspec: every operation is retried while its failure may be temporary.

Connections drop, stores answer 500 and 503, bodies arrive cut short. fsspec's file systems retry some of these, each
different ones; here all are retried, with growing pauses. Retries are made safe: the length of a body and the size of
an upload are checked, and a file that must be new may exist because an answer got lost. Permanent failures (no such
file, no permission, no credentials) are not retried. The last failure is an OSError with URL and number of attempts.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import fsspec
import fsspec.asyn
import pyarrow as pa
from fsspec.registry import known_implementations

from cache_format.cache_errors import CacheError

ATTEMPTS = 8
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 15.0  # the pause doubles: half a minute in all
PATIENCE_S = 300.0  # one attempt may take a minute: lower layers retry as well
TEMPORARY_SUFFIX = ".tmp"

PERMANENT = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
TRANSIENT = (OSError, EOFError, TimeoutError, asyncio.TimeoutError, http.client.HTTPException)
# Libraries below fsspec that raise their own exceptions for network failures.
TRANSPORTS = (
    "botocore",
    "aiobotocore",
    "aiohttp",
    "gcsfs",
    "google",
    "azure",
    "requests",
    "urllib3",
    "huggingface_hub",
)
HOPELESS = ("credential", "validation", "notimplemented")  # parts of the names of their permanent exceptions

T = TypeVar("T")


class CutShortError(OSError):
    """Fewer bytes arrived, or were stored by an upload, than expected."""


def is_transient(error: Exception) -> bool:
    """Whether the same operation may succeed a moment later."""
    kind = type(error)
    if isinstance(error, PERMANENT) or any(word in kind.__name__.lower() for word in HOPELESS):
        return False
    return isinstance(error, TRANSIENT) or kind.__module__.partition(".")[0] in TRANSPORTS


def repeated(operation: Callable[[], T], where: str) -> T:
    """The operation's result, after up to `ATTEMPTS` attempts within `PATIENCE_S`. Raises: OSError, with `where`."""
    began, wait = time.monotonic(), FIRST_WAIT_S
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return operation()
        except Exception as error:
            if not is_transient(error):
                if isinstance(error, PermissionError) and "://" in where:
                    raise PermissionError(errno.EACCES, _line(error), where) from error
                if isinstance(error, OSError):
                    raise
                if type(error).__module__.partition(".")[0] not in TRANSPORTS:
                    raise  # a bug, with its traceback
                raise OSError(errno.EACCES, _line(error), where) from error
            spent = time.monotonic() - began
            if attempt == ATTEMPTS or spent > PATIENCE_S:
                text = f"gave up after {attempt} attempts in {spent:.0f} s ({_line(error)})"
                raise OSError(errno.EIO, text, where) from error
            # Readers that failed together should not retry together.
            time.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, LONGEST_WAIT_S)
    raise AssertionError


if hasattr(os, "register_at_fork"):
    # In fsspec 2024.12 a forked process keeps its parent's event loop without its thread, so a new file system would
    # wait forever. Later versions reset it themselves.
    os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)


@lru_cache(maxsize=64)
def _file_system(url: str, process: int) -> Any:
    del process  # a file system with an event loop does not survive a fork: each process makes its own
    return fsspec.core.url_to_fs(url)[0]


@dataclass(frozen=True)
class RemoteFile:
    directory: RemoteDirectory
    name: str
    size: int
    readings = 3  # a wrong checksum may come from the transfer

    def read(self, start: int, stop: int) -> pa.Buffer:
        fs, full_name = self.directory.fs, self.directory.full(self.name)

        def fetch() -> bytes:
            data = fs.cat_file(full_name, start=start, end=stop)
            if stop - start < len(data) == self.size:
                raise CacheError(
                    f"{self.directory.path(self.name)}: the server sends the whole file, expected a part of it (it "
                    "does not support range requests). Copy the cache to a disk first."
                )
            if len(data) != stop - start:
                raise CutShortError(f"{len(data)} bytes arrived, expected {stop - start}")
            return bytes(data)

        return pa.py_buffer(repeated(fetch, self.directory.path(self.name)))


@dataclass(frozen=True)
class RemoteDirectory:
    """`storage.Directory` over fsspec. There is no rename: a file is visible when its upload is complete."""

    url: str
    root: str  # path in the fsspec file system

    @property
    def fs(self) -> Any:
        """fsspec.AbstractFileSystem"""
        return _file_system(self.url, os.getpid())

    def names(self, name: str = "") -> list[str]:
        return sorted(_plain(entry["name"]) for entry in self._listed(name))

    def sizes(self, name: str) -> dict[str, int]:
        sizes = {entry["name"]: entry["size"] for entry in self._listed(name) if entry["type"] == "file"}
        if unknown := [full_name for full_name, size in sizes.items() if size is None]:  # from a web server
            found = self._repeated(lambda: self.fs.sizes(unknown), name)
            sizes.update(zip(unknown, found, strict=True))
        return {_plain(full_name): int(size) for full_name, size in sizes.items() if size is not None}

    def _listed(self, name: str) -> list[dict[str, Any]]:
        """Entries of a folder, without the empty object named like the folder that some tools create for it."""
        marker = f"{self.full(name)}/"

        def entries() -> list[dict[str, Any]]:
            self.fs.invalidate_cache()
            try:
                return [entry for entry in self.fs.ls(self.full(name), detail=True) if entry["name"] != marker]
            except FileNotFoundError:
                return []

        return self._repeated(entries, name)

    def exists(self) -> bool:
        return self._repeated(lambda: bool(self.fs.exists(self.root)))

    def read_bytes(self, name: str) -> bytes:
        return self._repeated(lambda: self._fetch(name), name)

    def open(self, name: str) -> RemoteFile:
        return RemoteFile(self, name, self._repeated(lambda: self._size(name), name))

    @contextmanager
    def create(self, name: str) -> Iterator[str]:
        handle, scratch = tempfile.mkstemp(suffix=TEMPORARY_SUFFIX)
        os.close(handle)
        try:
            yield scratch

            def upload() -> None:
                self._make_folder(name)
                self.fs.put_file(scratch, self.full(name))
                found, expected = self._size(name), os.path.getsize(scratch)
                if found != expected:
                    raise CutShortError(f"{found} bytes were stored by the upload, expected {expected}")

            self._repeated(upload, name)
        finally:
            os.unlink(scratch)

    def create_new(self, name: str, data: bytes) -> bool:
        def upload() -> bool:
            self._make_folder(name)
            try:
                self.fs.pipe_file(self.full(name), data, mode="create")
            except FileExistsError:
                # Created by another writer, or by us if the first answer got lost and the upload was retried.
                try:
                    return self._fetch(name) == data
                except FileNotFoundError:  # gone again
                    return False
            return True

        return self._repeated(upload, name)

    def touch(self, name: str) -> None:
        data = self.read_bytes(name)
        self._repeated(lambda: self.fs.pipe_file(self.full(name), data), name)

    def modified(self, name: str) -> float | None:
        def look() -> float | None:
            self.fs.invalidate_cache()
            try:
                return float(self.fs.modified(self.full(name)).timestamp())
            except NotImplementedError:
                return None

        return self._repeated(look, name)

    def remove(self, name: str) -> None:
        def remove() -> None:
            self.fs.invalidate_cache()
            if self.fs.exists(self.full(name)):
                with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                    self.fs.rm_file(self.full(name))

        self._repeated(remove, name)

    def remove_folder(self, name: str) -> None:
        """Does nothing: object stores have no folders, other stores may keep empty ones."""

    def remove_tree(self, name: str) -> None:
        def remove() -> None:
            self.fs.invalidate_cache()
            if self.fs.exists(self.full(name)):
                with contextlib.suppress(FileNotFoundError):
                    self.fs.rm(self.full(name), recursive=True)

        self._repeated(remove, name)

    def path(self, name: str = "") -> str:
        return f"{self.url}/{name}" if name else self.url

    def full(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _fetch(self, name: str) -> bytes:
        self.fs.invalidate_cache()  # cached listings lack new files
        data = bytes(self.fs.cat_file(self.full(name)))
        if len(data) != (size := self._size(name)):
            raise CutShortError(f"{len(data)} bytes arrived, expected {size}")
        return data

    def _size(self, name: str) -> int:
        self.fs.invalidate_cache()
        if (size := self.fs.size(self.full(name))) is None:
            raise CacheError(f"{self.path(name)}: the server does not say its size. Copy the cache to a disk first.")
        return int(size)

    def _make_folder(self, name: str) -> None:
        # On an object store folders are part of the name, and creating one may create a bucket.
        if not hasattr(self.fs, "bucket_exists") and not hasattr(self.fs, "s3"):
            self.fs.makedirs(self.full(name).rpartition("/")[0], exist_ok=True)

    def _repeated(self, operation: Callable[[], T], name: str = "") -> T:
        return repeated(operation, self.path(name))


def file_system_of(url: str) -> tuple[Any, str]:
    """(file system, path in it). Raises: CacheError if fsspec does not know the protocol or lacks a package."""
    protocol = url.partition("://")[0]
    try:
        fs, root = fsspec.core.url_to_fs(url)
        return fs, str(root)
    except ImportError as error:
        package = str(known_implementations.get(protocol, {}).get("class", "")).partition(".")[0]
        install = f"pip install {package}" if package not in ("", "fsspec") else "Install what it names"
        raise CacheError(
            f"{url}: {protocol}:// needs a package that is not installed ({_line(error)}). {install}"
        ) from error
    except ValueError as error:
        raise CacheError(
            f"{url}: found {protocol}://, expected a directory or the URL of a store that fsspec knows, such as "
            f"s3://bucket/cache ({_line(error)}). Check the spelling."
        ) from error


def check_can_be_written(url: str) -> None:
    """Raises: CacheError for a store on which several small files cannot be created, renewed and removed."""
    if url.startswith("hf://"):
        raise CacheError(
            f"{url}: a repository of the hub can be read as a cache, not written: each file would be a commit, and "
            "two processes could create the same one unnoticed. Write to a directory, then run: distill push DIRECTORY "
            "OWNER/NAME"
        )
    if url.startswith(("http://", "https://")):
        raise CacheError(f"{url}: a web server can be read as a cache, not written. Write to a directory.")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


def _plain(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]
