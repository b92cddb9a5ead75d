"""Local copies of parts of remote shards, so that epochs after the first read nothing over the network.

A part is found by its checksum in the sidecar, so copies are never stale, and damaged ones are fetched again. Several
processes may share a directory: files appear by renaming, and the process that exceeds the limit removes the least
recently used parts. Each writing process keeps the limit to within a twentieth. Parts lie in `distill-copies` inside
the user's directory, and only files named like a part, or like its scratch file, are counted and removed.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from cache_format.manifest.fields import is_digest

FOLDER = "distill-copies"  # inside of the directory that the user names
SCRATCH = ".tmp"
SHARE_BETWEEN_LOOKS = 20
DEFAULT_GB = 100.0


@dataclass
class ReadCache:
    """At most `max_bytes` of parts in `directory`."""

    directory: Path
    max_bytes: int
    _written: int = field(default=-1, compare=False)  # since the directory was last listed; -1: never

    @classmethod
    def of(cls, directory: str | None, gigabytes: float = DEFAULT_GB) -> ReadCache | None:
        """A read cache in `directory`, or None without one."""
        return None if directory is None else cls(Path(directory).expanduser(), int(gigabytes * 1e9))

    def get(self, digest: str) -> pa.Buffer | None:
        """The part with this SHA-256, unchecked, or None."""
        path = self._path(digest)
        try:
            os.utime(path)  # used now
            with pa.memory_map(os.fspath(path)) as file:
                return file.read_buffer()
        except (OSError, pa.ArrowException):
            return None

    def put(self, digest: str, data: pa.Buffer) -> None:
        """Keep a part. A full or unwritable disk is ignored: the part is fetched again next time."""
        if data.size > self.max_bytes:
            return
        path = self._path(digest)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._written < 0 or self._written + data.size > self.max_bytes // SHARE_BETWEEN_LOOKS:
                self._make_room(data.size)
            handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f"{digest}.", suffix=SCRATCH)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                os.replace(scratch, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(scratch)
                raise
            self._written += data.size
        except OSError:
            return

    def drop(self, digest: str) -> None:
        """Remove a part whose contents do not match its name."""
        with contextlib.suppress(OSError):
            self._path(digest).unlink()

    def _path(self, digest: str) -> Path:
        if not is_digest(digest):  # text from a file: as a path it could lead anywhere
            raise ValueError(f"{digest!r} is not a SHA-256")
        return self.directory / FOLDER / digest[:2] / digest

    def _make_room(self, coming: int) -> None:
        found = []
        for folder in os.scandir(self.directory / FOLDER):
            if folder.is_dir(follow_symlinks=False):
                for file in filter(_is_ours, os.scandir(folder)):
                    with contextlib.suppress(FileNotFoundError):  # another process removed it
                        facts = file.stat(follow_symlinks=False)
                        found.append((facts.st_mtime_ns, facts.st_size, file.path))
        total = sum(size for _, size, _ in found)
        # Low enough for the writes until the next check.
        allowed = max(0, self.max_bytes - max(coming, self.max_bytes // SHARE_BETWEEN_LOOKS))
        for _, size, path in sorted(found):
            if total <= allowed:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        self._written = 0


def _is_ours(file: os.DirEntry[str]) -> bool:
    """Whether this is a part or its scratch file."""
    digest, dot, rest = file.name.partition(".")
    scratch = dot and rest.endswith(SCRATCH)
    return is_digest(digest) and (not dot or bool(scratch)) and file.is_file(follow_symlinks=False)
