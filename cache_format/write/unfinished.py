"""A cache that is being written: what the directory records, which shards are complete, and how the cache is finished.

There is no state besides the files: a run that was killed at any point, or twenty runs on as many machines, continue
from the directory alone. While it is being written, a cache has a `manifest.partial.json` and no `manifest.json`; a
shard exists once its sidecar does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cache_format.cache_errors import CacheError, CorruptShardError, MismatchError
from cache_format.codecs.encodings import codec_for
from cache_format.manifest.card import card
from cache_format.manifest.differences import Difference, differences, ignoring_names, listed
from cache_format.manifest.manifest import (
    LEXICON,
    MANIFEST,
    PARTIAL_MANIFEST,
    TOKENIZER_DIR,
    FileInfo,
    Manifest,
    ShardInfo,
    Sidecar,
    answers_file,
    documents_file,
    manifest_bytes,
    partial_contents,
    sha256,
    shard_name,
    sidecar_name,
)
from cache_format.manifest.metadata import CacheMetadata
from cache_format.manifest.stored_head import HEAD
from cache_format.rows.row_batch import RowBatch
from cache_format.storage.claims import CLAIMS, Claims
from cache_format.storage.directory import Buffer, Directory, is_temporary, write_bytes
from cache_format.wording import quantity
from cache_format.write.occupancy import recorded_manifest

OnProgress = Callable[[int, int], None]  # with the number of shards done, and of all
ENDING = "manifest"  # the claim of the process that writes it
FOLDERS_WITH_FILES = ("", "shards", TOKENIZER_DIR, CLAIMS)


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """Totals over all complete shards."""

    shards: int
    rows: int
    tokens: int
    counted_tokens: int
    bytes: int  # including the files beside the shards
    head_bytes: int = 0  # of these, the teacher's head


class UnfinishedCache:
    """The directory of a cache that is being written, seen by one of its writers.

    Attributes:
        metadata: as recorded; as given, if nothing was recorded yet.
        complete: complete shards by number.
        rounding: differences between recorded and given metadata that were allowed.
        wrote_manifest: whether `finish` wrote the manifest, because there was none yet.
    """

    def __init__(
        self, directory: Directory, metadata: CacheMetadata, tokenizer_files: Mapping[str, str], *, allow_rounding: bool
    ) -> None:
        """`tokenizer_files`: name -> sha256."""
        self.directory, self.metadata = directory, metadata
        self.complete: dict[int, ShardInfo] = {}
        self.rounding: list[Difference] = []
        self.wrote_manifest = False
        self.codec = codec_for(metadata)
        self.lexicon_file: FileInfo | None = None
        self._tokenizer_files = dict(tokenizer_files)
        self._allow_rounding = allow_rounding
        self._promised: dict[int, str] = {}  # sidecar sha256 by shard, from a finished manifest

    def size(self, without: Collection[int] = ()) -> CacheSize:
        """Size of the complete shards, some of them left out. Another thread may complete shards meanwhile."""
        shards = [shard for index, shard in list(self.complete.items()) if index not in without]
        files = self.metadata.head, answers_file(self.metadata), documents_file(self.metadata), self.lexicon_file
        beside = sum(file.bytes for file in files if file is not None)
        return CacheSize(
            shards=len(shards),
            rows=sum(shard.rows for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            counted_tokens=sum(shard.counted_tokens for shard in shards),
            bytes=sum(shard.bytes for shard in shards) + beside,
            head_bytes=0 if self.metadata.head is None else self.metadata.head.bytes,
        )

    @property
    def is_complete(self) -> bool:
        return len(self.complete) == self.metadata.num_shards

    @property
    def is_finished(self) -> bool:
        """Complete, and with a final manifest."""
        return self.is_complete and self._has_manifest

    @property
    def _has_manifest(self) -> bool:
        names = self.directory.names()
        return MANIFEST in names and PARTIAL_MANIFEST not in names

    def begin(self, *, resume: bool) -> None:
        """Records the metadata, or compares it with what is recorded, and finds the complete shards.

        Raises: CacheError if there is a cache and `resume` is not set; MismatchError if its metadata differs.
        """
        where = self.directory.path()
        recorded = recorded_manifest(self.directory)
        if recorded and not resume:
            state = "a finished" if recorded == MANIFEST else "an unfinished"
            raise CacheError(
                f"{where}: found {state} cache, expected an empty directory: nothing was changed. "
                "Choose another directory, or resume."
            )
        # If several writers begin at once, one records the metadata and the others compare.
        if recorded is None:
            partial = manifest_bytes(self.metadata, self._tokenizer_files)
            if self.directory.create_new(PARTIAL_MANIFEST, partial):
                return
        if self.read() == MANIFEST and not self.is_complete:
            # Shards were lost, so it is unfinished again. Keep the recorded metadata, which may differ from the given.
            self.directory.create_new(PARTIAL_MANIFEST, manifest_bytes(self.metadata, self._tokenizer_files))
            self.directory.remove(MANIFEST)

    def read(self, on_progress: OnProgress = lambda done, total: None) -> str:
        """Compares the metadata with what is recorded, and finds the complete shards; changes nothing.

        Returns: the name of the manifest that was found. Raises: MismatchError; CacheError if the lexicon is lost.
        """
        recorded, data = self._read_recorded()
        where = self.directory.path(recorded)
        given = manifest_bytes(self.metadata, self._tokenizer_files)
        self._check_same(data, given, where, finished=recorded == MANIFEST)
        if recorded == MANIFEST:
            shards = Manifest.from_bytes(data, where).shards
            self._promised = {index: shard.sidecar_sha256 for index, shard in enumerate(shards)}
        self._check_lexicon_not_lost()
        self.find_complete(on_progress=on_progress)
        return recorded

    def recorded_fact(self, name: str) -> Any:
        """What the sidecar of the last complete shard records under this name; None: nothing."""
        if not self.complete:
            return None
        sidecar = sidecar_name(max(self.complete))
        data = self.directory.read_bytes(sidecar)
        return Sidecar.from_bytes(data, self.directory.path(sidecar)).annotations.get(name)

    def write_tokenizer(self, files: Mapping[str, bytes]) -> None:
        there = set(self.directory.names(TOKENIZER_DIR))
        for name, contents in files.items():
            inside = f"{TOKENIZER_DIR}/{name}"
            if name not in there or sha256(self.directory.read_bytes(inside)) != self._tokenizer_files[name]:
                write_bytes(self.directory, inside, contents)

    def write_head(self, contents: Buffer | None) -> None:
        """Writes the head if it is missing or damaged.

        Raises: ValueError if it is needed but not given, or if it does not match the metadata.
        """
        expected = None if self.metadata.head is None else self.metadata.head.sha256
        if contents is not None and sha256(contents) != expected:
            raise ValueError("the contents of the head are not those that metadata.targets.head describes")
        if expected is None or file_is_there(self.directory, HEAD, expected):
            return
        if contents is None:
            raise ValueError("hidden targets need the contents of their head")
        write_bytes(self.directory, HEAD, contents)

    def find_complete(self, without: Collection[int] = (), on_progress: OnProgress = lambda done, total: None) -> None:
        """Looks for shards that have been completed since the last call, except some."""
        if self.codec.needs_lexicon and not self._load_lexicon():
            return  # without it the shards cannot be read
        names = set(self.directory.names("shards"))
        for index in range(self.metadata.num_shards):
            if index in self.complete or index in without:
                continue
            if {_plain(shard_name(index)), _plain(sidecar_name(index))} <= names:
                self.look_for(index)
            on_progress(index + 1, self.metadata.num_shards)

    def look_for(self, index: int) -> bool:
        """Whether a shard is complete, judged by cheap checks: its sidecar is self-consistent and fits this place in
        this cache, and the file's size and the checksums of its header and footer match. The rest is checked when the
        shard is read, and by `verify_cache`."""
        name = sidecar_name(index)
        try:
            data = self.directory.read_bytes(name)
            sidecar = Sidecar.from_bytes(data, self.directory.path(name))
            fits = self._fits(index, sidecar, sha256(data)) and self._is_whole(shard_name(index), sidecar)
        except (FileNotFoundError, CorruptShardError):
            return False  # rewritten, like any shard without a sidecar
        if fits:
            self.complete[index] = shard_info(index, sidecar, sha256(data))
        return fits

    def shard_facts(self) -> dict[str, Any]:
        """Annotations that a shard's sidecar gets in addition to the caller's."""
        facts: dict[str, Any] = {}
        if self.lexicon_file is not None:
            facts["lexicon_sha256"] = self.lexicon_file.sha256
        if self.rounding:
            facts["made_with"] = {difference.key: difference.given for difference in self.rounding}
        return facts

    def learn_lexicon(self, batches: Sequence[RowBatch]) -> None:
        """Writes the lexicon learned from the record batches of shard 0: the same for any number of writers."""
        self.directory.create_new(LEXICON, self.codec.learn_lexicon(batches))
        self._load_lexicon()

    def finish(self, claims: Claims) -> None:
        """Writes card and manifest, and removes everything that does not belong in a finished cache. Idempotent, also
        across processes.

        Args:
            claims: the caller's, which stay; other writers' claims do not matter once every shard is complete.
        """
        if not self._has_manifest:
            shards = [self.complete[index] for index in range(self.metadata.num_shards)]
            data = manifest_bytes(self.metadata, self._tokenizer_files, shards, self.lexicon_file)
            manifest = Manifest.from_bytes(data, self.directory.path(MANIFEST))
            write_bytes(self.directory, "README.md", card(manifest).encode())
            write_bytes(self.directory, MANIFEST, data)
            self.wrote_manifest = True
            self.directory.remove(PARTIAL_MANIFEST)
        self.remove_temporary()
        claims.sweep()

    def remove_temporary(self, prefix: str = "") -> None:
        """Removes temporary files of killed writers whose names begin with `prefix`; the caller must hold the claim."""
        for folder in FOLDERS_WITH_FILES:
            for name in self.directory.names(folder):
                if is_temporary(name) and name.startswith(f".{prefix}"):
                    self.directory.remove(f"{folder}/{name}" if folder else name)

    def _read_recorded(self) -> tuple[str, bytes]:
        for name in (MANIFEST, PARTIAL_MANIFEST, MANIFEST):  # it may be finished, or reopened, between two reads
            try:
                return name, self.directory.read_bytes(name)
            except FileNotFoundError:
                continue
        raise CacheError(f"{self.directory.path()}: its manifest disappeared while it was read. Run the command again.")

    def _check_same(self, recorded_data: bytes, partial: bytes, where: str, *, finished: bool) -> None:
        """If only names or rounding differ, the recorded metadata (the first writer's) is kept."""
        given = partial_contents(partial, where)
        recorded = partial_contents(recorded_data, where)
        found = differences({key: value for key, value in recorded.items() if key in given}, given)
        if not found:
            return
        essential = ignoring_names(found, recorded)
        only_rounding = all(difference.rounding is not None for difference in essential)
        if only_rounding and (self._allow_rounding or not essential):
            self.rounding = essential
            as_recorded = CacheMetadata.from_json(recorded)
            kept = {name: getattr(as_recorded, name) for name in ("teacher", "corpus", "capture", "libraries")}
            self.metadata = replace(self.metadata, **kept)
            return
        found = essential if only_rounding else found
        command = self.metadata.command  # not all have these options
        advice = "Choose another directory"
        if only_rounding:
            advice = "Use the same, or choose another directory"
            if command == "cache-teacher":
                advice = "Use the same, allow it with `allow_rounding=True`, or choose another directory"
        elif finished and command != "convert":
            advice += ", or replace it with `overwrite=True`"
        raise MismatchError(
            f"{where}: recorded and given metadata differ: {listed(found)}: a cache must be made with the same "
            f"settings throughout. {advice}."
        )

    def _load_lexicon(self) -> bool:
        try:  # without listing the directory: on network file systems a listing may be older than that of the shards
            data = self.directory.read_bytes(LEXICON)
        except FileNotFoundError:
            return False
        self.codec = self.codec.with_lexicon(data, self.directory.path(LEXICON))
        self.lexicon_file = FileInfo(sha256=sha256(data), bytes=len(data))
        return True

    def _check_lexicon_not_lost(self) -> None:
        """The lexicon is written before any shard. A copy may exist, and a new one would cost all of the shards."""
        if not self.codec.needs_lexicon:
            return
        packed = [name for name in self.directory.names("shards") if name.endswith(".json")]  # before the lexicon
        if packed and not self._load_lexicon():
            raise CacheError(
                f"{self.directory.path(LEXICON)}: no such file, and {quantity(len(packed), 'shard')} cannot be read "
                "without it. Copy it here from where shard 0 was written, or delete the folder shards to make them "
                "again."
            )

    def _fits(self, index: int, sidecar: Sidecar, digest: str) -> bool:
        lexicon = None if self.lexicon_file is None else self.lexicon_file.sha256
        return (
            digest == self._promised.get(index, digest)
            and sidecar.is_for(self.metadata, index)
            and sidecar.annotations.get("lexicon_sha256") == lexicon  # coded with another lexicon, it cannot be read
        )

    def _is_whole(self, name: str, sidecar: Sidecar) -> bool:
        file = self.directory.open(name)
        return file.size == sidecar.file_bytes and all(
            sha256(file.read(part.start, part.stop)) == part.sha256 for part in (sidecar.header, sidecar.footer)
        )


def shard_info(index: int, sidecar: Sidecar, digest: str) -> ShardInfo:
    return ShardInfo(
        name=shard_name(index),
        bytes=sidecar.file_bytes,
        rows=sidecar.rows,
        tokens=sidecar.tokens,
        counted_tokens=sidecar.counted_tokens,
        entries=sidecar.entries,
        sidecar_sha256=digest,
    )


def claim_name(shard: int) -> str:
    return f"shard-{shard:05d}"


def file_is_there(directory: Directory, name: str, digest: str) -> bool:
    """Whether the file exists and has this SHA-256."""
    try:
        file = directory.open(name)
        return sha256(file.read(0, file.size)) == digest
    except FileNotFoundError:
        return False


def _plain(name: str) -> str:
    return name.rpartition("/")[2]
