"""The two kinds of JSON files of a cache, typed: `manifest.json`, and a sidecar for each shard.

They form a chain of checksums with one root. The manifest holds its own checksum and the SHA-256 of every sidecar and
tokenizer file; a sidecar holds the SHA-256 of consecutive byte ranges that cover its shard without a gap. So a reader
checks exactly what it uses, before anything parses it.

The manifest's own checksum covers the file's bytes with its 64 digits replaced by zeros: no canonical JSON is needed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from cache_format.cache_errors import CacheError, CorruptShardError, FormatError
from cache_format.manifest.answers_file import ANSWERS, recorded_answers
from cache_format.manifest.documents_file import DOCUMENTS, recorded_documents
from cache_format.manifest.fields import FILE, FILES, SHARDS, SIDECAR, check_fields
from cache_format.manifest.metadata import (
    FORMAT_NAME,
    FORMAT_VERSION,
    LEAST_BYTES,
    ROWS_PER_BYTE,
    WITH_HEAD,
    CacheMetadata,
)
from cache_format.manifest.stored_head import HEAD

MANIFEST = "manifest.json"
PARTIAL_MANIFEST = "manifest.partial.json"
LEXICON = "lexicon.arrow"
TOKENIZER_DIR = "tokenizer"
SELF_CHECKSUM = "manifest_sha256"
ZEROS = "0" * 64

T = TypeVar("T")


def shard_name(index: int) -> str:
    return f"shards/shard-{index:05d}.arrow"


def sidecar_name(index: int) -> str:
    return f"shards/shard-{index:05d}.json"


def sha256(data: Any) -> str:
    """SHA-256 of bytes or of anything else with a buffer, in hex."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ByteRange:
    """Bytes start to stop of a shard file."""

    start: int
    stop: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class RecordBatchInfo(ByteRange):
    first_row: int
    rows: int
    tokens: int
    counted_tokens: int
    entries: int


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """Sizes and checksums of one shard: header, record batches and footer cover all its bytes."""

    file_bytes: int
    first_row: int
    rows: int
    tokens: int
    counted_tokens: int
    entries: int
    header: ByteRange  # magic, schema and dictionary messages
    record_batches: tuple[RecordBatchInfo, ...]
    footer: ByteRange
    annotations: Mapping[str, Any]  # facts about how this shard was made

    def to_bytes(self) -> bytes:
        return json_text(asdict(self)).encode()

    def is_for(self, metadata: CacheMetadata, shard: int) -> bool:
        """Whether its record batches hold the rows of this shard. The cost depends on the sidecar's size, not on the
        numbers in the metadata."""
        return (
            self.first_row == metadata.shard_rows(shard).start
            and len(self.record_batches) == metadata.num_record_batches(shard)
            and all(
                (batch.first_row, batch.rows) == (rows.start, len(rows))
                for batch, rows in zip(self.record_batches, metadata.record_batch_rows(shard), strict=True)
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Sidecar:
        """Raises: CorruptShardError."""

        def build(raw: dict[str, Any]) -> Sidecar:
            check_fields(raw, SIDECAR)
            known = _known(cls, raw)
            batches = tuple(RecordBatchInfo(**_known(RecordBatchInfo, b)) for b in raw["record_batches"])
            known |= {
                "header": ByteRange(**_known(ByteRange, raw["header"])),
                "footer": ByteRange(**_known(ByteRange, raw["footer"])),
                "record_batches": batches,
            }
            sidecar = cls(**known)
            ranges = [sidecar.header, *batches, sidecar.footer]
            stops = [0] + [r.stop for r in ranges]
            if [r.start for r in ranges] != stops[:-1] or stops[-1] != sidecar.file_bytes:
                raise ValueError("the byte ranges do not cover the file")
            for name in ("rows", "tokens", "counted_tokens", "entries"):
                if sum(getattr(b, name) for b in batches) != getattr(sidecar, name):
                    raise ValueError(f"the {name} of its record batches do not add up")
            return sidecar

        return _parse(data, build, where, CorruptShardError)


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What the manifest says about a shard."""

    name: str  # path inside the cache
    bytes: int
    rows: int
    tokens: int
    counted_tokens: int
    entries: int
    sidecar_sha256: str


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """A file next to the shards."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """A finished cache: its metadata and its shards."""

    metadata: CacheMetadata
    shards: tuple[ShardInfo, ...]
    tokenizer_files: Mapping[str, str]  # name inside tokenizer/ -> sha256
    raw: Mapping[str, Any]  # the JSON as it stands, unknown keys included
    lexicon: FileInfo | None = None  # lexicon.arrow; packed encoding only
    answers: FileInfo | None = None  # answers.jsonl; of text that the teacher wrote
    documents: FileInfo | None = None  # documents.arrow; with kept columns

    @property
    def num_rows(self) -> int:
        return self.metadata.num_rows  # which the shards' rows were checked against

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def num_loss_tokens(self) -> int:
        return sum(shard.counted_tokens for shard in self.shards)

    @property
    def num_entries(self) -> int:
        return sum(shard.entries for shard in self.shards)

    @property
    def shard_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the shards and of the files beside them."""
        return self.shard_bytes + sum(self.bytes_beside.values())

    @property
    def bytes_beside(self) -> dict[str, int]:
        """Bytes of lexicon, head, answers and kept columns, by file name."""
        files = {LEXICON: self.lexicon, HEAD: self.metadata.head, ANSWERS: self.answers, DOCUMENTS: self.documents}
        return {name: file.bytes for name, file in files.items() if file is not None and file.bytes}

    @property
    def head_bytes(self) -> int:
        """Bytes of head.safetensors."""
        return 0 if self.metadata.head is None else self.metadata.head.bytes

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Raises: FormatError."""

        def build(raw: dict[str, Any]) -> Manifest:
            check_fields(raw, SHARDS)
            metadata = CacheMetadata.from_json(raw)
            if raw["format_version"] != metadata.format_version:
                raise ValueError(
                    f"format version {raw['format_version']}, targets like these have {metadata.format_version}"
                )
            shards = tuple(ShardInfo(**_known(ShardInfo, shard)) for shard in raw["shards"])
            if len(shards) != metadata.num_shards:
                raise ValueError(f"{len(shards)} shards, expected {metadata.num_shards}")
            for index, shard in enumerate(shards):
                if shard.name != shard_name(index):
                    raise ValueError(f"shard {shard.name!r}, expected {shard_name(index)!r}")
                if shard.rows != len(metadata.shard_rows(index)):
                    raise ValueError(f"{shard.name}: {shard.rows} rows do not fit its place")
                if (batches := metadata.num_record_batches(index)) * LEAST_BYTES > shard.bytes:
                    raise ValueError(f"{shard.name}: {shard.bytes:,} bytes cannot hold {batches:,} record batches")
                if shard.rows > min(shard.tokens, ROWS_PER_BYTE * shard.bytes):
                    of = f"{shard.tokens:,} tokens in {shard.bytes:,} bytes"
                    raise ValueError(f"{shard.name}: {shard.rows:,} rows of {of}")
            tokenizer_files = _tokenizer_files(raw)
            lexicon = None
            if metadata.encoding == "packed":
                check_fields(raw, {"lexicon": FILE})
                lexicon = FileInfo(**_known(FileInfo, raw["lexicon"]))
            beside = answers_file(metadata), documents_file(metadata)
            return cls(metadata, shards, tokenizer_files, raw, lexicon, *beside)

        return _manifest(data, build, where)


def answers_file(metadata: CacheMetadata) -> FileInfo | None:
    """Size and checksum of answers.jsonl, or None. Raises: KeyError."""
    recorded = recorded_answers(metadata)
    return None if recorded is None else FileInfo(**_known(FileInfo, recorded))


def documents_file(metadata: CacheMetadata) -> FileInfo | None:
    """Size and checksum of documents.arrow, or None."""
    recorded = recorded_documents(metadata)
    return None if recorded is None else FileInfo(**_known(FileInfo, recorded))


def manifest_bytes(
    metadata: CacheMetadata,
    tokenizer_files: Mapping[str, str],
    shards: Sequence[ShardInfo] | None = None,
    lexicon: FileInfo | None = None,
) -> bytes:
    """`manifest.json`, or, without shards, `manifest.partial.json`."""
    data: dict[str, Any] = {
        "format": FORMAT_NAME,
        "format_version": metadata.format_version,
        **metadata.to_json(),
        "tokenizer_files": dict(tokenizer_files),
        SELF_CHECKSUM: ZEROS,
    }
    if shards is not None:
        data["shards"] = [asdict(shard) for shard in shards]
    if lexicon is not None:
        data["lexicon"] = asdict(lexicon)
    zeroed = json_text(data).encode()
    return zeroed.replace(_self_member(ZEROS), _self_member(sha256(zeroed)))


def partial_contents(data: bytes, where: str) -> dict[str, Any]:
    """Contents of a `manifest.partial.json`, to compare on resuming."""

    def build(raw: dict[str, Any]) -> dict[str, Any]:
        _tokenizer_files(raw)
        CacheMetadata.from_json(raw)  # raises what is wrong with it
        return {key: value for key, value in raw.items() if key != SELF_CHECKSUM}

    return _manifest(data, build, where)


def metadata_of(data: bytes, where: str) -> CacheMetadata:
    """Metadata from either manifest. Raises: FormatError."""
    return _manifest(data, CacheMetadata.from_json, where)


def _manifest(data: bytes, build: Callable[[dict[str, Any]], T], where: str) -> T:
    """Parse either manifest, after checking its version and its own checksum."""
    _check_version(data, where)
    _check_self(data, where)
    return _parse(data, build, where, FormatError)


def json_text(data: Mapping[str, Any]) -> str:
    """Deterministic JSON: sorted keys, a line for each key and for each object of a list."""
    lines = []
    for key in sorted(data):
        value = data[key]
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
            items = ",\n  ".join(_one_line(item) for item in value)
            lines.append(f" {json.dumps(key)}: [\n  {items}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {_one_line(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def check_plain_name(name: str) -> str:
    """Check that a name is a relative path with forward slashes that stays inside. Raises: ValueError."""
    parts = name.split("/")
    if re.search(r'[\\:*?"<>|\x00-\x1f]', name) or any(p in ("", ".", "..") for p in parts):
        raise ValueError(f"file name {name!r} is not a plain relative path")
    return name


def _tokenizer_files(raw: Mapping[str, Any]) -> dict[str, str]:
    """Name inside tokenizer/ -> sha256. Raises: ValueError."""
    check_fields(raw, FILES)
    return {check_plain_name(name): digest for name, digest in raw["tokenizer_files"].items()}


def _one_line(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _known(cls: type[Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass; keys of later minor additions are left out."""
    return {f.name: raw[f.name] for f in fields(cls)}


def _parse(data: bytes, build: Callable[[dict[str, Any]], T], where: str, error: type[CacheError]) -> T:
    try:
        raw = json.loads(data, parse_constant=_no_number, parse_float=_finite)
        json.dumps(raw, ensure_ascii=False).encode()  # a lone surrogate cannot be encoded or printed
        if not isinstance(raw, dict):
            raise TypeError("not a JSON object")
        return build(raw)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as e:
        detail = f"no key {e}" if isinstance(e, KeyError) else str(e)
        raise error(
            f"{where}: {detail}: it was changed, damaged or written by something else. "
            "Restore it from a copy, or make the cache again."
        ) from e


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise ValueError(f"{digits[:20]} is beyond what a number can be")
    return value


def _check_version(data: bytes, where: str) -> None:
    raw = _parse(data, dict, where, FormatError)
    if raw.get("format") != FORMAT_NAME:
        raise FormatError(
            f"{where}: found format {raw.get('format')!r}, expected {FORMAT_NAME!r}: not the "
            "manifest of a cache. Give the directory that cache-teacher wrote."
        )
    version = raw.get("format_version")
    if type(version) is not int or version not in (FORMAT_VERSION, WITH_HEAD):
        raise FormatError(
            f"{where}: found format version {version!r}, expected {FORMAT_VERSION} or {WITH_HEAD}: the cache was "
            "written by another release. Install the release that wrote it, or make it again."
        )


def _self_member(digest: str) -> bytes:
    return f'"{SELF_CHECKSUM}": "{digest}"'.encode()


def _check_self(data: bytes, where: str) -> None:
    claimed = str(json.loads(data).get(SELF_CHECKSUM))
    zeroed = data.replace(_self_member(claimed), _self_member(ZEROS))
    if sha256(zeroed) != claimed:
        raise FormatError(
            f"{where}: its checksum is {sha256(zeroed)[:8]}…, it says {claimed[:8]}…: the file was "
            "changed or damaged after writing. Restore it from a copy, or make the cache again."
        )
